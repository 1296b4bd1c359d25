"""The two streams: results on stdout, everything about them on stderr; and no one else's noise on either."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console


__all__ = [
    "INTERRUPTED",
    "ReaderGoneError",
    "err",
    "interruptible",
    "out",
    "quiet_libraries",
    "quiet_transformers",
    "say",
    "spinner",
    "write",
]

_NOISE = (
    "is falling back to its reference",  # "correct but slower": our figures show the speed
    "is deprecated",
    "generation flags are not valid",
    "unauthenticated requests",
    "longer than the specified maximum sequence length",  # refused by us, in our words
)
"""Parts of library warnings that say nothing to who runs a command."""


INTERRUPTED = 130
"""Exit code: 128 + SIGINT, as a shell reports it."""


class ReaderGoneError(Exception):
    """Nobody reads stdout any more, as after `quire run … | head -1`."""


def err() -> Console:
    """The console on stderr; made anew, so that it follows redirection and NO_COLOR."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def out(widest: int = 120) -> Console:
    """A console on stdout for what is laid out. Into a file it is 80 columns wide, or what COLUMNS says."""
    from rich.console import Console

    stdout = cast("IO[str]", _Stdout())
    wanted = os.environ.get("COLUMNS", "")
    width = int(wanted) if wanted.isdigit() else 0
    if not width:
        width = Console(file=stdout).width if stdout.isatty() else 80
    return Console(file=stdout, highlight=False, width=min(width, widest), height=25)


class _Stdout:
    """`write` as a file, so that a reader that leaves is treated alike everywhere."""

    def __init__(self) -> None:
        self.encoding = getattr(sys.stdout, "encoding", None) or "ascii"

    def write(self, text: str) -> int:
        """All of it, at once."""
        write(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        """Whether somebody looks on."""
        return sys.stdout.isatty()

    def fileno(self) -> int:
        """Of the real stream."""
        return sys.stdout.fileno()


def say(message: str, style: str = "") -> None:
    """One line on stderr."""
    from rich.text import Text

    err().print(Text(f"quire: {message}", style=style), soft_wrap=True)


def write(text: str) -> None:
    """Text to stdout, at once. What the terminal cannot encode is replaced, not fatal."""
    if not text:
        return
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError as e:
        raise ReaderGoneError from e


def interruptible(work: Callable[[], int]) -> int:
    """Does a command's work; Ctrl-C ends it with one line, said once no moving line can wipe it away."""
    try:
        return work()
    except KeyboardInterrupt as e:
        say(" ".join(["interrupted", *map(str, e.args)]), "yellow")
        return INTERRUPTED


@contextmanager
def spinner(message: str, *, shown: bool = True) -> Iterator[Any]:
    """A line that moves while something takes long; only on a terminal. Yields it, or None."""
    from rich.text import Text

    console = err()
    if not shown or not console.is_terminal:
        yield None
        return
    with console.status(Text(message, style="dim")) as status:
        yield status


class _Lines(logging.Handler):
    """Shows each distinct warning once, as one line."""

    def __init__(self) -> None:
        super().__init__(_level())
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        ours = record.name.startswith("quire")
        if text in self._seen or (not ours and any(n in text for n in _NOISE)):
            return
        self._seen.add(text)
        kind = "warning: " if record.levelno >= logging.WARNING else ""
        say(kind + (text if len(text) < 400 else f"{text[:399]}…"), "yellow" if kind else "dim")


def _level() -> int:
    """QUIRE_LOG=info shows which way into the model was chosen, and why not the others."""
    named = logging.getLevelNamesMapping().get(os.environ.get("QUIRE_LOG", "warning").upper())
    return logging.WARNING if named is None else named


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Library logs and warnings as our lines while a command runs; progress bars off."""
    root, handler, before = logging.getLogger(), _Lines(), warnings.showwarning
    ours = logging.getLogger("quire")
    level = ours.level

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if not issubclass(category, FutureWarning | DeprecationWarning):
            handler.handle(
                logging.makeLogRecord(
                    {"name": "python", "msg": str(message), "levelno": logging.WARNING}
                )
            )

    root.addHandler(handler)
    ours.setLevel(handler.level)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        warnings.showwarning = before
        root.removeHandler(handler)
        ours.setLevel(level)


def quiet_transformers() -> None:
    """Lets transformers speak through `quiet_libraries` only. Imports it; call when it is needed anyway."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.disable_default_handler()
    theirs.enable_propagation()
    if not err().is_terminal:
        disable_progress_bars()
