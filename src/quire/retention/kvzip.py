"""`kvzip`: tokens that the model looks at when it reads the context once more, whatever will be asked later.

Idea: a model that is to repeat its context must attend to what it needs to reconstruct it; what nobody looks at then
    can go. So the prompt is read a second time behind itself, `repeats` tokens at a time, and a token is worth the most
    that any of these queries paid to it. No question takes part, so any may follow.
Source: KVzip (Kim et al., arXiv 2505.23416): the maximum over the queries of the repetition and the query heads of a KV
    head; the best of all layers and heads together.
Differs: no words stand between context and repetition ("Repeat the previous context:"), which a model without
    instructions would not follow; as in the paper the last 8 tokens of the piece before lead a later piece in. The
    softmax is over the whole cache, not over the piece's own part of it. What is generated is repeated as well, before
    tokens go again. `uniform=true`: every head keeps equally many, which one latent for all heads (MLA) needs.
Cost: the prompt's prefill a second time, over the full cache, and blocks for one piece until it is over; one number per
    token and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from quire.errors import ConfigError
from quire.retention.contract import Scored, Seen, check_tokens, share_out
from quire.spec import Coord

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters, `repeats`: tokens read once more at a time, and `uniform`: all heads keep equally many."""

    repeats: int = 2048
    uniform: bool = False
    name: ClassVar[str] = "kvzip"
    agnostic: ClassVar[bool] = True
    over: ClassVar[Literal["sum", "max"]] = "max"
    fold: ClassVar[Literal["mean", "max"]] = "max"
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(self.name, "repeats", self.repeats, 1)
        if not isinstance(self.uniform, bool):
            raise ConfigError(f"{self.name}: uniform={self.uniform} must be true or false")
        object.__setattr__(self, "by_head", not self.uniform)

    def score(self, seen: Seen) -> torch.Tensor:
        assert seen.mass is not None
        return seen.mass

    def allocate(
        self, scores: Mapping[Coord, torch.Tensor], tokens: int, length: int
    ) -> dict[Coord, int]:
        if self.uniform:
            return super().allocate(scores, tokens, length)
        return share_out(scores, tokens)
