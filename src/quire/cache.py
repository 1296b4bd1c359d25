"""The facade for people who have a transformers model and call its `generate()`.

with quire.attach(model, kv="bf16") as attached:
    out = model.generate(ids, max_new_tokens=200)          # uses the cache, nothing else changes
    cache = attached.cache()                               # or hold it yourself, across calls
    out = model.generate(ids, past_key_values=cache)
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from quire.errors import ConfigError
from quire.models.attach import Attachment, connect
from quire.models.hf_cache import KVCache
from quire.plan.choices import read_choices
from quire.retention import Keep
from quire.spec import DEFAULT_BLOCK_TOKENS, KVConfig

__all__ = ["Attachment", "KVCache", "attach"]


def attach(
    model: Any,
    kv: str = "auto",
    keep: str | Keep = "full",
    *,
    memory: int | float | str = 0.5,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    attention: str = "auto",
    way: str | None = None,
    weights: str = "plain",
    share: str = "off",
    config: str | PathLike[str] | None = None,
) -> Attachment:
    """Makes a causal transformers model keep its keys and values in Quire's blocks.

    `generate()` with left padding, sampling, beams, assisted decoding and streaming works as before. `detach()`, or
    the end of a `with` block, undoes the change. Cached forwards are inference: no gradient flows through them.

    Args:
        model: loaded, in eval mode, on its device.
        kv: codec recipe; `"auto"` stores the model's own dtype.
        keep: retention, as text or as `quire.retention.outside(press)`.
        memory: size of the arena: bytes, a share of free memory as a float, or text as `"8GiB"`.
        block_tokens: tokens per block.
        attention: backend, `"auto"`, `"cpu"` (the compiled kernels), `"torch"` or `"reference"`.
        way: forces packed, rows, patched or dense.
        share: "prefix": `generate()` begins with what earlier calls have computed and leaves what it computes. A cache
            that is handed in (`attached.cache()`) shares nothing, and neither does assisted decoding.
        config: a file of `quire tune`: its kv, keep and block_tokens, which are not given here then.
        weights: "plain" leaves the linear layers alone; others as for an engine, until `detach()`, after which what
            "int8" or "int4" rounded stays rounded.

    Raises:
        ConfigError: the model or the configuration cannot be served, with the reason.
        CapacityError: the memory is too small.
    """
    if config is not None:
        if (kv, keep, block_tokens) != ("auto", "full", DEFAULT_BLOCK_TOKENS):
            raise ConfigError(
                "config says kv, keep and block_tokens; give either the file or the choices"
            )
        kv, keep, block_tokens = read_choices(Path(config))
    chosen = KVConfig(kv, keep, block_tokens, share)
    bridge = connect(model, chosen, memory=memory, attention=attention, way=way, weights=weights)
    kind = None if bridge.sharing is None else bridge.worn.unknown()
    if kind is not None:
        bridge.close()
        raise ConfigError(
            f"share={share!r}: an adapter of type {kind} adds more than weights, and generate() does not say what; "
            "LoRA and its like share, or use share='off'"
        )
    return Attachment(bridge)
