"""Outliers put into a model without changing its function, so that a small model judges codecs as a large one would.

Small models may lack what makes caches hard to quantise: a few key channels far larger than the others, a common offset
of all keys, a large value channel. Each can be added in exact arithmetic:

    keys      two RoPE pairs of every KV head times s, of its query heads over s      q·k stays, the cached k does not
    values    one channel of every KV head times s, the columns of W_o over s         the sum through W_o stays
    offset    one constant vector on every post-RoPE key of a head                    softmax does not see q·c

s is a power of two, so the first two change no bit of the logits in any float dtype; the offset costs the rounding of a
larger sum, in float32 some 1e-6 of the scores. Bars on injected models are ratios between methods only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from quire.errors import ConfigError

SCALE = 8.0
PAIRS = 2
OFFSET = 4.0
_PROBE_TOKENS = 48
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest change of logits in their standard deviations; 0.05 for 16-bit models."""


@dataclass
class Injection:
    """What was put into a model. Undo with `undo()` or `with`; `bind` every runner that is opened over the model.

    Args:
        offsets: layer to the constant `[H_kv, D]` of its keys.
        pairing: "half" or "interleaved": which channels RoPE turns together.
    """

    offsets: Mapping[int, torch.Tensor] = field(default_factory=dict)
    pairing: str = "half"
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def bind(self, runner: Any) -> None:
        """Makes a runner's cache add the offsets to the keys that it stores."""
        runner.bridge.key_offsets = self.offsets

    def undo(self) -> None:
        """Gives the weights back as they were, bit for bit. Idempotent."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


def inject(
    model: Any,
    *,
    scale: float = SCALE,
    pairs: int = PAIRS,
    offset: float = OFFSET,
    seed: int = 0,
) -> Injection:
    """Injects all three kinds of outliers, in place.

    Args:
        model: a loaded causal transformers model, not attached.
        scale: s, a power of two.
        pairs: RoPE pairs per KV head.
        offset: norm of the constant over the mean norm of the head's keys before the other outliers; 0 for none.

    Raises:
        ConfigError: a model whose function would change or whose projections are not known; it is left as it was.
    """
    if scale <= 0 or math.frexp(scale)[0] != 0.5:
        raise ConfigError(f"scale must be a power of two, not {scale:g}; 8 is the default")
    check_injectable(model)
    before, norms = _logits(model), _key_norms(model)
    reasons: list[str] = []
    for pairing in ("half", "interleaved"):
        made = Injection(pairing=pairing)
        rng = torch.Generator().manual_seed(seed)
        try:
            for part in _projections(model):
                _scale_heads(part, made, pairing, scale, pairs, rng)
            change = _change(before, _logits(model))
            if change > _TOLERANCE.get(model.dtype, 0.05):
                raise ConfigError(f"its logits change by {change:.2g} standard deviations")
            grown = _key_norms(model)
            if any(bool((grown[i] <= norms[i] * 1.01).any()) for i in norms) and scale > 1:
                raise ConfigError("its cached keys do not grow")
        except BaseException as e:
            made.undo()
            if not isinstance(e, ConfigError):
                raise
            reasons.append(f"{pairing} pairs: {e}")
            continue
        if offset:
            made.offsets = {i: _offset(x, offset, rng) for i, x in norms.items()}
        return made
    raise ConfigError(
        f"{type(model).__name__} cannot take injected outliers: {'; '.join(dict.fromkeys(reasons))}"
    )


def check_injectable(model: Any) -> None:
    """Refuses models for which a constant on all keys is not invisible, or that keep no keys. Raises ConfigError."""
    config = model.config.get_text_config(decoder=True)
    why = None
    if getattr(config, "attn_logit_softcapping", None):
        why = "it caps its attention scores, and a capped softmax sees a constant on all keys"
    elif any(n.rsplit(".", 1)[-1] == "sinks" for n, _ in model.named_parameters()):
        why = "it has learned sink logits, which a constant on all keys would move against the rest"
    elif getattr(config, "kv_lora_rank", None):
        why = "it caches latents (MLA), not keys and values"
    if why:
        raise ConfigError(f"{type(model).__name__} cannot take injected outliers: {why}")


# -- projections -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A parameter by its place: a layer that is packed meanwhile holds another tensor, and afterwards yet another."""

    module: torch.nn.Module
    name: str
    columns: bool = False

    @property
    def rows(self) -> torch.Tensor:
        """What is there now; with `columns` its columns as rows."""
        data: torch.Tensor = getattr(self.module, self.name).data
        return data.T if self.columns else data


