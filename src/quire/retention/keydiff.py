"""`keydiff`: tokens whose keys differ most from the mean key.

Idea: keys that look like all others are interchangeable; distinct ones are what attention picks out. Needs no attention
and no queries.
Source: KeyDiff (Park et al., arXiv 2504.15364): minus the cosine of a key and the mean of the unit keys.
Cost: one pass over the keys when tokens are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.retention.contract import Scored, Seen

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters."""

    name: ClassVar[str] = "keydiff"
    agnostic: ClassVar[bool] = True

    def score(self, seen: Seen) -> torch.Tensor:
        import torch

        k = torch.nn.functional.normalize(seen.read("k"), dim=-1)
        return -torch.nn.functional.cosine_similarity(k, k.mean(-2, keepdim=True), dim=-1)
