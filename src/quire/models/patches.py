"""Changes to a model that an attachment makes and undoes: the attention's name, MLA's expansion, a few own attentions.

Models outside transformers' attention interface that are served all the same are in `_ATTENTIONS`, by the class name of
their attention module. Each entry replaces one method per instance.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quire.models.forward import CURRENT, NAME
from quire.models.probe import attention_modules

if TYPE_CHECKING:
    import torch


class Patches:
    """Undoable changes to one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._undo: list[Callable[[], None]] = []
        self._before = "sdpa"

    def undo(self) -> None:
        """Puts everything back as it was, last change first."""
        while self._undo:
            self._undo.pop()()

    def also(self, undo: Callable[[], None]) -> None:
        """Takes on a change that was made elsewhere, to be undone before all earlier ones."""
        self._undo.append(undo)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model with its own attention for a while; needed only where a change works without a `Forward`."""
        config = self.model.config.get_text_config(decoder=True)
        ours = config._attn_implementation == NAME
        if ours:
            self.model.set_attn_implementation(self._named(self._before))
        try:
            yield
        finally:
            if ours:
                self.model.set_attn_implementation(self._named(NAME))

    def use_interface(self) -> bool:
        """Makes the decoder call `quire_attention`; False when the model does not take part in the interface."""
        config = self.model.config.get_text_config(decoder=True)
        self._before = before = config._attn_implementation
        if not getattr(self.model, "_can_set_attn_implementation", lambda: False)():
            return False
        try:
            self.model.set_attn_implementation(self._named(NAME))
        except (ValueError, ImportError, KeyError, AttributeError):
            return False
        self._undo.append(lambda: self.model.set_attn_implementation(self._named(before)))
        return bool(config._attn_implementation == NAME)

    def _named(self, name: str) -> Any:
        """The argument that sets the text decoder only, leaving vision and audio towers alone."""
        config = self.model.config
        subs = [
            n for n in getattr(config, "sub_configs", {}) if getattr(config, n, None) is not None
        ]
        text = config.get_text_config(decoder=True)
        own = [n for n in subs if getattr(config, n) is text]
        return dict.fromkeys(own, name) if own else name

    def absorb_latents(self) -> bool:
        """MLA: the attention gets latents instead of expanded keys and values. False when there are none."""
        found = attention_modules(self.model)
        for m in found:
            m.quire_absorbed = True  # type: ignore[assignment]
            self._replace(m, "expand_kv", _keep_latents)
            self._undo.append(lambda m=m: delattr(m, "quire_absorbed"))  # type: ignore[misc]
        return bool(found)

    def own_attention(self) -> bool:
        """Patches models outside the interface; False when this one is not in the table."""
        found = False
        for m in self.model.modules():
            entry = _ATTENTIONS.get(type(m).__name__)
            if entry is not None:
                name, function, suits = entry
                if not suits(m):
                    return False
                self._replace(m, name, function)
                found = True
        return found

    def _replace(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        original = getattr(module, name)
        had = name in module.__dict__
        object.__setattr__(module, name, types.MethodType(_or_original(function, original), module))

        def back() -> None:
            if had:
                object.__setattr__(module, name, original)
            else:
                object.__delattr__(module, name)

        self._undo.append(back)


def _or_original(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The model's own method while no `Forward` is current (a call without our cache)."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (
            original(*args, **kwargs) if CURRENT.get() is None else function(self, *args, **kwargs)
        )

    return call


def _keep_latents(
    self: Any, latent: torch.Tensor, k_rope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return latent, k_rope


def _gptj_attention(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
) -> tuple[torch.Tensor, None]:
    """GPT-J and CodeGen: `[B, H, T, D]` in and out."""
    now = CURRENT.get()
    assert now is not None
    layer = now.layer_of(self, key, value)
    out = now.attend(layer, query.to(key.dtype), scale=1.0 / float(self.scale_attn))
    return out.transpose(1, 2), None


def _gptneo_attention(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
) -> tuple[torch.Tensor, None]:
    """GPT-Neo: unscaled scores; local layers have a window that only the module knows."""
    now = CURRENT.get()
    assert now is not None
    layer = now.layer_of(self, key, value)
    window = self.config.window_size if self.attention_type == "local" else None
    return now.attend(layer, query, scale=1.0, window=window).transpose(1, 2), None


def _falcon_forward(
    self: Any,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Falcon without ALiBi. The new architecture expands K/V to all query heads; only the real heads are cached."""
    now = CURRENT.get()
    assert now is not None
    turn = sys.modules[type(self).__module__].apply_rotary_pos_emb
    q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    q, k = turn(q, k, *position_embeddings)
    if self.new_decoder_architecture:
        share = self.num_heads // self.num_kv_heads
        k, v = k[:, ::share], v[:, ::share]
    k, v = layer_past.update(k, v, self.layer_idx)
    out = now.attend(now.layer_of(self, k, v), q, scale=float(self.inv_norm_factor))
    return self.dense(out.flatten(2)), None


def cached_heads(model: Any) -> dict[int, int]:
    """Layers of patched models that cache fewer heads than the model's own code hands to its cache."""
    return {
        m.layer_idx: m.num_kv_heads
        for m in model.modules()
        if type(m).__name__ == "FalconAttention" and m.new_decoder_architecture
    }


def _any(_: Any) -> bool:
    return True


_ATTENTIONS: dict[str, tuple[str, Callable[..., Any], Callable[[Any], bool]]] = {
    "GPTJAttention": ("_attn", _gptj_attention, _any),
    "CodeGenAttention": ("_attn", _gptj_attention, _any),
    "GPTNeoSelfAttention": ("_attn", _gptneo_attention, _any),
    "FalconAttention": ("forward", _falcon_forward, lambda m: not m.config.alibi),
}
