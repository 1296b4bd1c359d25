"""`lagkv`: tokens whose keys and values stand out from those that came next.

Idea: scaled by the range that each channel takes in the following chunk, a token's key is even where the future says
the same again, and uneven where it does not. Needs no attention and no queries.
Source: LagKV (Liang et al., arXiv 2504.04704): standard deviation over channels of keys and of values, each min-max
    scaled by the next chunk, a softmax within the chunk, their sum; then ranks within the chunk.
Differs: the paper keeps the last chunks whole for want of a next one. Here a chunk is scaled by the next `lag` tokens,
    which near the end are fewer, the protected window at least; so a small budget is not spent on recent tokens alone.
Cost: one pass over keys and values when tokens are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.retention.contract import Scored, Seen, check_tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters, and `lag`: tokens of a chunk."""

    lag: int = 128
    name: ClassVar[str] = "lagkv"
    agnostic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(self.name, "lag", self.lag, 1)

    def score(self, seen: Seen) -> torch.Tensor:
        k, v = seen.read("k"), seen.read("v")
        n = k.shape[1]
        out = k.new_ones(k.shape[:2])  # sinks, and what no window follows
        last = n - self.window
        for start in range(self.sinks, last, self.lag):
            stop = min(start + self.lag, last)
            parts = [(x[:, start:stop], x[:, stop : stop + self.lag]) for x in (k, v)]
            both = _stands_out(*parts[0]) + _stands_out(*parts[1])
            ranks = both.argsort(dim=-1, stable=True).argsort(-1).to(k.dtype)
            out[:, start:stop] = ranks / (stop - start)
        return out


def _stands_out(x: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """`[H, n, D]` and `[H, m, D]` to `[H, n]`, which sum to one."""
    low, high = following.amin(1, keepdim=True), following.amax(1, keepdim=True)
    scaled = (x - low) / (high - low).clamp_min(1e-6)
    return scaled.std(-1, correction=0).softmax(-1)