@dataclass
class _Attention:
    """One attention module's weights as rows per head.

    Args:
        q, k, v: (weight or bias, function from (head, channel) to its row) of each projection.
        out: W_o; its column `head * width + channel` reads that channel of a query head.
        norms: the weights of q's and k's norm, where there are some, and what is added to them before they multiply.
        rotated: how many leading channels RoPE turns; the head's width where none is.
    """

    heads: int
    kv_heads: int
    width: int
    rotated: int
    q: list[tuple[_Held, Callable[[int, int], int]]]
    k: list[tuple[_Held, Callable[[int, int], int]]]
    v: list[tuple[_Held, Callable[[int, int], int]]]
    out: _Held
    norms: tuple[_Held, _Held, float] | None


_OUT = ("o_proj", "out_proj", "dense")
_NORMS = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("query_layernorm", "key_layernorm"),
)


def _projections(model: Any) -> Iterator[_Attention]:
    """Every attention module once. Raises ConfigError where one is not made of plain Linear layers."""
    found = False
    for module in model.modules():
        out = next((n for n in _OUT if hasattr(module, n)), None)
        fused = next((n for n in ("qkv_proj", "query_key_value") if hasattr(module, n)), None)
        if out is None or not (fused or (hasattr(module, "k_proj") and hasattr(module, "q_proj"))):
            continue
        found = True
        yield _attention(model, module, out, fused)
    if not found:
        raise ConfigError("no attention with q_proj, k_proj, v_proj, qkv_proj or query_key_value")


def _attention(model: Any, module: Any, out: str, fused: str | None) -> _Attention:
    config = model.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    names = [fused] if fused else ["q_proj", "k_proj", "v_proj"]
    layers: dict[str, Any] = {n: getattr(module, n, None) for n in [*names, out]}
    for name, layer in layers.items():
        if type(layer) is not torch.nn.Linear or layer.weight.is_meta:
            kind = "missing" if layer is None else f"a {type(layer).__name__}"
            raise ConfigError(f"{name} is {kind}, not a plain Linear")
    w_out: torch.Tensor = layers[out].weight
    width = int(w_out.shape[1]) // heads
    rows = {n: layers[n].weight.shape[0] for n in names}
    want = sum(rows.values())
    if want != (heads + 2 * kv_heads) * width:
        raise ConfigError(
            f"its projections have {want} rows, not those of {heads} heads and {kv_heads} KV heads"
        )

    def parts(name: str, row: Callable[[int, int], int]) -> Any:
        layer = layers[name]
        return [(_Held(layer, n), row) for n in ("weight", "bias") if getattr(layer, n) is not None]

    def simple(head: int, c: int, first: int = 0) -> int:
        return (first + head) * width + c

    if fused == "qkv_proj":
        q = parts(fused, simple)
        k = parts(fused, lambda h, c: simple(h, c, heads))
        v = parts(fused, lambda h, c: simple(h, c, heads + kv_heads))
    elif fused:
        q, k, v = (
            parts(fused, lambda h, c, i=i: (3 * h + i) * width + c)  # type: ignore[misc]
            for i in range(3)
        )
    else:
        q, k, v = (parts(n, simple) for n in names)
    return _Attention(
        heads,
        kv_heads,
        width,
        _rotated(model, width),
        q,
        k,
        v,
        _Held(layers[out], "weight", columns=True),
        _norms(module, width),
    )


def _norms(module: Any, width: int) -> tuple[_Held, _Held, float] | None:
    """Weights of the norms on q and k: of one head for all, or of each head's own channels."""
    for a, b in _NORMS:
        q, k = getattr(module, a, None), getattr(module, b, None)
        if q is None or k is None:
            continue
        wq, wk = getattr(q, "weight", None), getattr(k, "weight", None)
        if wq is None or wk is None or wq.ndim != 1 or len(wq) % width or len(wk) % width:
            raise ConfigError(f"the weights of {a} and {b} are not per channel")
        if getattr(q, "bias", None) is not None or getattr(k, "bias", None) is not None:
            raise ConfigError(f"{a} and {b} have biases")
        return _Held(q, "weight"), _Held(k, "weight"), _added(k)
    return None


