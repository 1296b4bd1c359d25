"""`random`: protected tokens, and of the others a random choice. A baseline.

Idea: what any policy that claims to know which tokens matter must beat at equal bytes.
Differs: the choice is a function of position, layer, head and seed alone, so that a request that is computed anew keeps
    the same tokens.
Cost: nothing is observed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quire.retention.contract import Scored, Seen

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters, and `seed`."""

    seed: int = 0
    name: ClassVar[str] = "random"
    agnostic: ClassVar[bool] = True

    def score(self, seen: Seen) -> torch.Tensor:
        import torch

        salt = torch.tensor(
            [hash((self.seed, layer, head)) & 0x7FFFFFFF for layer, head in seen.coords],
            device=seen.positions.device,
        )
        x = (seen.positions + 1) * 2654435761 + salt[:, None] * 40503 + 12345
        for shift, factor in (
            (15, 0x2C1B3C6D),
            (12, 0x297A2D39),
            (15, 1),
        ):  # an integer hash of 32 bits
            x = (((x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
        return x.double() / 2**32
