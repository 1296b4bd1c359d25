"""`expected`: the attention that queries to come are expected to pay, times the length of the value.

Idea: a head's queries, before RoPE, are roughly normal. With their mean m and covariance S, turned on to the positions
that come next, exp(k.m + k.S.k / 2) is what a key will be paid on average, before it is divided by the sum. No query
has to have asked yet, so that the question may come later.
Source: Expected Attention (Devoto et al., arXiv 2510.00636): softmax of that, averaged over the query heads of a KV
    head, times the value's norm; the mean RoPE of the next 512 positions.
Differs: statistics of the last 128 queries, turned back by their positions, instead of all of the prompt's hidden
    states: they are what attention was given, so query norms and biases are in them, and any model whose RoPE can be
    turned is served. The model's own scale instead of the head's width. A softcap is not applied. MLA: the norm of the
    latent.
Cost: 128 queries per layer are kept; a matrix of D x D per query head, and one pass over keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.retention.contract import Scored, Seen, check_tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters, and `ahead`: over how many positions to come RoPE is averaged."""

    ahead: int = 512
    name: ClassVar[str] = "expected"
    agnostic: ClassVar[bool] = True
    last_queries: ClassVar[int] = 128
    turns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(self.name, "ahead", self.ahead, 1)

    def score(self, seen: Seen) -> torch.Tensor:
        import torch

        mean, spread = self._statistics(seen)
        k, v = seen.read("k"), seen.read("v")
        share = len(mean) // len(k)
        k = k.repeat_interleave(share, 0)
        logits = seen.scale * torch.einsum("hnd,hd->hn", k, mean)
        logits += seen.scale**2 / 2 * torch.einsum("hnd,hde,hne->hn", k, spread, k)
        sinks = (seen.positions < self.sinks).repeat_interleave(share, 0)
        logits = logits.masked_fill(sinks, float("-inf"))
        paid = torch.nan_to_num(logits.softmax(-1)).unflatten(0, (-1, share)).mean(1)
        worth: torch.Tensor = paid * v.norm(dim=-1)
        return worth

    def _statistics(self, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `[H_q, D]` and covariance `[H_q, D, D]` of the queries as they will be on average."""
        import torch

        q, at = seen.queries, seen.query_positions
        assert q is not None
        assert at is not None
        assert seen.turn is not None
        if int(at[-1]) >= self.sinks:  # the first queries are unlike all others
            q, at = q[:, at >= self.sinks], at[at >= self.sinks]
        plain = seen.turn(q, -at)
        mean = plain.mean(1)
        spread = plain - mean.unsqueeze(1)
        basis = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).unsqueeze(1)
        to_come = torch.arange(seen.length, seen.length + self.ahead, device=q.device)
        on = seen.turn(basis, to_come).mean(1)  # [D, D], row vectors times it are turned
        spread = spread @ on
        return mean @ on, spread.transpose(1, 2) @ spread / q.shape[1]
