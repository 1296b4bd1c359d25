"""`quire chat`: a conversation in the terminal that keeps its cache between turns, and over restarts."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.text import Text

from quire.cli.console import err, say, write
from quire.cli.dialogue import Dialogue
from quire.cli.options import ChatOptions
from quire.cli.prepare import load, look, open_cache
from quire.cli.report import bytes_text, way_of
from quire.cli.session import Session
from quire.engine.conversation import Conversation
from quire.errors import ConfigError, QuireError
from quire.models.load import Loaded

__all__ = ["main"]

REFUSED = 2
"""A scripted conversation in which a turn was refused."""

HELP = """\
/reset   forget everything and begin anew
/save    write the session file now
/help    this list
/exit    leave; so does Ctrl-D
Ctrl-C   stops a reply and stays"""


def main(options: ChatOptions) -> int:
    """Runs the command. Returns the exit code."""
    session = None
    if options.session is not None:
        session = Session(Path(options.session).expanduser())
        options = session.settle(options)
    source = look(options)
    if session is not None:
        session.check_source(source)
    if source.tokenizer is None:
        raise ConfigError(f"{source.name} has no tokenizer, and a conversation is text")
    loaded = load(source, options, [])
    runner = open_cache(loaded, options)
    try:
        chat = Chat(loaded, runner, options, session)
        if session is not None:
            session.open(loaded, chat.conversation, chat.dialogue)
        return chat.run()
    finally:
        if options.tiers:
            runner.close()  # which writes what is cached to tiers that last


class Chat:
    """The loop: read a line, write a reply, say what it cost.

    Args:
        loaded: model and tokenizer.
        runner: over its cache.
        options: of the command.
        session: where it is kept; None: nowhere.
    """

    def __init__(
        self, loaded: Loaded, runner: Any, options: ChatOptions, session: Session | None
    ) -> None:
        self.loaded = loaded
        self.runner = runner
        self.options = options
        self.session = session
        self.dialogue = Dialogue(loaded.tokenizer, options.system)
        self.conversation = Conversation(
            runner, loaded.tokenizer, eos_token_ids=loaded.eos_token_ids
        )
        self.asks = sys.stdin.isatty()
        self.prompt_tokens = self.kept_tokens = 0
        self.refused = False

    def run(self) -> int:
        """Until the input ends. Returns the exit code."""
        self._greet()
        interrupts = 0
        while True:
            try:
                line = self._read()
                interrupts = 0
            except KeyboardInterrupt:
                interrupts += 1
                write("\n")
                if interrupts > 1 or not self.asks:
                    self._leave()
                    return 130
                self._note("Ctrl-C again, /exit or Ctrl-D leaves")
                continue
            if line is None or line.strip() == "/exit":
                saved = self._leave()
                return REFUSED if not saved or (self.refused and not self.asks) else 0
            if line.startswith("/"):
                self._command(line.strip())
            elif line.strip():
                self._turn(line)

    def _read(self) -> str | None:
        """One line; None at the end."""
        if self.asks:
            import readline  # noqa: F401 - gives input() its editing and history

            try:
                return input("you> ")
            except EOFError:
                write("\n")
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def _command(self, line: str) -> None:
        name = line.split(maxsplit=1)[0]
        if name == "/reset":
            self.conversation.reset()
            self.dialogue.reset()
            self._note("forgotten; the next line begins a new conversation")
        elif name == "/save":
            if self.session is None:
                say("there is no session file; start with --session FILE", "yellow")
            else:
                self._save()
        elif name == "/help":
            err().print(Text(HELP))
        else:
            say(f"unknown command {name}; known: /reset, /save, /help, /exit", "yellow")

    # -- a turn --------------------------------------------------------------------------------------------------

    def _turn(self, line: str) -> None:
        """Asks, streams the reply, keeps it."""
        began = time.monotonic()
        text, ids, cut = "", list[int](), False
        try:
            tokens = self.dialogue.ask(line)
            stops = tuple(dict.fromkeys((*self.options.stop, *self.dialogue.stops)))
            params = self.options.sampling(stop=stops, seed=self._seed())
            turn = self.conversation.stream(tokens, params)
            with _interruptible() as stopped, closing(turn) as deltas:
                for delta in deltas:
                    ids += delta.token_ids
                    write(delta.text if text else delta.text.lstrip())
                    text += delta.text
                    cut = stopped.is_set()
                    if cut:
                        break
        except QuireError as e:
            self.dialogue.withdraw()
            self.refused = True
            write("\n" if text else "")
            say(f"{e}; /reset begins anew", "red")
            return
        except KeyboardInterrupt:  # pressed twice: even the step is given up
            cut = True
        write("\n")
        self.dialogue.answered(text, ids, self.loaded.eos_token_ids)
        self._figures(ids, time.monotonic() - began, cut=cut)

    def _seed(self) -> int | None:
        """Another stream of random numbers each turn, the same ones each time."""
        seed = self.options.seed
        return None if seed is None else (seed + self.dialogue.turns) % 2**64

    def _figures(self, ids: list[int], seconds: float, *, cut: bool) -> None:
        reuse = self.conversation.reuse
        self.prompt_tokens += reuse.kept_tokens + reuse.new_tokens
        self.kept_tokens += reuse.kept_tokens
        if reuse.reason is not None:
            self._note(f"computed from the start: {reuse.reason}")
        share = 100 * reuse.kept_tokens / max(1, reuse.kept_tokens + reuse.new_tokens)
        held = self.conversation.table.held_bytes()
        self._note(
            f"{reuse.kept_tokens:,} tokens not recomputed ({share:.0f} %), {reuse.new_tokens:,} new; "
            f"{len(ids):,} written{' until Ctrl-C' if cut else ''}, {len(ids) / max(seconds, 1e-9):,.1f} per second; "
            f"KV {bytes_text(held)}"
        )

    # -- around --------------------------------------------------------------------------------------------------

    def _greet(self) -> None:
        form = (
            "its own chat template"
            if self.dialogue.templated
            else "no chat template: User, Assistant"
        )
        self._note(
            f"{self.loaded.name}, {way_of(self.runner) or 'no cache'}, {form}; /help lists the commands"
        )
        if self.dialogue.turns:
            self._note(
                f"resumed {self.session.path if self.session else ''}: {self.dialogue.turns} turns, "
                f"{len(self.conversation.tokens):,} tokens in the cache"
            )

    def _note(self, message: str) -> None:
        if not self.options.quiet:
            err().print(Text(message, style="dim"), soft_wrap=True)

    def _save(self) -> bool:
        """Whether it went well."""
        assert self.session is not None
        asked = self.session.path
        try:
            diverted = self.session.save(
                self.loaded, self.conversation, self.dialogue, self.options
            )
        except QuireError as e:
            say(f"not saved: {e}", "red")
            return False
        if diverted:
            say(f"{asked} was written by somebody else meanwhile and is left as it is", "yellow")
        self._note(
            f"saved to {self.session.path}: {self.dialogue.turns} turns, {len(self.conversation.tokens):,} tokens"
        )
        return True

    def _leave(self) -> bool:
        """Whether all is saved that was to be."""
        saved = True
        if self.session is not None and (self.dialogue.turns or self.session.exists):
            saved = self._save()
        if self.prompt_tokens:
            self._note(
                f"in all {self.kept_tokens:,} of {self.prompt_tokens:,} prompt tokens were not recomputed"
            )
        self.conversation.close()
        return saved


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is finished and kept; a second one raises KeyboardInterrupt."""
    event = threading.Event()

    def handler(_number: int, _frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
