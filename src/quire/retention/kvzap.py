"""`kvzap`: what `kvzip` would say of a token, guessed from its hidden state when it comes.

Idea: whether a repetition of the context would look at a token can be read off the token itself, well enough. A small
    linear map per layer, fitted to `kvzip`'s scores, costs next to nothing, and speaks of generated tokens too.
Source: KVzap (arXiv 2601.07891): a linear map from the state that enters a layer's attention to the logarithm of each
    KV head's score.
Differs: the paper fits KVzip+, whose scores are weighted by the values' size, and drops what lies below a threshold;
    here plain KVzip's are fitted, and the best of all layers and heads stay within a budget. `uniform=true`: every head
    keeps equally many.
Needs: a map of the model. The packaged model's travels with it; `map=FILE` is another's, made by tools/fit_kvzap.py.
Cost: a product of width x H_kv per token and layer; a found prefix brings no hidden states, so none is looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quire.errors import ConfigError
from quire.retention.contract import Scored, Seen, share_out
from quire.retention.maps import Digest, find
from quire.spec import Coord

if TYPE_CHECKING:
    import torch

Maps = dict[int, "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class Policy(Scored):
    """`Scored`'s parameters, `map`: a file, and `uniform`: all heads keep equally many."""

    map: str = ""
    uniform: bool = False
    maps: Maps = field(default_factory=dict, init=False, repr=False, compare=False)
    """Layer to weight `[H_kv, width]` and bias `[H_kv]`, float32; empty until it is `bound` to a model."""
    name: ClassVar[str] = "kvzap"
    agnostic: ClassVar[bool] = True
    notes: ClassVar[bool] = True
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.uniform, bool):
            raise ConfigError(f"{self.name}: uniform={self.uniform} must be true or false")
        object.__setattr__(self, "by_head", not self.uniform)

    def bound(self, digest: Digest) -> Policy:
        found = find(
            self.name, "tools/fit_kvzap.py", str(self.map), "kvzap.safetensors", digest(), _read
        )
        out = replace(self)
        object.__setattr__(out, "maps", found)
        return out

    def note(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = (x.to(hidden.device) for x in self.maps[layer])
        return hidden.float() @ weight.T + bias

    def score(self, seen: Seen) -> torch.Tensor:
        assert seen.notes is not None
        return seen.notes

    def allocate(
        self, scores: Mapping[Coord, torch.Tensor], tokens: int, length: int
    ) -> dict[Coord, int]:
        if self.uniform:
            return super().allocate(scores, tokens, length)
        return share_out(scores, tokens)


def _read(path: Path) -> tuple[str, Maps]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, Any] = {}
    try:
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {})["digest"]
            for name in file.keys():  # noqa: SIM118 - a file, not a mapping
                found[name] = file.get_tensor(name).float()
    except SafetensorError as e:
        raise ValueError(str(e)) from e
    layers = {int(name.partition(".")[0]) for name in found}
    return digest, {n: (found[f"{n}.weight"], found[f"{n}.bias"]) for n in layers}
