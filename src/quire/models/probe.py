"""What a model keeps per token and per sequence, found by running it once on two tokens and reading its config.

Shapes come from what the model really hands to a cache; spans come from transformers' own reading of the config, so a
new architecture needs no table here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

from quire.errors import ConfigError, QuireError
from quire.plan.layout import KVLayer, StateLayer
from quire.spec import Chunked, Field, Full, Span, Window

ATTENTION, STATE, HYBRID, NOTHING = "attention", "state", "hybrid", "dummy"


@dataclass
class Shape:
    """What a probe found.

    kinds: per layer, "attention", "state", "hybrid" (both) or "dummy"; layers: what stores something, by form;
    states: per recurrent layer the (kind, index) of each stored state tensor, in field order; shared: layers that read
    another's keys and values; cache_name: the forward's argument for the cache; accepts: names of its arguments.
    """

    kinds: list[str]
    layers: list[KVLayer | StateLayer]
    states: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    n_states: dict[int, int] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)
    mla: bool = False
    cache_name: str = "past_key_values"
    accepts: frozenset[str] = frozenset()

    @property
    def recurrent(self) -> bool:
        return bool(self.states)


class _Recorder(DynamicCache):
    """Notes the shapes of what arrives."""

    seen: dict[int, tuple[torch.Size, torch.Size]]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen[layer_idx] = (key_states.shape, value_states.shape)
        kept: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return kept


def restarts_scan(model: torch.nn.Module) -> bool:
    """Whether a Mamba-1 mixer is in the model: it ignores its state on any forward of several tokens.

    transformers' own behaviour (its PR 47087). The self-test sees it too, but not where weights forget quickly.
    """
    return any(all(hasattr(m, n) for n in ("x_proj", "dt_proj", "A_log")) for m in model.modules())


def text_config(model: Any) -> Any:
    """The config of the decoder, for composites too."""
    return model.config.get_text_config(decoder=True)


def check_causal(model_or_config: Any) -> None:
    """Refuses what does not generate token by token from a decoder. Raises ConfigError."""
    config = getattr(model_or_config, "config", model_or_config)
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{kind} is an encoder-decoder model; Quire caches decoder-only (causal) models"
        )
    if getattr(config, "keep_window_size", None):
        raise ConfigError(
            f"{kind} chooses keys by a learned mask beyond {config.keep_window_size} tokens, which no span expresses"
        )


def spans(config: Any, *, dense: bool = False) -> tuple[list[str], list[Span], list[int]]:
    """Per layer: transformers' layer type, our span, and how many states a recurrent one keeps."""
    types, kwargs = get_layer_types_and_kwargs(config)
    out: list[Span] = []
    for kind, kw in zip(types, kwargs, strict=True):
        width = kw.get("sliding_window")
        if dense or width is None:
            out.append(Full())
        else:
            out.append(Chunked(int(width)) if kind == "chunked_attention" else Window(int(width)))
    return list(types), out, [int(kw.get("number_of_states", 1)) for kw in kwargs]


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that expand latents (MLA) in a form that can be absorbed."""
    return [
        m
        for m in model.modules()
        if hasattr(m, "expand_kv") and hasattr(m, "kv_b_proj") and hasattr(m, "kv_lora_rank")
    ]


@torch.no_grad()
def probe(model: Any) -> Shape:
    """Runs two tokens through the model with its own attention and cache.

    Raises:
        ConfigError: not a causal model, or it hands nothing to a transformers cache.
    """
    check_causal(model)
    accepts = frozenset(inspect.signature(model.forward).parameters)
    cache_name = next((n for n in ("past_key_values", "cache_params") if n in accepts), None)
    if cache_name is None:
        raise ConfigError(
            f"{type(model).__name__} takes no cache; Quire needs a causal model that transformers can cache"
        )
    config = text_config(model)
    try:
        types, spans_, counts = spans(config)
        recorder = _Recorder(config=config)
    except (
        Exception
    ) as e:  # transformers raises many kinds here for layer types it has no cache for
        raise ConfigError(
            f"{type(model).__name__}: transformers has no cache for its layers ({e})"
        ) from e
    recorder.seen = {}
    try:
        run_model(model, torch.tensor([[1, 2]], device=model.device), recorder, cache_name, accepts)
    except Exception as e:
        raise ConfigError(
            f"{type(model).__name__} does not run two tokens through a transformers cache ({one_line(e)})"
        ) from e
    kinds: list[str] = []
    layers: list[KVLayer | StateLayer] = []
    shape = Shape(kinds, layers, cache_name=cache_name, accepts=accepts)
    shape.mla = bool(attention_modules(model))
    dtype = str(model.dtype).removeprefix("torch.")
    for i in range(max(len(recorder.layers), 1 + max(recorder.seen, default=-1))):
        layer = recorder.layers[i]
        fields, names = _state_fields(layer)
        if i in recorder.seen:
            k, v = recorder.seen[i]
            first, second = ("latent", "k_rope") if shape.mla else ("k", "v")
            if k[1] != v[1]:
                raise ConfigError(
                    f"layer {i} has {k[1]} key heads and {v[1]} value heads; they must agree"
                )
            stored = (Field(first, (k[3],), dtype), Field(second, (v[3],), dtype))
            layers.append(KVLayer(i, int(k[1]), stored, spans_[i] if i < len(spans_) else Full()))
        if fields:
            layers.append(StateLayer(i, fields))
            shape.states[i] = names
            shape.n_states[i] = counts[i] if i < len(counts) else 1
        both = i in recorder.seen and isinstance(layer, LinearAttentionCacheLayerMixin)
        kinds.append(
            HYBRID if both else ATTENTION if i in recorder.seen else STATE if fields else NOTHING
        )
        if both:
            shape.n_states[i] = counts[i] if i < len(counts) else 1
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} hands nothing to a transformers cache: no keys, values or states"
        )
    shape.shared = _shared(config, types)
    return shape


def _state_fields(layer: Any) -> tuple[tuple[Field, ...], list[tuple[str, int]]]:
    """The state tensors that a recurrent layer holds after a forward, without their batch dimension."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return (), []
    fields, names = [], []
    for kind, states in (("conv", layer.conv_states), ("rec", layer.recurrent_states)):
        for j, x in states.items():
            if x is not None:
                fields.append(
                    Field(
                        f"{kind}{j}",
                        tuple(x.shape[1:]),
                        str(x.dtype).removeprefix("torch."),
                        "block",
                    )
                )
                names.append((kind, j))
    return tuple(fields), names


def _shared(config: Any, types: list[str]) -> dict[int, int]:
    """Layers that reuse another layer's keys and values, to their owner (Gemma3n, Gemma4)."""
    modes = getattr(config, "kv_sharing_modes", None)
    kinds = getattr(config, "layer_types", None)
    if modes is None or kinds is None:
        return {}
    owners = {kinds[i]: i for i, m in enumerate(modes) if m == "store"}
    return {i: owners[kinds[i]] for i, m in enumerate(modes) if m == "reuse" and kinds[i] in owners}


def run_model(
    model: Any,
    ids: torch.Tensor,
    cache: Any,
    cache_name: str,
    accepts: frozenset[str],
    **extra: Any,
) -> torch.Tensor:
    """One forward with a cache; returns logits. Only arguments that the model takes are passed."""
    given = {k: v for k, v in extra.items() if k in accepts or "kwargs" in accepts}
    out = model(input_ids=ids, use_cache=True, **{cache_name: cache}, **given)
    logits: torch.Tensor = out.logits
    return logits


def one_line(error: BaseException, limit: int = 160) -> str:
    """An error's message on one line, with its kind where it is not one of ours."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, QuireError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= limit else text[: limit - 1] + "…"
