"""From a loaded model to something the engine can run."""

from __future__ import annotations

from typing import Any

from quire.errors import ConfigError
from quire.models.attach import connect
from quire.models.compiled import check_compile, compile_runner
from quire.models.load import full_digest
from quire.models.prepack import prepack
from quire.models.runner import ModelRunner, NoCacheRunner
from quire.retention import Keep, parse_keep
from quire.share import parse_share
from quire.spec import DEFAULT_BLOCK_TOKENS, KVConfig
from quire.store.tiers.recipe import TiersConfig, parse_tiers


def open_runner(
    model: Any,
    *,
    kv: str = "auto",
    keep: str | Keep = "full",
    memory: int | float | str = 0.5,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    attention: str = "auto",
    way: str | None = None,
    weights: str = "auto",
    share: str = "off",
    tiers: str | TiersConfig = "",
    compile: bool = False,  # noqa: A002 - torch's own name for it
) -> ModelRunner | NoCacheRunner:
    """A runner over a new store, or over none at all for `kv="none"`.

    Args:
        model: a loaded causal transformers model in eval mode.
        kv, keep: string forms, see `KVConfig`; keep may be a `quire.retention.outside(press)`.
        memory: of the arena: bytes, a share of free memory, or text as `"8GiB"`.
        attention: backend; way: forces a way into the model.
        weights: what the linear layers read: "plain", "prepacked", "int8", "int4" or "auto", see `models.prepack`.
        share: "off", or "prefix": requests find what others computed before them, see `quire.store.sharing`.
        tiers: memory below the cache's, as `"host:8GiB,disk:100GiB@/var/cache/quire"`, or as `parse_tiers` read it;
            needs share="prefix", but for `"host:8GiB;swap=auto"`, which only takes preempted requests.
        compile: decode steps run as code that torch.compile made, see `quire.models.compiled`.

    Raises:
        ConfigError, CapacityError: see `connect`, `prepack` and `compile_runner`.
    """
    if compile:
        check_compile()
    below = parse_tiers(tiers) if isinstance(tiers, str) else tiers
    if below.on and not below.live and not parse_share(share).on:
        raise ConfigError(
            f"tiers={below.text!r} keep blocks that are found by their prefix, and share={share!r} names none; "
            "add share='prefix'"
        )
    if kv == "none":
        if below.on:
            raise ConfigError(
                f"tiers={below.text!r} keep cached blocks and kv='none' caches nothing; drop one of them"
            )
        if parse_share(share).on:
            raise ConfigError(
                f"share={share!r} finds cached prefixes and kv='none' caches nothing; drop one of them"
            )
        if not parse_keep(keep).full:
            raise ConfigError(
                f"keep={keep!r} chooses among cached tokens and kv='none' caches none; drop one of them"
            )
        if compile:
            raise ConfigError("compile is for decode steps over a cache, and kv='none' has none")
        plain = NoCacheRunner(model)
        plain.weights = prepack(plain.model, weights)
        return plain
    config = KVConfig(kv, keep, block_tokens, share)
    whole = full_digest(model.named_parameters()) if below.on else b""  # before they are packed
    bridge = connect(model, config, memory=memory, attention=attention, way=way, weights=weights)
    runner = ModelRunner(bridge)
    try:
        if compile:
            compile_runner(runner)
        if below.on:
            runner.open_tiers(below, whole + weights.encode())
    except BaseException:
        runner.close()
        raise
    return runner
