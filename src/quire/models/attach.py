"""Joining a model to a cache: choose the way in, check that it agrees with the model's own attention, or refuse."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any, Self

import torch
from transformers.cache_utils import DynamicCache

from quire.codecs.recipe import parse_recipe
from quire.errors import ConfigError
from quire.models.adapters import Adapters, unwrap
from quire.models.bridge import WAYS, Bridge, make_backend
from quire.models.forward import NAME
from quire.models.hf_cache import KVCache
from quire.models.keep import bind
from quire.models.load import weights_digest
from quire.models.memory import arena_bytes
from quire.models.patches import Patches, cached_heads
from quire.models.prepack import check_weights
from quire.models.probe import (
    Shape,
    one_line,
    probe,
    restarts_scan,
    run_model,
    text_config,
)
from quire.models.rope import Regimes
from quire.models.runner import ModelRunner
from quire.models.sharing import open_sharing, shorten
from quire.plan.layout import KVLayer, Layout, build_layout, check_config
from quire.retention import Keep, parse_keep
from quire.share import parse_share
from quire.spec import Full, KVConfig
from quire.store.store import BlockStore

log = logging.getLogger("quire")

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
"""Largest difference of logits in the self-test, in their standard deviations; 0.2 for 16-bit models."""


@dataclass
class _Share:
    """An item of the self-test."""

    table: Any
    tokens: Sequence[int]
    start: int
    stop: int
    logits: int


def connect(
    model: Any,
    config: KVConfig,
    *,
    memory: int | float | str = 0.5,
    attention: str = "auto",
    way: str | None = None,
    weights: str = "plain",
    self_test: bool = True,
) -> Bridge:
    """Joins a causal transformers model to a new store.

    Args:
        model: loaded, on its device, in eval mode.
        config: codec and retention.
        memory: bytes, a share of free memory as a float in (0, 1], or text as `"8GiB"`.
        attention: backend, see `bridge.make_backend`.
        way: force one of `WAYS`; by default the first that the model passes.
        weights: what the linear layers read, one of `prepack.WEIGHTS`.
        self_test: compare with the model's own attention first, and step down or refuse on a difference.

    Raises:
        ConfigError: the model cannot be served, with the reason.
        CapacityError: the memory is too small.
    """
    check_weights(weights)
    adapters = Adapters(model)
    model = unwrap(model)
    check_choices(config, attention, way, torch.device(model.device).type)
    total_bytes = arena_bytes(memory, model.device)
    if getattr(text_config(model), "_attn_implementation", None) == NAME:
        raise ConfigError(
            "this model (or one that shares its config) is attached already; detach it first"
        )
    shape = probe(model)
    dtype = str(model.dtype).removeprefix("torch.")
    reasons: list[str] = []
    for candidate in [way] if way else _candidates(shape):
        patches = Patches(model)
        try:
            if not _enter(candidate, shape, patches):
                reasons.append(f"{candidate}: the model offers no such way")
                continue
            chunked = (
                _self_test(model, candidate, shape, patches, dtype, adapters) if self_test else True
            )
        except Exception as e:  # noqa: BLE001 - whatever a model's code raises under a way: not this way
            patches.undo()
            reasons.append(f"{candidate}: {one_line(e)}")
            continue
        try:
            keep = bind(parse_keep(config.keep), shape, partial(weights_digest, model))
            bit_map = parse_recipe(config.kv).map
            if bit_map is not None:
                bit_map.check_digest(partial(weights_digest, model))
            layout = _layout(model, shape, candidate, config, dtype, keep)
            layout = layout.bound(partial(weights_digest, model), model.device)
            store = BlockStore(layout.spec, total_bytes, device=str(model.device))
            bridge = Bridge(model, candidate, shape, layout, store, patches, adapters, attention)
        except BaseException:
            patches.undo()
            raise
        bridge.chunked_prefill = (
            chunked and Regimes(model).chunked_prefill and not restarts_scan(model)
        )
        try:
            bridge.find_turn()
            bridge.keep = keep
            bridge.rules(bridge.keep)
            bridge.sharing = open_sharing(bridge, config)
            bridge.audit = parse_share(config.share).audit
            bridge.prepack(weights)
        except BaseException:
            patches.undo()
            raise
        log.info(
            "%s: attached as %s%s",
            type(model).__name__,
            candidate,
            "" if bridge.chunked_prefill else ", whole prompts only",
        )
        for r in reasons:
            log.info("  not %s", r)
        return bridge
    raise ConfigError(f"{type(model).__name__} cannot be served: {'; '.join(reasons)}")


def check_choices(
    config: KVConfig, attention: str = "auto", way: str | None = None, device: str = "cpu"
) -> None:
    """Refuses what needs no model to be refused. Raises ConfigError."""
    if way is not None and way not in WAYS:
        raise ConfigError(f"unknown way {way!r}; known: {', '.join(WAYS)}")
    check_config(config)
    make_backend(attention, device)


def _candidates(shape: Shape) -> list[str]:
    return ["rows", "dense"] if shape.recurrent else ["packed", "patched", "dense"]


def _enter(way: str, shape: Shape, patches: Patches) -> bool:
    """Makes the changes that a way needs; False (and nothing changed) when the model does not offer it."""
    if way == "dense":
        return True
    if way == "patched":
        return patches.own_attention()
    only_state = all(k in ("state", "dummy") for k in shape.kinds)
    if only_state:
        return way == "rows"
    ok = patches.use_interface()
    if ok:
        patches.absorb_latents()
    else:
        patches.undo()
    return ok


def layout_of(bridge: Bridge, config: KVConfig) -> Layout:
    """The groups of a bridge's model under another configuration. Raises ConfigError."""
    check_config(config)
    return _layout(bridge.model, bridge.shape, bridge.way, config, bridge.layout.dtype)


