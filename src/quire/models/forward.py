"""What one forward of a model is about, and the attention function that a model calls in place of its own.

    model.forward ── attention layer ── KVCache.update(k, v, layer)   writes the new tokens into blocks, returns them
                                     └─ quire_attention(q, k, v)      reads the blocks; k's identity tells the layer

A context variable holds the current `Forward`. Without one (training, a call without a cache) the function computes
plain attention with transformers' own masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from quire.attention.observe import Attended
from quire.attention.reference import ReferenceBackend
from quire.attention.step import Step
from quire.errors import ConfigError, RequestError
from quire.ops.attend import attend, merge, sink_partial
from quire.spec import Window

P = ParamSpec("P")
T = TypeVar("T")

NAME = "quire"
"""The attention implementation's name in transformers' registries."""

_HARMLESS = frozenset(
    {
        *("dropout", "attention_dropout", "is_causal", "is_prefill", "deterministic", "layer_idx"),
        *("position_ids", "cache_position", "position_embeddings", "input_ids", "token_type_ids"),
        *("past_key_values", "layer_past", "use_cache", "shared_kv_states", "logits_to_keep"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch"),
        *("per_layer_input", "mm_token_type_ids"),
    }
)
"""Tensor arguments that models hand on to their attention and that change nothing in it."""


def _without_grad(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.no_grad()` for what runs twice per layer: costs nothing where gradients are off already."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


class Watcher(Protocol):
    """Notes, layer by layer, what attention pays."""

    def ask(self, layer: int) -> list[Attended]:
        """Questions about a layer."""
        ...

    def take(self, layer: int, q: torch.Tensor, scale: float, answers: Sequence[Attended]) -> None:
        """Their answers, the layer's queries `[n_tokens, H_q, D]`, and what their scores are multiplied by."""
        ...

    def note(self, layer: int, hidden: torch.Tensor, positions: Callable[[], Any]) -> None:
        """What enters the layer's attention, `[n_tokens, width]`, and what gives its position embeddings by token."""
        ...

    def finish(self) -> None:
        """After the whole forward."""
        ...


