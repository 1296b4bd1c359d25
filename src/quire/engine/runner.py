"""What the engine asks of a model with a cache, and nothing else: three small protocols and one record.

One sequence's tokens, and what an `Item` says about them:

    0            start                stop           len(tokens)
    |-- cached --|-- computed now ----|-- not yet ---|
                           [- logits -]               the trailing `logits` positions of [start, stop) are read

The real runner drives a Hugging Face model over a block pool; `--kv none` is another one, which recomputes
`tokens[0:stop]` and holds no bytes; a test's fake and a simulator's cost model are two more. Never assume that a table
holds bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quire.spec import Usage

if TYPE_CHECKING:
    import torch

__all__ = ["Item", "Room", "Runner", "Table", "Usage"]


class Table(Protocol):
    """One sequence's cache. Reserve with `append`, compute, then `commit`."""

    @property
    def length(self) -> int:
        """Logical tokens held, reserved or computed."""
        ...

    def append(self, n_tokens: int, *, drafts: int = 0) -> None:
        """Reserve room for `n_tokens` more in every group, the last `drafts` of them unproven.

        Raises:
            CapacityError: no room; the table is unchanged.
        """
        ...

    def commit(self, n_tokens: int | None = None) -> object:
        """Tokens [0, n_tokens) (default: all) are final; what no later query needs is freed."""
        ...

    def truncate(self, n_tokens: int) -> None:
        """Keep tokens [0, n_tokens) only: how rejected drafts leave."""
        ...

    def fork(self) -> Table:
        """A second table over the same tokens: full blocks are shared, the last partial one is copied.

        Raises:
            CapacityError: no room for the copy, or this runner cannot fork; nothing has changed.
        """
        ...

    def release(self) -> None:
        """Give every reference back. Idempotent."""
        ...

    def held_bytes(self) -> int:
        """Bytes of the blocks that this table references, each counted once. Asked every step: keep it O(groups)."""
        ...


@dataclass(slots=True)
class Item:
    """One sequence's share in a forward.

    Args:
        table: its cache, with room for [0, stop) reserved.
        tokens: all tokens of the sequence so far, prompt and output (and drafts); a live list, not to be kept.
        start: first position computed now; [0, start) is cached.
        stop: end of what is computed now, half-open.
        logits: how many trailing positions of [start, stop) want logits: 0 for an unfinished chunk of a prompt, usually
            1, more for log-probabilities of a prompt or for drafts.
    """

    table: Table
    tokens: Sequence[int]
    start: int
    stop: int
    logits: int


class Room(Protocol):
    """The part of a runner that the scheduler sees: where sequences live, without a tensor."""

    @property
    def max_context_tokens(self) -> int:
        """The longest sequence the model can attend to, prompt and output together."""
        ...

    @property
    def chunked_prefill(self) -> bool:
        """False: everything before the next token must be computed in one item (Mamba-1 kinds)."""
        ...

    @property
    def max_rows(self) -> int | None:
        """Most sequences in one forward; None: no limit."""
        ...

    def open(self) -> Table:
        """A table for a new sequence. Tokens it already holds (`length`) count as cached and are not computed."""
        ...

    def fits(self, n_tokens: int) -> bool:
        """Could ONE sequence of that many cached tokens ever fit an otherwise empty pool? Monotone."""
        ...

    def usage(self) -> Usage:
        """Bytes of the pool; all zero for a runner that keeps nothing."""
        ...


class Runner(Room, Protocol):
    """A model with a cache."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        ...

    @property
    def device(self) -> torch.device | str:
        """Where the logits are."""
        ...

    # A runner with adapters also has `check_adapter(name)`, which raises RequestError for one that the model lacks: a
    # wrong name is refused at the door, and not in a forward, where it would end everybody's requests.

    def forward(self, items: Sequence[Item], adapter: str | None = None) -> torch.Tensor:
        """Compute every item's [start, stop) and write it to its table.

        Returns:
            [sum(item.logits), vocab_size] float32: the wanted positions, in the order of the items.
        """
        ...
