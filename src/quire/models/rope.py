"""RoPE whose frequencies depend on how long a forward is: which sequences may share one.

transformers chooses LongRoPE's factors and dynamic NTK's base by the largest position of the whole forward, so one long
request would change short ones beside it (HF: modeling_rope_utils, `dynamic_rope_update`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


def regimes(model: Any) -> Callable[[int], Hashable]:
    """A function from a sequence's end to its regime; only equal regimes may be packed together."""
    config = model.config.get_text_config(decoder=True)
    found = [_kind(p) for p in _parameters(config)]
    limit = min((lim for kind, lim in found if kind == "longrope" and lim), default=None)
    dynamic = min((lim for kind, lim in found if kind == "dynamic" and lim), default=None)
    limit = limit or (_original(config) if any(k == "longrope" for k, _ in found) else None)
    dynamic = dynamic or (getattr(config, "max_position_embeddings", None) if any(k == "dynamic" for k, _ in found) else None)
    if dynamic:
        return lambda stop: ("dynamic", stop if stop > dynamic else 0)
    if limit:
        return lambda stop: ("longrope", stop > limit)
    return lambda stop: None


def _original(config: Any) -> int | None:
    return getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", None)


def _parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameter sets of a config: one, or one per layer type."""
    p = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(p, dict):
        return []
    nested = [v for v in p.values() if isinstance(v, dict)]
    return nested or [p]


def _kind(p: dict[str, Any]) -> tuple[str, int | None]:
    kind = p.get("rope_type") or p.get("type") or "default"
    return str(kind), p.get("original_max_position_embeddings")