@dataclass
class Forward:
    """One pass over `step`'s rows. Tensors inside the model are `[B, heads, T, D]`; tokens are their valid positions.

    Args:
        step: the plan.
        backend: reads and merges segments.
        batch, queries: B and T of the model's tensors.
        valid: flat indices of the positions that are tokens, ascending; None when all are (no padding).
        packed: one row of the model's tensors holds tokens of several sequences, at positions of their own.
        names: layer to what its two cached tensors are called, for compiled code.
        linears: packed linear layers by their place, for compiled code.
        watch: who wants to know what attention pays, see `models.keep`.
    """

    step: Step
    backend: ReferenceBackend
    batch: int
    queries: int
    valid: torch.Tensor | None = None
    windows: Mapping[int, int | None] = field(default_factory=dict)
    packed: bool = False
    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    linears: Sequence[Callable[[torch.Tensor], torch.Tensor]] = ()
    watch: Watcher | None = None
    owner: dict[int, int] = field(default_factory=dict)
    pending: int | None = None
    _alive: list[torch.Tensor] = field(default_factory=list)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, heads, T, D]` to `[n_tokens, heads, D]`, the same memory where one row or one column holds them all."""
        if self.valid is None and (self.batch == 1 or self.queries == 1):
            row, head, column, last = x.stride()
            token = column if self.batch == 1 else row
            n = self.batch * self.queries
            return x.as_strided((n, x.shape[1], x.shape[3]), (token, head, last))
        flat = x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
        return flat if self.valid is None else flat[self.valid]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[n_tokens, heads, D]` to `[B, T, heads, D]`, zeros at padding."""
        if self.valid is not None:
            full = x.new_zeros(self.batch * self.queries, *x.shape[1:])
            full[self.valid] = x
            x = full
        return x.view(self.batch, self.queries, *x.shape[1:])

    @_without_grad
    def write(self, layer: int, names: tuple[str, str], k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores a layer's new keys and values, and remembers whose they are."""
        self.backend.write(self.step, layer, {names[0]: self.tokens(k), names[1]: self.tokens(v)})
        self.owner[id(k)] = self.owner[id(v)] = layer
        self._alive += [k, v]
        self.pending = layer

    def layer_of(self, module: torch.nn.Module, k: torch.Tensor, v: torch.Tensor) -> int:
        """The layer whose cache the tensors are. Raises ConfigError when the model rearranged them after `update`."""
        layer = self.owner.get(id(k))
        if layer is None or self.owner.get(id(v)) != layer:
            raise ConfigError(
                f"{type(module).__name__} changes keys or values after storing them in the cache"
            )
        return layer

    @_without_grad
    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        *,
        scale: float,
        keys: tuple[str, ...] = ("k",),
        value: str = "v",
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """`q: [B, H_q, T or fewer, D]` (the last positions when fewer) to `[B, T or fewer, H_q, D_v]`."""
        t = q.shape[2]
        if t < self.queries:
            q = torch.cat([q.new_zeros(*q.shape[:2], self.queries - t, q.shape[3]), q], 2)
        if window is not None and window == self.windows.get(layer):
            window = None
        flat = self.tokens(q)
        if self.watch is None:
            out = self.backend.run(
                self.step,
                layer,
                flat,
                scale=scale,
                keys=keys,
                value=value,
                softcap=softcap,
                sinks=sinks,
                window=window,
            )
        else:
            options: dict[str, Any] = {
                "scale": scale,
                "keys": keys,
                "value": value,
                "softcap": softcap,
                "sinks": sinks,
                "window": window,
            }
            questions = self.watch.ask(layer)
            out = self.backend.run(
                self.step, layer, flat, **options, attended=questions[0] if questions else None
            )
            for more in questions[1:]:  # policies that add up differently share a step
                self.backend.run(self.step, layer, flat, **options, attended=more)
            self.watch.take(layer, flat, scale, questions)
        out = self.rows(out)
        return out if t == self.queries else out[:, self.queries - t :]


CURRENT: ContextVar[Forward | None] = ContextVar("quire_forward", default=None)


