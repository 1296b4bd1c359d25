"""A sequence that outlives its requests: each turn computes only what the turns before have not.

    cache      |-- turn 1 --|-- turn 2 --|                       tokens of which keys and values are held
    turn 3     |-- turn 1 --|-- turn 2 --|-- turn 3 --|          what the model must have seen
                 the same, kept            computed

Where a turn's text does not begin like what is held, for instance because a chat template rewrote it, the cache goes
back to the common beginning. A cache that cannot go back (a window that moved on, a recurrent state) is computed anew,
and says why.

Over a runner that shares prefixes, a turn that begins anew takes what the prefix cache or its tiers have of it, and
leaves what it computes there: so a conversation's beginning is found again after a restart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from quire.engine.engine import Engine
from quire.engine.intake import common
from quire.engine.params import SamplingParams
from quire.engine.request import Delta
from quire.errors import RequestError, TierError
from quire.store.snapshot import Snapshot, load_table, save_table

if TYPE_CHECKING:
    from quire.store.path import Path
    from quire.store.sharing import Sharing

__all__ = ["Conversation", "Reuse"]


@dataclass(frozen=True)
class Reuse:
    """What a turn found in the cache.

    Args:
        kept_tokens: of the prompt, not computed again.
        new_tokens: of the prompt, computed now.
        reason: why nothing was kept although something was there; None otherwise.
    """

    kept_tokens: int
    new_tokens: int
    reason: str | None = None


class Conversation:
    """One table over many requests.

    Args:
        runner: the model and its cache; used by this conversation alone.
        tokenizer, eos_token_ids: as for `Engine`.
    """

    def __init__(
        self, runner: Any, tokenizer: Any = None, *, eos_token_ids: Iterable[int] | None = None
    ) -> None:
        self.runner = runner
        self.tokens: list[int] = []
        """Tokens whose keys and values are held, in order."""
        self.table = runner.open()
        self.reuse = Reuse(0, 0)
        """Of the last turn."""
        lender = cast("Any", _Lender(self))
        self.engine = Engine(lender, tokenizer, eos_token_ids=eos_token_ids)

    def stream(
        self, tokens: Sequence[int], params: SamplingParams | None = None
    ) -> Generator[Delta]:
        """One turn.

        Args:
            tokens: all that the model must have seen, from the conversation's first token on.
            params: with n=1.

        Yields:
            What each step adds. Closing the iterator ends the turn and keeps what it has computed.

        Raises:
            RequestError, CapacityError: refused; the cache is as before, or went back to the common beginning.
        """
        name = self.engine.add_request(list(tokens), params, share=self._share(tokens))
        seen = list(tokens)
        try:
            self.reuse = self._rewind(tokens)
            if getattr(self.table, "path", None) is not None:
                self.table.follow(seen)
            while self.engine.has_work:
                for delta in self.engine.step():
                    if delta.request_id != name:
                        continue  # the last words of a turn that was broken off
                    seen += delta.token_ids
                    if delta.error is not None:
                        raise delta.error
                    yield delta
        finally:
            self.engine.cancel(name)
            self._settle(seen)

    def reset(self) -> None:
        """Forgets everything."""
        self.table.truncate(0)
        self.tokens = []

    def close(self) -> None:
        """Gives the blocks back."""
        self.engine.close()
        self.table.release()
        self.tokens = []

    def found(self, table: Any, n_tokens: int) -> _Lease:
        """A turn of so many tokens begins with a table that the prefix cache has made for it."""
        self.table.release()
        self.table = table
        self.tokens = list(table.path.tokens[: table.length])
        self.reuse = Reuse(table.length, n_tokens - table.length)
        return _Lease(table)

    # -- between turns -------------------------------------------------------------------------------------------

    def _share(self, tokens: Sequence[int]) -> str | None:
        """Whether a turn's prefix is looked up: only one that goes on with nothing of what is held."""
        if self.runner.sharing is None or not common(self.tokens, tokens[:-1]):
            return None
        return "off"

    def _rewind(self, tokens: Sequence[int]) -> Reuse:
        """Makes the table hold the longest beginning of `tokens` that it can; at least one is left to compute."""
        same = common(self.tokens, tokens[:-1])
        reason = None
        if same and not self.runner.chunked_prefill and len(tokens) - same > 1:
            same, reason = 0, "this model must compute a prompt as a whole"
        past = getattr(self.runner, "restart_tokens", None)
        if past is not None and 0 < same <= past < len(tokens):
            same, reason = 0, f"beyond {past} tokens this model turns all keys by other factors"
        if same < self.table.length:
            try:
                self.table.truncate(same)
            except RequestError as e:
                self.table.truncate(0)
                same, reason = 0, str(e)
        self.tokens = list(tokens[:same])
        return Reuse(same, len(tokens) - same, reason)

    def _settle(self, seen: Sequence[int]) -> None:
        """After a turn: what is final stays, what a broken step reserved goes."""
        held = getattr(self.table, "committed", 0)
        if held < self.table.length:
            try:
                self.table.truncate(held)
            except RequestError:
                self.table.truncate(0)
                held = 0
        self.tokens = list(seen[:held])

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, str] | None = None) -> None:
        """Writes tokens and cache to a file; see `quire.store.snapshot.save_table`."""
        save_table(path, self.table, {"tokens": json.dumps(self.tokens), **(extra or {})})

    def restore(self, snapshot: Snapshot) -> None:
        """Takes the place where a saved conversation stopped.

        Raises:
            ConfigError, TierError, CapacityError: see `quire.store.snapshot.load_table`; nothing has changed.
        """
        table = load_table(snapshot, self.runner.bridge.store, self.runner.revive)
        tokens = [int(t) for t in json.loads(snapshot.extra.get("tokens", "[]"))]
        if len(tokens) != table.length:
            table.release()
            raise TierError(
                f"{snapshot.path} holds {table.length} positions of {len(tokens)} tokens"
            )
        self.table.release()
        self.table, self.tokens = table, tokens


class _Lender:
    """The runner as the engine of a conversation sees it: every request continues the one table."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        shared = conversation.runner.sharing
        self.sharing = None if shared is None else _Shelf(conversation, shared)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conversation.runner, name)

    def open(self, keep: Any = None, prompt_tokens: int | None = None) -> _Lease:
        table = self._conversation.table
        keeper = getattr(table, "keeper", None)
        if keeper is not None and prompt_tokens is not None:
            keeper.begin_prompt(table, prompt_tokens - table.length)
        return _Lease(table)


class _Shelf:
    """The prefix cache as that engine sees it: what is taken from it becomes the conversation's one table."""

    def __init__(self, conversation: Conversation, sharing: Sharing) -> None:
        self._conversation, self._sharing = conversation, sharing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sharing, name)

    def take(self, path: Path) -> _Lease:
        """See `Sharing.take`."""
        return self._conversation.found(self._sharing.take(path), len(path.tokens))


class _Lease:
    """A table that its borrower cannot give away."""

    __slots__ = ("_table",)
    _table: Any

    def __init__(self, table: Any) -> None:
        object.__setattr__(self, "_table", table)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._table, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def release(self) -> None:
        """The conversation keeps it."""