@torch.inference_mode()
def _added(norm: Any) -> float:
    """1 for norms that multiply by 1 + weight (Gemma), 0 for those that multiply by their weight: asked of the norm."""
    w = norm.weight.float()
    x = torch.linspace(1.0, 2.0, len(w), device=w.device).to(norm.weight.dtype)
    gain = norm(x).float() / x.float()
    gain, plus = gain / gain.norm(), 1 + w
    return float((gain - plus / plus.norm()).norm() < (gain - w / w.norm().clamp_min(1e-9)).norm())


def _rotated(model: Any, width: int) -> int:
    """How many channels of a head RoPE turns."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            return min(width, 2 * int(buffer.numel()))
    return width


def _scale_heads(
    part: _Attention, made: Injection, pairing: str, scale: float, pairs: int, rng: torch.Generator
) -> None:
    share, half = part.heads // part.kv_heads, part.rotated // 2
    common = part.norms is not None and len(part.norms[1].rows) == part.width
    chosen: list[int] = []
    for head in range(part.kv_heads):
        if not chosen or not common:  # one norm for all heads has room for one choice
            chosen = []
            for i in torch.randperm(half, generator=rng)[:pairs].tolist():
                chosen += [i, i + half] if pairing == "half" else [2 * i, 2 * i + 1]
            if part.norms is not None:
                own = 0 if common else head
                at = [own * part.width + c for c in chosen]
                _times(made, part.norms[1], at, scale, part.norms[2])
                queries = [0] if common else range(head * share, (head + 1) * share)
                at = [h * part.width + c for h in queries for c in chosen]
                _times(made, part.norms[0], at, 1 / scale, part.norms[2])
        if part.norms is None:
            for t, row in part.k:
                _times(made, t, [row(head, c) for c in chosen], scale)
            for t, row in part.q:
                at = [row(h, c) for h in range(head * share, (head + 1) * share) for c in chosen]
                _times(made, t, at, 1 / scale)
        c = int(torch.randint(part.width, (1,), generator=rng))
        for t, row in part.v:
            _times(made, t, [row(head, c)], scale)
        columns = [h * part.width + c for h in range(head * share, (head + 1) * share)]
        _times(made, part.out, columns, 1 / scale)


@torch.no_grad()
def _times(
    made: Injection, held: _Held, rows: list[int], factor: float, added: float = 0.0
) -> None:
    """Multiplies rows in place (`added` to them) and remembers how they were."""
    tensor = held.rows
    at = torch.tensor(rows, device=tensor.device)
    before = tensor[at].clone()

    def back() -> None:
        with torch.no_grad():
            held.rows[at] = before

    tensor[at] = (before + added) * factor - added
    made._undo.append(back)  # noqa: SLF001 - the injection's own


# -- probing -----------------------------------------------------------------------------------------------------


def _probe_ids(model: Any) -> torch.Tensor:
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    return torch.tensor(
        [[(7 * i + 3) % vocab for i in range(1, _PROBE_TOKENS)]], device=model.device
    )


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    """Of a few tokens, without a cache."""
    out: torch.Tensor = model(input_ids=_probe_ids(model), use_cache=False).logits.float()
    return out


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((before - after).abs().max() / before.std().clamp_min(1e-9))


@torch.inference_mode()
def _key_norms(model: Any) -> dict[int, torch.Tensor]:
    """Per layer the mean norm of each head's keys as cached, `[H_kv, D]` ones times it, in their dtype."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(input_ids=_probe_ids(model), past_key_values=cache, use_cache=True)
    found = {}
    for layer, kept in enumerate(cache.layers):
        keys = getattr(kept, "keys", None)
        if keys is not None and keys.ndim == 4:
            norms = keys[0].float().norm(dim=-1).mean(-1, keepdim=True)
            found[layer] = norms.expand(-1, keys.shape[3]).to(keys.dtype)
    return found


def _offset(norms: torch.Tensor, offset: float, rng: torch.Generator) -> torch.Tensor:
    """A random direction per head, `offset` times as long as its mean key."""
    direction = torch.randn(norms.shape, generator=rng).to(norms.device)
    direction /= direction.norm(dim=-1, keepdim=True)
    return (direction * norms.float() * offset).to(norms.dtype)
