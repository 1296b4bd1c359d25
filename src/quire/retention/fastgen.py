"""`fastgen`: each head keeps what it uses: sinks and a window, heavy hitters beside them, or everything.

Idea: heads differ in kind. For each, the cheapest of three ways is taken that holds a share `recover` of all attention
that it has paid so far; a head that spreads its attention keeps every token.
Source: FastGen (Ge et al., arXiv 2310.01801), algorithm 1, without the ways for punctuation (which needs the text)
    and for special tokens alone; `recover` is its T, the budget with the protected tokens its r_f + r_l.
Differs: the paper looks at the prompt once; here every time that tokens go, at what remains. Sinks stand for its
    special tokens. `budget` is what a head of the second kind keeps; those of the third keep more: it bounds nothing.
Cost: one number per token, layer and head; prefill reads the keys once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quire.retention.contract import Budget, Scored, Seen, check_number
from quire.spec import Coord

if TYPE_CHECKING:
    import torch

_BUDGET = Budget(share=0.3)


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters, and `recover`: the share of a head's attention that must remain."""

    budget: Any = _BUDGET
    recover: float = 0.95
    name: ClassVar[str] = "fastgen"
    queries: ClassVar[int | Literal["all"] | None] = "all"
    by_head: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "recover", self.recover, 0, 1)

    def score(self, seen: Seen) -> torch.Tensor:
        """Shares of a head's attention."""
        assert seen.mass is not None
        return seen.mass / seen.mass.sum(-1, keepdim=True).clamp_min(1e-30)

    def allocate(
        self, scores: Mapping[Coord, torch.Tensor], tokens: int, length: int
    ) -> dict[Coord, int]:
        may_go = 1 - self.recover
        out = {}
        for coord, share in scores.items():
            n = min(tokens, len(share))
            kept = share.topk(n).values.sum()
            lost = float(share.sum()), float(share.sum() - kept)
            out[coord] = 0 if lost[0] <= may_go else n if lost[1] <= may_go else len(share)
        return out
