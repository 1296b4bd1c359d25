"""One sequence whose generated tokens read fewer blocks than there are: where its prompt ends, and what that means.

    |0 ....... prompt ....... |generated ...
     read whole, may be shared  each query reads its choice; computed one by one, also when computed anew; private

A token that read less than everything has other keys and values above the first layers than one that read all, so what
is computed from there on is published to nobody, and a request that is preempted takes the same steps again.
"""

from __future__ import annotations

from typing import Any

from quire.retention import Keep
from quire.store.table import BlockTable

__all__ = ["Reader"]


class Reader:
    """Stands where a `Keeper` does; every token stays. Made by `Rules.apply`."""

    def __init__(self, policy: Any, prompt_tokens: int | None) -> None:
        self.policy, self.first = policy, prompt_tokens
        self.prompt_tokens = prompt_tokens or 0

    def before_append(self, table: BlockTable, n_tokens: int) -> None:
        if not self.prompt_tokens:
            self.prompt_tokens = table.length + n_tokens
        if table.length + n_tokens > self.prompt_tokens:
            table.leave()

    def spare(self, length: int) -> int:
        return 0

    def until(self, start: int, stop: int) -> int:
        end = self.prompt_tokens
        return stop if not end or stop <= end else end if start < end else start + 1

    def begin_prompt(self, table: BlockTable, n_tokens: int) -> None:
        self.prompt_tokens = table.length + n_tokens

    def reads_by(self, position: int) -> Any:
        return self.policy if position >= self.prompt_tokens else None

    def repeats_at(self, length: int) -> bool:
        """Nothing is read once more."""
        return False

    def fork(self) -> Reader:
        twin = Reader(self.policy, self.first)
        twin.prompt_tokens = self.prompt_tokens
        return twin

    def record(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its bounds lie in the blocks; nothing else was seen."""
        keep = Keep("", self.policy).canonical
        return {"keep": keep, "first": self.first, "prompt_tokens": self.prompt_tokens}, {}

    def finish(self, table: BlockTable) -> None:
        """Nothing is due."""

    def reset(self) -> None:
        self.prompt_tokens = self.first or 0