def _layout(
    model: Any, shape: Shape, way: str, config: KVConfig, dtype: str, keep: Keep | None = None
) -> Layout:
    layers = shape.layers
    if way == "dense":
        layers = [
            KVLayer(x.layer, x.heads, x.fields, Full()) if isinstance(x, KVLayer) else x
            for x in layers
        ]
    elif way == "patched":
        heads = cached_heads(model)
        layers = [
            replace(x, heads=heads.get(x.layer, x.heads)) if isinstance(x, KVLayer) else x
            for x in layers
        ]
    return build_layout(layers, config, dtype=dtype, shared=shape.shared, keep=keep)


@torch.inference_mode()
def _self_test(
    model: Any, way: str, shape: Shape, patches: Patches, dtype: str, adapters: Adapters
) -> bool:
    """Two short requests in two chunks against the model's own attention and cache.

    Returns:
        Whether prompts may be computed in chunks.

    Raises:
        ConfigError: they differ, chunked and whole.
    """
    vocab = int(text_config(model).vocab_size)
    prompts = [
        [(7 * i + 3) % vocab for i in range(1, 12)],
        [(5 * i + 1) % vocab for i in range(1, 7)],
    ]
    patches_before = Patches(model)
    want = _own_logits(model, shape, prompts, patches)
    layout = _layout(model, shape, way, KVConfig(block_tokens=4), dtype)
    store = BlockStore(
        layout.spec,
        4 * sum(layout.spec.bytes_for(24) + 2 * g.block_bytes for g in layout.spec),
        device=str(model.device),
    )
    bridge = Bridge(model, way, shape, layout, store, patches_before, adapters)
    worst = {}
    for chunked in (True, False):
        runner = ModelRunner(bridge)
        bridge.chunked_prefill = runner.chunked_prefill = True
        got = _chunk_logits(runner, prompts, cuts=(5, 3) if chunked else (11, 6))
        worst[chunked] = max(
            float((a - b).abs().max() / b.std().clamp_min(1e-9))
            for a, b in zip(got, want, strict=True)
        )
        if worst[chunked] <= _TOLERANCE.get(model.dtype, 0.2):
            return chunked
        if not shape.recurrent:
            break
    raise ConfigError(
        f"differs from the model's own attention by {min(worst.values()):.2g} standard deviations of its logits"
    )


def _own_logits(
    model: Any, shape: Shape, prompts: list[list[int]], patches: Patches
) -> list[torch.Tensor]:
    """Logits at each prompt's last position and after one more token, by the model as it was."""
    out = []
    with patches.suspended():
        for p in prompts:
            cache = DynamicCache(config=text_config(model))
            ids = torch.tensor([p], device=model.device)
            extra = {"position_ids": torch.arange(len(p), device=model.device)[None]}
            first = run_model(model, ids, cache, shape.cache_name, shape.accepts, **extra)[
                0, -1
            ].float()
            extra = {"position_ids": torch.tensor([[len(p)]], device=model.device)}
            nxt = run_model(model, ids[:, :1], cache, shape.cache_name, shape.accepts, **extra)[
                0, -1
            ].float()
            out += [first, nxt]
    return out


