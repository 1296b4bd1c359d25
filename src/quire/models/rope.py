"""RoPE whose frequencies depend on how long a forward is: which sequences may share one, and what must be done anew.

transformers chooses LongRoPE's factors and dynamic NTK's base by the largest position of the whole forward
(`modeling_rope_utils.dynamic_rope_update`), so one long request would change short ones beside it.

    longrope   two regimes, up to the original context and beyond it; a sequence that crosses over is computed anew,
               since its earlier keys were turned by the other factors
    dynamic    beyond the original context every length has its own base: such a sequence runs alone, its prompt whole
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


class Regimes:
    """The RoPE regimes of one model."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        found = _parameters(config)
        self.kind = next(
            (k for k in ("dynamic", "longrope") if any(_kind(p) == k for p in found)), "fixed"
        )
        limits = [p.get("original_max_position_embeddings") for p in found if _kind(p) == self.kind]
        named = (
            getattr(config, "original_max_position_embeddings", None)
            if self.kind == "longrope"
            else None
        )
        known = [int(x) for x in (*limits, named) if x]
        self.limit = (
            min(known) if known else int(getattr(config, "max_position_embeddings", 0) or 0)
        )
        factors = [float(p.get("factor") or 1.0) for p in found if self.kind == "dynamic"]
        self.stretch = max(factors, default=1.0)
        """How far beyond `max_position_embeddings` the context reaches."""
        self._modules = [
            m
            for m in model.modules()
            if hasattr(m, "max_seq_len_cached") and hasattr(m, "original_max_seq_len")
        ]

    @property
    def chunked_prefill(self) -> bool:
        """Whether a prompt cut in chunks gets the keys that it gets as a whole."""
        return self.kind != "dynamic"

    def of(self, stop: int) -> Hashable:
        """The regime of a sequence that ends at `stop`; only equal ones may share a forward."""
        if self.kind == "fixed" or stop <= self.limit:
            return "short"
        return "long" if self.kind == "longrope" else stop

    @property
    def restart_tokens(self) -> int | None:
        """A sequence that grows past so many tokens must be computed anew; None where none must."""
        return self.limit if self.kind == "longrope" else None

    def crosses(self, start: int, stop: int) -> bool:
        """Whether [start, stop) leads into another regime, so that [0, start) must be computed anew."""
        return self.restart_tokens is not None and 0 < start <= self.restart_tokens < stop

    def reset(self) -> None:
        """Dynamic NTK remembers the longest forward in the module; forget it, so that history does not matter."""
        if self.kind != "dynamic":
            return
        for m in self._modules:
            if m.max_seq_len_cached != m.original_max_seq_len:
                m.max_seq_len_cached = m.original_max_seq_len
                with torch.no_grad():
                    m.register_buffer(
                        "inv_freq",
                        m.original_inv_freq.to(m.inv_freq.device).clone(),
                        persistent=False,
                    )


def _parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameter sets of a config: one, or one per layer type."""
    p = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(p, dict):
        return []
    nested = [v for v in p.values() if isinstance(v, dict)]
    return nested or [p]


def _kind(p: dict[str, Any]) -> str:
    return str(p.get("rope_type") or p.get("type") or "default")
