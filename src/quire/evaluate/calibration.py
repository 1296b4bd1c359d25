"""Calibration: what a codec learns of a model from a text, layer by layer, in bounded memory.

    text ── windows ── model's own forward and backward ──> keys, values, squared gradients ── fit ──> tables

A window begins where texts begin, and its first token is left out, since it is often unlike all others. Keys are turned
back to what they were before RoPE where the codec asks for that, and gradients with them, since a rotation is its own
transpose. As many layers as the memory holds are captured in one pass over the text; others get passes of their own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.codecs.calibrated import Calibrated, Calibration
from quire.codecs.recipe import available, load_codec
from quire.errors import ConfigError, RequestError
from quire.evaluate.inject import inject
from quire.models.capture import FIRST, Capture, Progress
from quire.models.load import weights_digest
from quire.models.memory import arena_bytes
from quire.models.probe import Shape, probe
from quire.models.rope import Regimes
from quire.models.runner import context_tokens
from quire.models.turn import Turner, find_turner
from quire.plan.layout import KVLayer
from quire.spec import DEFAULT_BLOCK_TOKENS, Field, Site

if TYPE_CHECKING:
    import torch

__all__ = ["calibrate", "check_codec"]

LENGTH_TOKENS = 2048
TOKENS = 32_768


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
        seen = Capture(model, shape, turner, offsets, weighted=chosen.weighted)
        tables: dict[str, torch.Tensor] = {}
        limit = arena_bytes(memory, model.device)
        for layers in _passes(sites, windows, model.dtype.itemsize, limit):
            for layer, name, x, weight in seen.read(windows, layers, progress):
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


def _sites(codec: Any, shape: Shape) -> list[Site]:
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
