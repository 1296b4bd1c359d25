"""A runner in plain Python: a tiny pool of blocks, and logits that are a function of the whole prefix.

It checks what a real one could not: that every item continues exactly what its table has computed, that room was
reserved, that nothing is computed twice in a step. Its logits depend on every token before them, so a scheduler that
loses, repeats or mixes up a token changes what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from quire.engine.runner import Item, Usage
from quire.errors import CapacityError

MODULUS = (1 << 61) - 1
BLOCK_BYTES = 64


class FakePool:
    def __init__(self, n_blocks: int | None, block_tokens: int) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self.refs: dict[int, int] = {}
        self.next_id = 0
        self.opened = 0

    def take(self, n: int) -> list[int]:
        if self.n_blocks is not None and len(self.refs) + n > self.n_blocks:
            raise CapacityError(f"{n} blocks wanted, {self.n_blocks - len(self.refs)} free")
        ids = list(range(self.next_id, self.next_id + n))
        self.next_id += n
        for i in ids:
            self.refs[i] = 1
        return ids

    def drop(self, block: int) -> None:
        self.refs[block] -= 1
        if not self.refs[block]:
            del self.refs[block]


class FakeTable:
    """Blocks by reference, freed behind a window, and the prefix hashes of what has been computed."""

    def __init__(self, pool: FakePool, window: int | None) -> None:
        self.pool = pool
        self.window = window
        self.blocks: list[int | None] = []
        self.length = 0
        self.hashes: list[int] = []
        self.released = False
        pool.opened += 1

    def append(self, n_tokens: int, *, drafts: int = 0) -> None:
        assert not self.released
        assert 0 <= drafts <= n_tokens
        need = -(-(self.length + n_tokens) // self.pool.block_tokens) - len(self.blocks)
        self.blocks += self.pool.take(max(0, need))
        self.length += n_tokens

    def commit(self, n_tokens: int | None = None) -> None:
        n_tokens = self.length if n_tokens is None else n_tokens
        assert n_tokens == self.length == len(self.hashes), "commit what was computed, all of it"
        if self.window is not None:
            for at in range(max(0, n_tokens - self.window) // self.pool.block_tokens):
                if (block := self.blocks[at]) is not None:
                    self.pool.drop(block)
                    self.blocks[at] = None

    def truncate(self, n_tokens: int) -> None:
        self.length = n_tokens
        del self.hashes[n_tokens:]
        keep = -(-n_tokens // self.pool.block_tokens)
        for block in self.blocks[keep:]:
            if block is not None:
                self.pool.drop(block)
        del self.blocks[keep:]

    def fork(self) -> FakeTable:
        assert len(self.hashes) == self.length, "fork what is committed"
        partial = self.length % self.pool.block_tokens != 0
        tail = self.pool.take(1) if partial else []
        twin = type(self)(self.pool, self.window)
        shared = self.blocks[: len(self.blocks) - partial]
        for block in shared:
            if block is not None:
                self.pool.refs[block] += 1
        twin.blocks = shared + tail
        twin.length = self.length
        twin.hashes = list(self.hashes)
        return twin

    def release(self) -> None:
        if self.released:
            return
        self.released = True
        self.pool.opened -= 1
        for block in reversed(self.blocks):
            if block is not None:
                self.pool.drop(block)
        self.blocks = []

    def held_bytes(self) -> int:
        return BLOCK_BYTES * sum(block is not None for block in self.blocks)


class FlatTable(FakeTable):
    def held_bytes(self) -> int:
        return 0


class FakeRunner:
    """See the module. `n_blocks=None` is a pool without end."""

    def __init__(
        self,
        n_blocks: int | None = None,
        *,
        block_tokens: int = 4,
        vocab_size: int = 40,
        max_context_tokens: int = 1 << 20,
        chunked_prefill: bool = True,
        max_rows: int | None = None,
        window: int | None = None,
        fork: bool = True,
        sharpness: float = 2.0,
    ) -> None:
        self.pool = FakePool(n_blocks, block_tokens)
        self.vocab_size = vocab_size
        self.max_context_tokens = max_context_tokens
        self.chunked_prefill = chunked_prefill
        self.max_rows = max_rows
        self.window = window
        self.can_fork = fork
        self.device = "cpu"
        self.matrix = _matrix(vocab_size, sharpness)
        self.steps: list[list[tuple[int, int, int]]] = []  # (start, stop, logits) of every forward
        self.adapters: list[str | None] = []
        self.fail_at: int | None = None

    def open(self) -> FakeTable:
        table = FakeTable(self.pool, self.window)
        if not self.can_fork:
            table.fork = self._no_fork  # type: ignore[method-assign]
        return table

    def _no_fork(self) -> FakeTable:
        raise CapacityError("this runner does not fork")

    def fits(self, n_tokens: int) -> bool:
        if self.pool.n_blocks is None:
            return True
        if self.window is not None and self.chunked_prefill:
            n_tokens = min(n_tokens, self.window + 2 * self.pool.block_tokens)
        return -(-n_tokens // self.pool.block_tokens) <= self.pool.n_blocks

    def usage(self) -> Usage:
        total = self.pool.n_blocks or 0
        held = len(self.pool.refs) if total else 0
        return Usage(total * BLOCK_BYTES, held * BLOCK_BYTES, 0, (total - held) * BLOCK_BYTES)

    def forward(self, items: Sequence[Item], adapter: str | None = None) -> torch.Tensor:
        assert items
        assert self.max_rows is None or len(items) <= self.max_rows
        assert len({id(item.table) for item in items}) == len(items)
        if self.fail_at is not None and len(self.steps) >= self.fail_at:
            raise RuntimeError("the device caught fire")
        self.steps.append([(item.start, item.stop, item.logits) for item in items])
        self.adapters.append(adapter)
        rows: list[int] = []
        prefills = 0
        for item in items:
            table = item.table
            assert isinstance(table, FakeTable)
            hashes = table.hashes
            assert not table.released
            assert item.start == len(hashes), "an item continues what is cached"
            assert item.start < item.stop == table.length, "room was reserved, exactly"
            assert 0 <= item.logits <= item.stop - item.start
            assert hashes == prefix_hashes(item.tokens[: item.start])
            prefills += item.stop - item.start > 1
            if not self.chunked_prefill:
                assert item.start == 0 or item.stop - item.start == 1
                assert prefills <= 1, "whole prompts one at a time"
            at = hashes[-1] if hashes else 0
            for token in item.tokens[item.start : item.stop]:
                assert 0 <= token < self.vocab_size
                at = (at * 1_000_003 + token + 1) % MODULUS
                hashes.append(at)
            rows += [h % 4096 for h in hashes[item.stop - item.logits : item.stop]]
        return self.matrix[torch.tensor(rows, dtype=torch.int64)]

    def logits_after(self, tokens: Sequence[int]) -> torch.Tensor:
        """[vocab]: what the model says after these tokens, computed apart from any cache."""
        return self.matrix[prefix_hashes(tokens)[-1] % 4096]


class FlatRunner(FakeRunner):
    """Keeps nothing and recomputes everything, as `--kv none` does."""

    def usage(self) -> Usage:
        return Usage(0, 0, 0, 0)

    def open(self) -> FakeTable:
        return FlatTable(self.pool, self.window)


@cache
def _matrix(vocab_size: int, sharpness: float) -> torch.Tensor:
    """[4096, vocab_size] float32: one row of logits per residue of a prefix hash."""
    return sharpness * torch.randn(4096, vocab_size, generator=torch.Generator().manual_seed(7))


def prefix_hashes(tokens: Sequence[int]) -> list[int]:
    at, out = 0, []
    for token in tokens:
        at = (at * 1_000_003 + token + 1) % MODULUS
        out.append(at)
    return out


def by_hand(runner: FakeRunner, prompt: list[int], n: int) -> list[int]:
    """Greedy decoding without an engine, a cache or a batch."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(runner.logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s
