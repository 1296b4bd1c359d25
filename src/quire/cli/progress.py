"""A bar for long work of several parts, on stderr while that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quire.cli.console import err

__all__ = ["Tell", "bar"]

Tell = Callable[[str, int, int], None]
"""tell(part, done, total)"""


@contextmanager
def bar(*, shown: bool = True) -> Iterator[Tell]:
    """Yields what is to be told how far which part is; a part gets its line when it is first told of."""
    console = err()
    if not shown or not console.is_terminal:
        yield lambda _part, _done, _total: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        lines: dict[str, tuple[object, int]] = {}

        def tell(part: str, done: int, total: int) -> None:
            known = lines.get(part)
            if known is None or done < known[1]:
                lines[part] = progress.add_task(part, total=total), done
            task = lines[part][0]
            lines[part] = task, done
            progress.update(task, completed=done, total=total)  # type: ignore[arg-type]

        yield tell
