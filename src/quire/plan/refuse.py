"""What cannot fit, said before anything is loaded: how much is missing, and what would work instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from quire.errors import CapacityError, ConfigError
from quire.plan.fit import MEASURED_KL
from quire.plan.layout import build_layout
from quire.plan.shape import ModelShape
from quire.spec import CacheSpec, KVConfig
from quire.store import BlockStore


def check_cache(
    shape: ModelShape,
    config: KVConfig,
    n_tokens: int,
    total_bytes: int,
    *,
    where: str = "",
    memory: str = "the memory",
) -> None:
    """Refuses a request that would not fit an otherwise empty cache.

    Args:
        shape: what the model keeps.
        config: how.
        n_tokens: that the request will put into the cache.
        total_bytes: of the arena.
        where, memory: what names the request and the memory in the message.

    Raises:
        CapacityError: it does not fit; how many tokens would, and which codec loses least of those that do.
        ConfigError: the codec cannot serve this model.
    """
    spec = _spec(shape, config)
    store = BlockStore(spec, total_bytes)
    if store.fits(n_tokens):
        return
    raise CapacityError(
        f"{where}{n_tokens} tokens need {spec.bytes_for(n_tokens):,} bytes of cache and {memory} gives "
        f"{store.arena.total_bytes:,}; give more, {_fewer(store, n_tokens)}"
        f"{_smaller(shape, config, n_tokens, total_bytes)}",
        needed_bytes=spec.bytes_for(n_tokens),
        free_bytes=store.arena.total_bytes,
    )


def check_weights_fit(name: str, weight_bytes: int, free_bytes: int, device: str) -> None:
    """Refuses weights that are larger than what the device could give. Raises CapacityError."""
    if weight_bytes > free_bytes:
        raise CapacityError(
            f"{name}: its weights take {weight_bytes:,} bytes and {device} has {free_bytes:,} free; a smaller model or "
            "dtype, or more memory, would work",
            needed_bytes=weight_bytes,
            free_bytes=free_bytes,
        )


def _spec(shape: ModelShape, config: KVConfig) -> CacheSpec:
    return build_layout(shape.layers, config, dtype=shape.dtype, shared=shape.shared).spec


def _fewer(store: BlockStore, n_tokens: int) -> str:
    most = _most(store.fits, n_tokens)
    return f"ask for at most {most} tokens" if most else "for not one token fits"


def _most(fits: Callable[[int], bool], too_many: int) -> int:
    low, high = 0, too_many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _smaller(shape: ModelShape, config: KVConfig, n_tokens: int, total_bytes: int) -> str:
    """The codec of least measured loss under which it would fit."""
    for kv in sorted(MEASURED_KL, key=lambda k: MEASURED_KL[k]):
        try:
            store = BlockStore(_spec(shape, replace(config, kv=kv)), total_bytes)
        except (ConfigError, CapacityError):
            continue
        if store.fits(n_tokens):
            return f", or choose a smaller codec: --kv {kv} would fit"
    return ", or choose a smaller model"
