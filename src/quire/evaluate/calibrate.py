"""Calibration: what a codec learns of a model from a text, layer by layer, in bounded memory.

    text ── windows ── model's own forward and backward ──> keys, values, squared gradients ── fit ──> tables

A window begins where texts begin, and its first token is left out, since it is often unlike all others. Keys are turned
back to what they were before RoPE where the codec asks for that, and gradients with them, since a rotation is its own
transpose. As many layers as the memory holds are captured in one pass over the text; others get passes of their own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from quire.codecs.calibrated import Calibrated, Calibration
from quire.codecs.recipe import available, load_codec
from quire.errors import ConfigError, RequestError
from quire.evaluate.inject import inject
from quire.models.load import weights_digest
from quire.models.memory import arena_bytes
from quire.models.probe import Shape, probe, run_model, text_config
from quire.models.rope import Regimes
from quire.models.runner import context_tokens
from quire.models.turn import Turner, find_turner
from quire.plan.layout import KVLayer
from quire.spec import DEFAULT_BLOCK_TOKENS, Field, Site

__all__ = ["calibrate", "check_codec"]

LENGTH_TOKENS = 2048
TOKENS = 32_768
FIRST = 1
"""Tokens of a window that nothing is learned from."""

Progress = Callable[[str, int, int], None]


def check_codec(text: str) -> Calibrated:
    """The codec that is to learn. Raises ConfigError: unknown, or none that learns from a text."""
    codec: Any = load_codec(text)
    if not isinstance(codec, Calibrated):
        learn = [n for n in available() if isinstance(load_codec(n), Calibrated)]
        raise ConfigError(
            f"codec {codec.name} learns nothing from a text and needs no calibration; {', '.join(learn)} do"
        )
    return codec


def calibrate(
    model: Any,
    codec: str,
    text: str | Sequence[int],
    *,
    tokenizer: Any = None,
    length_tokens: int | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
    memory: int | float | str = "1GiB",
    injected: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Learns a codec's tables of a model from a text.

    Args:
        model: a loaded causal transformers model in eval mode, not attached; it is left as it was.
        codec: its string form, as "cq:form=4c8b"; one that learns (`codecs.calibrated`).
        text: words, or token ids; one that is like what the model will be given, and not what it is judged on.
        tokenizer: for words, and for what begins a text.
        length_tokens: of a window; by default 2,048 or the model's context.
        tokens: of the text, at most.
        seed: of everything that is drawn, the outliers of `injected` too.
        memory: for what is captured, see `arena_bytes`; less of it means more passes.
        injected: for a model with injected outliers (`inject`), as `quire eval --inject` judges it.
        progress: called with what is being done, how many are done and in all.

    Returns:
        What `Calibration.save` writes and `file=` names; for the weights of this model alone.

    Raises:
        ConfigError: a codec that does not learn, too few tokens for it, or a model whose keys it cannot take.
        RequestError: a text shorter than one window.

    Cost: a forward and a backward of `tokens` tokens per pass, then the codec's own.
    """
    chosen = check_codec(codec)
    ids = _encode(tokenizer, text)
    outliers = inject(model, seed=seed) if injected else None
    try:
        shape = probe(model)
        sites = _sites(chosen, shape)
        turner = _turner(model, shape, chosen)
        windows = _windows(model, tokenizer, ids, length_tokens, tokens)
        offsets = outliers.offsets if outliers is not None else {}
        seen = _Seen(model, shape, turner, offsets, weighted=chosen.weighted)
        tables: dict[str, torch.Tensor] = {}
        limit = arena_bytes(memory, model.device)
        for layers in _passes(sites, windows, model.dtype.itemsize, limit):
            for layer, name, x, weight in seen.capture(windows, layers, progress):
                site = next(s for s in sites if (s.layer, s.name) == (layer, name))
                own = seed * 1_000_003 + 2 * layer + site.values
                for part, table in chosen.fit(site, x, weight, own).items():
                    tables[f"{layer}.{name}.{part}"] = table.cpu()
                if progress is not None:
                    progress("learning", len({n.rpartition(".")[0] for n in tables}), len(sites))
        about = {
            "codec": chosen.settings,
            "model": weights_digest(model),
            "text": hashlib.sha256(repr(ids[:tokens]).encode()).hexdigest(),
            "tokens": str(sum(map(len, windows))),
            "length": str(len(windows[0])),
            "seed": str(seed),
            "injected": str(injected).lower(),
        }
        return Calibration(about, tables)
    finally:
        if outliers is not None:
            outliers.undo()


def _encode(tokenizer: Any, text: str | Sequence[int]) -> list[int]:
    if not isinstance(text, str):
        return [int(t) for t in text]
    if tokenizer is None:
        raise RequestError("this model has no tokenizer: give the text as token ids")
    return [int(t) for t in tokenizer.encode(text, add_special_tokens=False)]


def _sites(codec: Calibrated, shape: Shape) -> list[Site]:
    """Where the codec will work. Raises ConfigError where it cannot."""
    size = math.lcm(DEFAULT_BLOCK_TOKENS, codec.group_tokens)
    out = [
        Site(Field(f.name, f.shape, f.dtype), size, x.layer, tuple(range(x.heads)))
        for x in shape.layers
        if isinstance(x, KVLayer)
        for f in x.fields
    ]
    if not out:
        raise ConfigError("this model caches no keys and values, so there is nothing to calibrate")
    for site in out:
        codec.stored(site)
    return out


@dataclass(frozen=True)
class _Bare:
    """As much of a bridge as `find_turner` asks for, over a model that is attached to nothing."""

    model: Any
    shape: Shape

    def layers(self) -> list[tuple[int, tuple[str, ...]]]:
        return [
            (x.layer, tuple(f.name for f in x.fields))
            for x in self.shape.layers
            if isinstance(x, KVLayer)
        ]


