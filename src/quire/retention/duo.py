"""`duo`: retrieval heads keep every token, streaming heads the first ones and a window (DuoAttention).

Idea: only some heads look far back; the others read the first tokens and recent ones whatever the text is. Which are
which belongs to the model and is found out once, so that nothing is scored while it runs: what a query reads depends on
its position alone, streaming heads' blocks go back as they leave the window, during the prompt too, and prefixes are
shared as always.
Source: DuoAttention (Xiao et al., arXiv 2410.10819): for models with grouped queries half of the heads keep all, the
    others 64 sinks and 256 recent tokens.
Differs: heads are ranked by letting one go after the other (tools/find_heads.py, which has the paper's gates too). The
    sinks are read at their true distance, as in the paper, so positions end where the model's do.
Needs: a map of the model. The packaged model's travels with it; `map=FILE` is another's, made by tools/find_heads.py.
Cost: of full's bytes the share `retrieval`, and (S + W) tokens of each other head, rounded up to blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from quire.errors import ConfigError
from quire.retention.contract import check_number, check_tokens
from quire.retention.maps import Digest, find, read_heads
from quire.spec import Coord, Full, Sinks, Span, Window

TOOL = "tools/find_heads.py"


@dataclass(frozen=True)
class Policy:
    """Parameters `retrieval`: the share of heads that keep all; `sinks`, `window`: what others keep; `map`: a file."""

    retrieval: float = 0.5
    sinks: int = 64
    window: int = 256
    map: str = ""
    order: tuple[Coord, ...] = field(default=(), init=False, repr=False)
    """Every (layer, KV head) that reads everything by itself, those that need it most first; empty until bound."""
    name: ClassVar[str] = "duo"
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self.name, "retrieval", self.retrieval, 0, 1)
        check_tokens(self.name, "sinks", self.sinks, 0)
        check_tokens(self.name, "window", self.window, 1)

    def bound(self, digest: Digest) -> Policy:
        """With the map of the model whose weights have that digest. Raises ConfigError."""
        return self.ranked(find(self.name, TOOL, str(self.map), "duo.json", digest(), read_heads))

    def ranked(self, order: Sequence[Coord]) -> Policy:
        """With the heads in that order."""
        out = replace(self)
        object.__setattr__(out, "order", tuple(order))
        return out

    @property
    def retrieval_heads(self) -> frozenset[Coord]:
        """The heads that keep everything."""
        return frozenset(self.order[: round(self.retrieval * len(self.order))])

    def span(self, layer: int, head: int, inner: Span) -> Span:
        if type(inner) is not Full:
            return inner
        if (layer, head) not in self.order:
            raise ConfigError(
                f"{self.name}: the map says nothing of head {head} of layer {layer}; make one with {TOOL}"
            )
        if (layer, head) in self.retrieval_heads:
            return inner
        return Sinks(self.sinks, self.window) if self.sinks else Window(self.window)