def quire_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,  # in the place that it has in sdpa's, since some wrap all functions alike
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: `query: [B, H_q, T, D]`; returns `[B, T, H_q, D_v]`.

    Raises:
        ConfigError: an argument that would change the result and that this function does not know.
    """
    for name, x in kwargs.items():
        if name not in _HARMLESS and isinstance(x, torch.Tensor):
            raise ConfigError(_unknown(module, kwargs))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    own = vars(module)  # a module's own look-up of what it has not takes microseconds
    if "quire_compiled" in own and torch.compiler.is_compiling():  # see `models.compiled`
        out = torch.ops.quire.attend(
            query, key, value, module.layer_idx, scale, softcap, s_aux, sliding_window
        )
        return out, None
    now = CURRENT.get()
    if now is None:
        return _plain(query, key, value, attention_mask, scale, softcap, s_aux), None
    layer = now.layer_of(module, key, value)
    if now.packed and own.get("attn_temperature_tuning", False) and not own.get("use_rope", True):
        query = _at_own_positions(module, now, query)
    if "quire_absorbed" in own:
        return absorbed(module, now, layer, query, scale), None
    out = now.attend(layer, query, scale=scale, softcap=softcap, sinks=s_aux, window=sliding_window)
    return out.contiguous(), None


def _unknown(module: torch.nn.Module, kwargs: Mapping[str, Any]) -> str:
    odd = sorted(k for k, x in kwargs.items() if isinstance(x, torch.Tensor) and k not in _HARMLESS)
    return f"{type(module).__name__} passes {', '.join(odd)} to its attention, which the cache cannot honour"


def absorbed(module: Any, now: Forward, layer: int, q: torch.Tensor, scale: float) -> torch.Tensor:
    """MLA over latents: W_UK goes into the query and W_UV after the sum, so that keys and values are never expanded.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1. `q: [B, H, T, d_nope + d_rope]`.
    """
    dn, dv, r = module.qk_nope_head_dim, module.v_head_dim, module.kv_lora_rank
    w = up_projection(module.kv_b_proj, r).view(q.shape[1], dn + dv, r)
    latent = torch.einsum("bhtd,hdr->bhtr", q[..., :dn], w[:, :dn])
    out = now.attend(
        layer,
        torch.cat([latent, q[..., dn:]], -1),
        scale=scale,
        keys=("latent", "k_rope"),
        value="latent",
    )
    return torch.einsum("bthr,hdr->bthd", out, w[:, dn:]).contiguous()


def up_projection(layer: Any, rank: int) -> torch.Tensor:
    """The matrix `[out, rank]` that a linear layer applies; asked of the layer where it is quantised or adapted."""
    if type(layer) is torch.nn.Linear:
        plain: torch.Tensor = layer.weight
        return plain
    like = next(p for p in layer.parameters() if p.is_floating_point())
    applied: torch.Tensor = layer(torch.eye(rank, dtype=like.dtype, device=like.device))
    return applied.T


def _at_own_positions(module: Any, now: Forward, q: torch.Tensor) -> torch.Tensor:
    """Puts right the scale by position that Llama-4 gives the queries of its NoPE layers.

    It takes the position from the cache's length, not `position_ids`; in a packed row that is the place in the row.
    """

    def scales(positions: torch.Tensor) -> torch.Tensor:
        steps = torch.floor((positions.float() + 1.0) / float(module.floor_scale))
        return torch.log1p(steps) * float(module.attn_scale) + 1.0

    ratio = scales(now.step.positions()) / scales(torch.arange(q.shape[2], device=q.device))
    turned: torch.Tensor = (q * ratio[:, None]).to(q.dtype)
    return turned


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention without our cache, over what the model hands in; the mask is transformers' own."""
    t, n = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(t, n, dtype=torch.bool, device=q.device).tril(n - t)[None, None]
    if softcap is None and sinks is None:
        share = q.shape[1] // k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            repeat_kv(k, share),
            repeat_kv(v, q.shape[1] // v.shape[1]),
            attn_mask=mask,
            scale=scale,
        )
        return out.transpose(1, 2).contiguous()
    part = attend(q, k, v, scale=scale, mask=mask.squeeze(1), softcap=softcap)
    if sinks is not None:
        part = merge(part, sink_partial(sinks, part))
    return part.out.to(q.dtype).transpose(1, 2).contiguous()


def quire_mask(*args: Any, mask_function: Any = None, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask hook: nothing to build while a `Forward` is current, its own boolean mask otherwise.

    Raises:
        RequestError: an overlay that lets tokens see ahead (image blocks), which no span expresses.
    """
    if CURRENT.get() is None:
        full: torch.Tensor | None = sdpa_mask(
            *args, mask_function=mask_function, **{**kwargs, "allow_is_causal_skip": False}
        )
        return full
    if getattr(mask_function, "__name__", "") == "or_mask":
        raise RequestError(
            "this input lets tokens see ahead of themselves (an image block); the cache keeps causal text only"
        )
    return None


AttentionInterface.register(NAME, quire_attention)
AttentionMaskInterface.register(NAME, quire_mask)


def windows_of(step_groups: Any) -> dict[int, int | None]:
    """Layer to the width of its window span, for comparing with what a model passes."""
    out: dict[int, int | None] = {}
    for group in step_groups:
        span = getattr(group.span, "inner", group.span)
        for layer in group.layers:
            out[layer] = span.tokens if isinstance(span, Window) else None
    return out
