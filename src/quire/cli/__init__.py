"""The command line: flags, environment and TOML become frozen options here, and nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from quire.cli.console import INTERRUPTED, ReaderGoneError, quiet_libraries, say
from quire.errors import InvariantError, QuireError

if TYPE_CHECKING:
    import typer

    from quire.cli.commands import app

__all__ = ["app", "invoke", "main"]

SPINS = "20000"
"""How long a thread of torch's OpenMP spins before it sleeps. GNU's default is so long that two commands on one machine
stop each other: 3 tokens a second each where one alone writes 230 (docs/ledger.md)."""

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""torch's own wish for pages of 2 MiB behind large tensors. A weight that is read once a token pays a walk of page
tables for every small page: a decode step's linear layers took 1.3 times as long (docs/ledger.md)."""

BROKEN_PIPE = 141
"""128 + SIGPIPE."""


def main() -> None:
    """The console script."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is first imported
    os.environ.setdefault(HUGE_PAGES, "1")  # read when torch first allocates
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: Sequence[str]) -> int:
    """Runs one command line; every error that a user can mend is one line on stderr.

    Returns:
        0; 2 for what was refused; 130 when interrupted; 141 when nobody reads stdout any more; 70 for a bug of ours.
    """
    try:
        with quiet_libraries():
            code = _run(list(arguments))
            sys.stdout.flush()
    except InvariantError as e:
        say(f"a bug in Quire, please report it: {e}", "bold red")
        return e.exit_code
    except QuireError as e:
        say(" ".join(str(e).split()), "red")
        return 2
    except (ReaderGoneError, BrokenPipeError):
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as e:
        _drop_stdout()
        where = f" ({e.filename})" if e.filename else ""
        say(f"the system refused a file or a stream{where}: {e.strerror or e}", "red")
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except _abort():
        return _interrupted()
    except _usage_error() as e:
        where = getattr(getattr(e, "ctx", None), "command_path", "quire")
        message = e.format_message()
        say(f"{message.rstrip('.')}; see {where} --help", "red")
        return 2
    return code


def _run(arguments: list[str]) -> int:
    """A plain line of `plan` is run at once: typer takes longer to be imported than a plan takes."""
    if arguments and arguments[0] == "plan":
        from quire.cli import plan
        from quire.cli.flags import read_plainly

        values = read_plainly(plan.command, arguments[1:])
        if values is not None:
            plan.command(**values)
            return 0
    import typer.main

    command = typer.main.get_command(_grammar(arguments))
    code = command.main(arguments, prog_name="quire", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _usage_error() -> Any:
    """click's, or that of the click inside typer: newer versions carry their own."""
    import typer

    return typer.BadParameter.__mro__[1]


def _abort() -> Any:
    """What typer makes of Ctrl-C."""
    import typer

    return typer.Abort


def _interrupted() -> int:
    say("interrupted", "yellow")
    return INTERRUPTED


def _grammar(arguments: Sequence[str]) -> typer.Typer:
    """All commands; or `plan` alone, which answers in less time than the others take to be imported."""
    if arguments and arguments[0] == "plan":
        from quire.cli.plan import alone

        return alone()
    from quire.cli.commands import app

    return app


def __getattr__(name: str) -> Any:
    """`app`, when somebody asks for it."""
    if name == "app":
        return _grammar(())
    raise AttributeError(f"module 'quire.cli' has no attribute {name!r}")


def _drop_stdout() -> None:
    """What is still to be written cannot be; Python must not complain about it at exit either."""
    with suppress(OSError, ValueError):  # where stdout is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
