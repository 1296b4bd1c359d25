"""What an outside scorer is shown of a model: each layer's attention as one call over a whole sequence, tried at start.

forward, chunk by chunk ── hook ──> hidden states, position embeddings       kept if the scorer looks at them
prompt is over          ── keys and values as stored, all of them ──> score  as if there had been one call
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from quire.errors import ConfigError
from quire.models.hidden import attentions, position_slices
from quire.models.probe import one_line, run_model, text_config
from quire.retention.contract import Called
from quire.retention.press import call_score

__all__ = ["Outside", "Piece"]

PROBE_TOKENS = 320
"""Of the text that a scorer is tried on: longer than the windows that scorers look at."""


@dataclass(frozen=True)
class Piece:
    """Some tokens that entered a layer's attention: `hidden: [n, width]`, `positions`: cosines and sines `[n, D]`."""

    hidden: torch.Tensor
    positions: tuple[torch.Tensor, ...] | None


def _joined(pieces: Sequence[Piece]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Hidden states `[1, T, width]` and position embeddings `[1, T, D]` of pieces that follow one another."""
    hidden = torch.cat([p.hidden for p in pieces]).unsqueeze(0)
    every = [p.positions for p in pieces if p.positions is not None]
    if len(every) < len(pieces):
        return hidden, None
    return hidden, tuple(torch.cat(x).unsqueeze(0) for x in zip(*every, strict=True))


class Outside:
    """One scorer on one model.

    Args:
        bridge: the model joined to its store.
        press: the scorer; its `post_init_from_model`, where it has one, is called.
        layers: those that tokens are dropped from; heads: gives a layer's KV heads.
        who: for messages.

    Raises:
        ConfigError: it cannot be driven on this model, with the reason.

    Cost: a forward of `PROBE_TOKENS` tokens, and their scores three times.
    """

    def __init__(
        self,
        bridge: Any,
        press: Any,
        layers: Sequence[int],
        heads: Callable[[int], Sequence[int]],
        who: str,
    ) -> None:
        self.press, self.name = press, type(press).__name__
        self.dtype: torch.dtype = bridge.model.dtype
        found = attentions(bridge.model)
        missing = [n for n in layers if n not in found]
        if missing:
            raise ConfigError(
                f"{who}: {type(bridge.model).__name__} does not say which module is the attention of layer "
                f"{missing[0]}, and a press is given it; use keydiff"
            )
        self.modules = {n: found[n] for n in layers}
        self._lend_rope(bridge)
        try:
            prepare = getattr(press, "post_init_from_model", None)
            if prepare is not None:
                prepare(bridge.model)
        except Exception as e:
            raise ConfigError(f"{who}: {self.name} cannot take this model ({one_line(e)})") from e
        self.records = self._probe(bridge, heads, who)
        """Whether it looks at hidden states or positions, which must be kept for it."""

    def _lend_rope(self, bridge: Any) -> None:
        """A decoder's RoPE, which scorers expect at its attention; taken back with the model's other changes."""
        ropes = [
            m.rotary_emb
            for m in bridge.model.modules()
            if isinstance(getattr(m, "rotary_emb", None), torch.nn.Module)
        ]
        for m in self.modules.values() if ropes else ():
            if not hasattr(m, "rotary_emb"):
                object.__setattr__(m, "rotary_emb", ropes[0])
                bridge.patches.also(lambda m=m: object.__delattr__(m, "rotary_emb"))

    def called(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        pieces: Sequence[Piece],
        kept_tokens: int,
    ) -> Called:
        """One layer's call over a sequence, from its pieces.

        Args:
            keys, values: `[H, T, D]`.
            pieces: of all T tokens, or none for a scorer that does not look at them.
        """
        n = keys.shape[1]
        hidden, positions = _joined(pieces) if pieces else (None, None)
        at = torch.arange(n, device=keys.device)
        kwargs: dict[str, Any] = {
            "hidden_states": hidden,
            "position_embeddings": positions,
            "position_ids": at[None],
            "cache_position": at,
            "attention_mask": None,
            "past_key_values": None,
        }
        k, v = (x.to(self.dtype).unsqueeze(0) for x in (keys, values))
        return Called(self.modules[layer], hidden, k, v, kwargs, kept_tokens)

    @torch.inference_mode()
    def _probe(self, bridge: Any, heads: Callable[[int], Sequence[int]], who: str) -> bool:
        """Whether it looks at more than keys and values. Raises ConfigError where it cannot score this model."""
        n = min(PROBE_TOKENS, bridge.max_context_tokens)
        pieces, stored = _one_call(bridge, self.modules, n)
        for layer, (k, _) in stored.items():
            if k.shape[0] != len(heads(layer)):
                raise ConfigError(
                    f"{who}: layer {layer} hands {k.shape[0]} heads to a cache that keeps {len(heads(layer))}, so a "
                    "press would score others; use keydiff"
                )

        def scores(some: Mapping[int, Sequence[Piece]]) -> list[torch.Tensor]:
            return [
                call_score(self.press, self.called(i, k, v, some.get(i, ()), n // 2), i)
                for i, (k, v) in stored.items()
            ]

        try:
            whole = scores(pieces)
        except Exception as e:
            raise ConfigError(f"{who}: {self._why(e, pieces, stored)}") from e
        try:
            bare = scores({})
        except Exception:  # noqa: BLE001 - whatever its code does without them: it looks at them
            return True
        return not all(torch.equal(a, b) for a, b in zip(whole, bare, strict=True))

    def _why(self, error: Exception, pieces: Any, stored: Any) -> str:
        """What a scorer lacked that failed."""
        if isinstance(error, ConfigError):
            return one_line(error)
        layer, (k, v) = next(iter(stored.items()))
        called = self.called(layer, k, v, pieces.get(layer, ()), k.shape[1] // 2)
        config = getattr(called.module, "config", None)
        heads = int(getattr(config, "num_attention_heads", k.shape[0]))
        n = k.shape[1]
        paid = torch.ones(n, n, dtype=self.dtype).tril().expand(1, heads, n, n)
        try:
            self.press.score(
                called.module, called.hidden, called.keys, called.values, paid, called.kwargs
            )
        except Exception:  # noqa: BLE001 - then that is not what it lacked
            return f"{self.name} cannot score this model ({one_line(error)})"
        return (
            f"{self.name} wants attention weights, which are never there as a whole; h2o, tova and snapkv are shown "
            "what queries paid"
        )


def _one_call(
    bridge: Any, modules: Mapping[int, torch.nn.Module], n_tokens: int
) -> tuple[dict[int, list[Piece]], dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """What enters each layer's attention in one forward of a made-up text, and the keys and values it hands on."""
    model, shape = bridge.model, bridge.shape
    pieces: dict[int, list[Piece]] = {}
    here = threading.get_ident()

    def hook(layer: int) -> Any:
        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = kwargs.get("hidden_states", args[0] if args else None)
            if threading.get_ident() == here and isinstance(x, torch.Tensor):
                turned = position_slices(kwargs.get("position_embeddings"), x, None)
                pieces[layer] = [Piece(x[0], turned)]

        return before

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        vocab = int(text_config(model).vocab_size)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (1, n_tokens), generator=generator).to(model.device)
        at = torch.arange(n_tokens, device=model.device)[None]
        cache = DynamicCache(config=text_config(model))
        run_model(model, ids, cache, shape.cache_name, shape.accepts, position_ids=at)
    finally:
        for h in handles:
            h.remove()
    stored = {n: (cache.layers[n].keys[0], cache.layers[n].values[0]) for n in modules}
    return pieces, stored
