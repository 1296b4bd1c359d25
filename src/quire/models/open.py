"""From a loaded model to something the engine can run."""

from __future__ import annotations

from typing import Any

from quire.errors import ConfigError
from quire.models.attach import connect
from quire.models.prepack import prepack
from quire.models.runner import ModelRunner, NoCacheRunner
from quire.spec import DEFAULT_BLOCK_TOKENS, KVConfig
from quire.store.share import parse_share


def open_runner(
    model: Any,
    *,
    kv: str = "auto",
    keep: str = "full",
    memory: int | float | str = 0.5,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    attention: str = "auto",
    way: str | None = None,
    weights: str = "auto",
    share: str = "off",
) -> ModelRunner | NoCacheRunner:
    """A runner over a new store, or over none at all for `kv="none"`.

    Args:
        model: a loaded causal transformers model in eval mode.
        kv, keep: string forms, see `KVConfig`.
        memory: of the arena: bytes, a share of free memory, or text as `"8GiB"`.
        attention: backend; way: forces a way into the model.
        weights: "plain", "prepacked", "int8" or "auto": what the linear layers read, see `quire.models.prepack`.
        share: "off", or "prefix": requests find what others computed before them, see `quire.store.sharing`.

    Raises:
        ConfigError, CapacityError: see `connect` and `prepack`.
    """
    if kv == "none":
        if parse_share(share).on:
            raise ConfigError(
                f"share={share!r} finds cached prefixes and kv='none' caches nothing; drop one of them"
            )
        plain = NoCacheRunner(model)
        plain.weights = prepack(plain.model, weights)
        return plain
    config = KVConfig(kv, keep, block_tokens, share)
    bridge = connect(model, config, memory=memory, attention=attention, way=way, weights=weights)
    return ModelRunner(bridge)