def _chunk_logits(
    runner: ModelRunner, prompts: list[list[int]], cuts: tuple[int, int]
) -> list[torch.Tensor]:
    """The same through the runner: both prompts together, cut in two, then one more token each."""
    tables = [runner.open() for _ in prompts]
    tokens = [[*p, p[0]] for p in prompts]
    results: dict[tuple[int, int], torch.Tensor] = {}
    try:
        bounds = [(0, c, len(p), len(p) + 1) for c, p in zip(cuts, prompts, strict=True)]
        for k in range(3):
            items = []
            for i, b in enumerate(bounds):
                if b[k] < b[k + 1]:
                    tables[i].append(b[k + 1] - b[k])
                    items.append((i, _Share(tables[i], tokens[i], b[k], b[k + 1], 1)))
            if items:
                logits = runner.forward([x for _, x in items])
                for (i, x), row in zip(items, logits, strict=True):
                    results[i, x.stop] = row
                    x.table.commit()
    finally:
        for t in tables:
            t.release()
    return [results[i, n] for i, p in enumerate(prompts) for n in (len(p), len(p) + 1)]


class Attachment:
    """A model whose own `generate()` uses the cache. Made by `quire.attach`; undo with `detach()` or `with`."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        model = bridge.model
        self._original = model.__dict__.get("_prepare_cache_for_generation")
        object.__setattr__(
            model, "_prepare_cache_for_generation", MethodType(_prepare_for(bridge), model)
        )
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._running: list[tuple[KVCache, int]] = []

    @property
    def way(self) -> str:
        """packed, rows, patched or dense. In `generate()` the model's batch stays as it is; the way names the hook."""
        return self.bridge.way

    def cache(self) -> KVCache:
        """An empty cache, to be passed as `past_key_values`; `generate()` makes one by itself."""
        return self.bridge.cache()

    def load(self, folder: str | os.PathLike[str]) -> KVCache:
        """A cache that `KVCache.save` wrote. Raises ConfigError, TierError, CapacityError."""
        return KVCache.load(self.bridge, folder)

    def detach(self) -> None:
        """Gives the model its own attention and cache back. Idempotent."""
        for h in self._hooks:
            h.remove()
        self._hooks = []
        model = self.bridge.model
        if "_prepare_cache_for_generation" in model.__dict__:
            if self._original is None:
                object.__delattr__(model, "_prepare_cache_for_generation")
            else:
                object.__setattr__(model, "_prepare_cache_for_generation", self._original)
        self.bridge.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kwargs.get(self.bridge.shape.cache_name)
        if (
            not isinstance(cache, KVCache)
            or cache.driven
            or cache._token is not None
            or cache is not _own(cache, self.bridge)
        ):
            return None
        ids = (
            kwargs.get("input_ids")
            if kwargs.get("input_ids") is not None
            else (args[0] if args else None)
        )
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is None:
            return None
        changed = None
        if cache.shares and kwargs.get("input_ids") is not None:
            kwargs = changed = shorten(cache, kwargs)
            ids = kwargs["input_ids"]
        cache.begin(
            ids.shape[0],
            ids.shape[1],
            kwargs.get("attention_mask"),
            kwargs.get("position_ids"),
            ids if ids.ndim == 2 else None,
        )
        self._running.append((cache, ids.shape[1]))
        return None if changed is None else (args, changed)

    def _after(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if (
            not self._running
            or kwargs.get(self.bridge.shape.cache_name) is not self._running[-1][0]
        ):
            return
        cache, queries = self._running.pop()
        if output is None:
            cache.rollback()
        else:
            cache.end(queries)


def _own(cache: KVCache, bridge: Bridge) -> KVCache | None:
    """The cache, when it belongs to this attachment and not to the engine's runner."""
    return cache if cache.bridge is bridge else None


def _prepare_for(bridge: Bridge) -> Any:
    """Replaces `_prepare_cache_for_generation`: makes one of our caches unless told otherwise."""
    original = type(bridge.model)._prepare_cache_for_generation

    def prepare(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch: int,
        length: int,
    ) -> Any:
        name = bridge.shape.cache_name
        if model_kwargs.get(name) is not None or generation_config.use_cache is False:
            return original(self, generation_config, model_kwargs, generation_mode, batch, length)
        if generation_config.cache_implementation is not None:
            raise ConfigError(
                f"cache_implementation={generation_config.cache_implementation!r} does not go with an attached model; "
                "drop it, or detach() first"
            )
        cache = bridge.cache()
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        if bridge.sharing is not None and not cache.recording:
            cache.wear(bridge.worn)
        model_kwargs[name] = cache
        return None

    return prepare
