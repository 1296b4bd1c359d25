"""Options declared once, read in two ways: at once where a line is plain, else by typer, which knows help and errors.

    def command(users: Annotated[int, Flag("--users", "N", "At the same time.", "What")] = 1) -> None

typer takes longer to be imported, and to make its validators, than a plan takes. What is not plainly right is left to
it: a help text, an unknown option, a value of another kind, a short form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

__all__ = ["Flag", "for_typer", "read_plainly"]

_KINDS: dict[type, str] = {int: r"-?[0-9]+", float: r"-?[0-9]+(\.[0-9]+)?", str: r"(?s).*"}
"""Types of values, and what is plainly one."""


@dataclass(frozen=True)
class Flag:
    """How one parameter of a command is given.

    Args:
        name: with its dashes; "" for the positional argument, of which there is at most one.
        metavar: what stands for its value in the help text.
        text: the help text; it tells the default.
        panel: where the help text stands.
    """

    name: str
    metavar: str
    text: str
    panel: str = ""


def read_plainly(command: Callable[..., Any], words: Sequence[str]) -> dict[str, Any] | None:
    """Values for `command` from a line in which everything is plainly right, as typer would read them.

    Returns:
        By parameter, those that were given; None where typer has to look.
    """
    known = {flag.name: (name, kind) for name, flag, kind in _flags(command)}
    values: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        dashed = word.startswith("-")
        given, equals, value = word.partition("=") if dashed else ("", "=", word)
        name, kind = known.get(given, ("", None))
        if kind is None or (not dashed and name in values) or (kind is bool and equals):
            return None
        if kind is bool:
            values[name] = True
            continue
        kind, many = (get_args(kind)[0], True) if get_origin(kind) is list else (kind, False)
        text = value if equals else next(rest, None)
        if text is None or not re.fullmatch(_KINDS[kind], text):
            return None
        values[name] = [*values.get(name, ()), kind(text)] if many else kind(text)
    return values


def for_typer(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same command with its options as typer wants them declared."""
    import functools
    import inspect

    import typer

    @functools.wraps(command)
    def told(*given: Any, **values: Any) -> Any:
        return command(*given, **values)

    hints = {}
    for name, flag, _ in _flags(command):
        words: Any = {"metavar": flag.metavar, "help": flag.text, "show_default": False}
        words |= {"rich_help_panel": flag.panel or None}
        option = typer.Option(flag.name, **words) if flag.name else typer.Argument(**words)
        hints[name] = Annotated[get_type_hints(command)[name], option]
    shape = inspect.signature(command)
    taken = [p.replace(annotation=hints[n]) for n, p in shape.parameters.items()]
    told.__signature__ = shape.replace(parameters=taken, return_annotation=None)  # type: ignore[attr-defined]
    told.__annotations__ = hints
    return told


def _flags(command: Callable[..., Any]) -> list[tuple[str, Flag, Any]]:
    """Parameter, flag, and the type of its values: int, float, str, bool, or a list of one of them."""
    out = []
    for name, hint in get_type_hints(command, include_extras=True).items():
        if name == "return":
            continue
        of, flag = get_args(hint)
        if get_origin(of) in (Union, UnionType):
            (of,) = (x for x in get_args(of) if x is not type(None))
        out.append((name, flag, of))
    return out