def _turner(model: Any, shape: Shape, codec: Calibrated) -> Turner | None:
    if codec.needs != "unrotated":
        return None
    try:
        return find_turner(_Bare(model, shape))
    except ConfigError as e:
        raise ConfigError(
            f"codec {codec.name} needs keys before RoPE, and of this model: {e}; use rope=after"
        ) from e


def _windows(
    model: Any, tokenizer: Any, ids: list[int], length: int | None, tokens: int
) -> list[list[int]]:
    """Pieces of the text, each behind what begins one."""
    context = context_tokens(model.config.get_text_config(decoder=True), Regimes(model).stretch)
    length = min(LENGTH_TOKENS, context) if length is None else length
    if not FIRST + 1 < length <= context:
        raise RequestError(
            f"a window of {length} tokens does not do; it takes from {FIRST + 2} to the context's {context}"
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    begin = [] if bos is None else [int(bos)]
    inner = length - len(begin)
    count = min(len(ids), tokens) // inner
    if not count:
        raise RequestError(
            f"the text has {min(len(ids), tokens):,} tokens, fewer than one window of {length:,}; give a longer text "
            "or a smaller length"
        )
    return [begin + ids[i * inner : (i + 1) * inner] for i in range(count)]


def _passes(
    sites: Sequence[Site], windows: Sequence[Sequence[int]], item_bytes: int, limit: int
) -> Iterator[list[int]]:
    """Layers by as many as the memory holds, one at least: numbers as they are, gradients in two bytes each."""
    n = sum(map(len, windows))
    cost: dict[int, int] = {}
    for s in sites:
        assert s.layer is not None
        cost[s.layer] = cost.get(s.layer, 0) + n * len(s.heads) * s.width * (item_bytes + 2)
    now: list[int] = []
    for layer in sorted(cost):
        if now and sum(cost[x] for x in now) + cost[layer] > limit:
            yield now
            now = []
        now.append(layer)
    yield now


class _Capture(DynamicCache):
    """Lets keys and values through and keeps those of some layers, their gradients to be asked for."""

    kept: dict[int, tuple[torch.Tensor, torch.Tensor]]
    wanted: frozenset[int]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx in self.wanted:
            for x in (key_states, value_states):
                if torch.is_grad_enabled():
                    x.requires_grad_() if x.is_leaf else x.retain_grad()
            self.kept[layer_idx] = (key_states, value_states)
        out: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return out


class _Seen:
    """What the model's layers hand to a cache, window by window."""

    def __init__(
        self, model: Any, shape: Shape, turner: Turner | None, offsets: Any, *, weighted: bool
    ) -> None:
        self.model, self.shape, self.weighted = model, shape, weighted
        self.turner, self.offsets = turner, offsets

    def capture(
        self, windows: Sequence[list[int]], layers: Sequence[int], progress: Progress | None
    ) -> Iterator[tuple[int, str, torch.Tensor, torch.Tensor | None]]:
        """(layer, field, `[heads, N, D]`, squared gradients) of some layers, from one pass over the text."""
        xs: dict[tuple[int, str], list[torch.Tensor]] = {}
        gs: dict[tuple[int, str], list[torch.Tensor]] = {}
        for i, window in enumerate(windows):
            kept = self._window(window, layers)
            for layer in layers:
                if layer not in kept:
                    raise ConfigError(
                        f"layer {layer} of this model hands nothing to its cache, so it cannot be calibrated"
                    )
                for name, x in zip(("k", "v"), kept[layer], strict=True):
                    value, grad = self._ready(layer, name, x)
                    xs.setdefault((layer, name), []).append(value)
                    if grad is not None:
                        gs.setdefault((layer, name), []).append(grad)
            if progress is not None:
                progress(f"reading for layers {layers[0]} to {layers[-1]}", i + 1, len(windows))
        for key in list(xs):
            weight = torch.cat(gs.pop(key), 1).float() if key in gs else None
            yield *key, torch.cat(xs.pop(key), 1), weight

    def _window(
        self, window: list[int], layers: Sequence[int]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        ids = torch.tensor([window], device=self.model.device)
        frozen = [(p, p.requires_grad) for p in self.model.parameters()]
        cache = _Capture(config=text_config(self.model))
        cache.kept, cache.wanted = {}, frozenset(layers)
        try:
            for p, _ in frozen:
                p.requires_grad = False
            with torch.set_grad_enabled(self.weighted):
                extra = {"position_ids": torch.arange(len(window), device=ids.device)[None]}
                logits = run_model(
                    self.model, ids, cache, self.shape.cache_name, self.shape.accepts, **extra
                )
                if self.weighted:
                    loss = torch.nn.functional.cross_entropy(
                        logits[0, :-1].float(), ids[0, 1:], reduction="sum"
                    )
                    loss.backward()
        finally:
            for p, before in frozen:
                p.requires_grad = before
        return cache.kept

    def _ready(
        self, layer: int, name: str, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[heads, n, D]` as the codec will be given it, and its squared gradient, without the window's first."""
        grad = None if x.grad is None else x.grad[0].float()
        value = x.detach()[0]
        if name == "k":
            offset = self.offsets.get(layer)
            value = value if offset is None else value + offset.unsqueeze(1)
            if self.turner is not None:
                back = -torch.arange(value.shape[1], device=value.device)
                dtype = value.dtype
                value = self.turner(layer, value.float(), back).to(dtype)
                grad = None if grad is None else self.turner(layer, grad, back)
        squared = None if grad is None else (grad**2)[:, FIRST:].bfloat16()
        return value[:, FIRST:].clone(), squared
