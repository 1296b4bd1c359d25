"""Output that must follow a grammar: what the sampler asks of whoever knows the grammar. No torch at import.

A `Constraint` belongs to a request, a `Matcher` to each of its samples. Before a draw the matcher is told the tokens
since the last one and says which may come next; all others become impossible. It is a function of the sample's output
tokens and of nothing else, so a preemption changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from quire.engine.request import Sample

__all__ = ["Constraint", "Matcher", "constrain_"]


class Matcher(Protocol):
    """How far one sample has come in its grammar."""

    @property
    def n_tokens(self) -> int:
        """Output tokens that it was told."""
        ...

    @property
    def error(self) -> str | None:
        """Why it cannot go on; None: it can."""
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """The next output tokens of the sample."""
        ...

    def allowed(self) -> np.ndarray:
        """[vocab] bool: which tokens may come next; an end-of-sequence token where the text may end."""
        ...


class Constraint(Protocol):
    """A compiled grammar."""

    def open(self) -> Matcher:
        """A matcher at the grammar's beginning."""
        ...


def constrain_(logits: Tensor, samples: Sequence[Sample]) -> None:
    """Make what the grammars forbid impossible, in place; where a grammar fails the row becomes NaN: its request ends.

    Args:
        logits: [R, V] float32, the rows of
        samples: [R], those with a constraint among them.

    Cost: O(V) per constrained row, on the host.
    """
    import torch

    for row, sample in enumerate(samples):
        constraint = sample.request.params.constraint
        if constraint is None:
            continue
        if sample.matcher is None:
            sample.matcher = constraint.open()
        matcher: Matcher = sample.matcher
        matcher.accept(sample.tokens[sample.prompt_tokens + matcher.n_tokens :])
        allowed = None if matcher.error else matcher.allowed()
        if allowed is None or matcher.error or not allowed.any():
            logits[row] = math.nan
            continue
        forbidden = torch.from_numpy(~allowed[: logits.shape[1]]).to(logits.device)
        logits[row, : len(forbidden)].masked_fill_(forbidden, -math.inf)
        logits[row, len(forbidden) :] = -math.inf
