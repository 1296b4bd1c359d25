"""Hidden states for the policies that want to see them: what enters the attention of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from quire.errors import ConfigError
from quire.models.forward import CURRENT

__all__ = ["attentions", "note_hidden", "position_slices"]


def attentions(model: Any) -> dict[int, torch.nn.Module]:
    """Layer to its attention module: one that knows its layer and is called so."""
    return {
        int(m.layer_idx): m
        for m in model.modules()
        if isinstance(getattr(m, "layer_idx", None), int) and "Attention" in type(m).__name__
    }


def note_hidden(model: Any, layers: Sequence[int]) -> Callable[[], None]:
    """Hands what enters these layers' attention to whoever watches a forward; returns what undoes that.

    Raises:
        ConfigError: the model does not say which module is a layer's attention.

    Cost: a look at the current forward per layer, where nobody notes.
    """
    found = attentions(model)
    missing = [n for n in layers if n not in found]
    if missing:
        raise ConfigError(
            f"{type(model).__name__} does not say which module is the attention of layer {missing[0]}, and the policy "
            "looks at what enters it; use kvzip"
        )
    handles = [found[n].register_forward_pre_hook(_hook(n), with_kwargs=True) for n in layers]

    def undo() -> None:
        for h in handles:
            h.remove()

    return undo


def position_slices(
    given: Any, hidden: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, ...] | None:
    """A layer's `position_embeddings` by token, `[n, D]` each; None where there are none of this kind.

    Args:
        given: as the layer was called with; hidden: `[B, T, width]`, as well.
        valid: flat indices of the positions that are tokens; None for all.
    """
    if not isinstance(given, tuple | list) or not all(isinstance(x, torch.Tensor) for x in given):
        return None
    if any(x.ndim != 3 or x.shape[1] != hidden.shape[1] for x in given):
        return None
    flat = [x.expand(hidden.shape[0], -1, -1).reshape(-1, x.shape[-1]) for x in given]
    return tuple(x if valid is None else x[valid] for x in flat)


def _hook(layer: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = CURRENT.get()
        if now is None or now.watch is None:
            return
        x = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(x, torch.Tensor):
            raise ConfigError(f"layer {layer}: no hidden states enter its attention; use kvzip")
        flat = x.detach().reshape(-1, x.shape[-1])
        hidden = flat if now.valid is None else flat[now.valid]
        turned = partial(position_slices, kwargs.get("position_embeddings"), x, now.valid)
        now.watch.note(layer, hidden, turned)

    return before
