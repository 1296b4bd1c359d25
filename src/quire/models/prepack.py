"""Linear layers whose weights lie as a product reads them fastest.

A decode step reads every weight once. torch's plain path in bfloat16 reads them at a fraction of the memory's speed.
Where the processor has oneDNN's bfloat16 (AVX-512), oneDNN reorders the weights once, and its product over them gives
the same bits, faster up to some 32 rows and no slower beyond; with bfloat16 dot products our kernel reads the same
blocks in place for up to 16 rows, with a matrix unit (AMX) for up to 32. Everywhere else torch has no fast product in
bfloat16 for any number of rows, and our kernel (see `panels`) takes all of them: the same weights, sums in float32 in
another order. Where our kernel multiplies, layers that share an input are one call of it (see `siblings`), and small
operations between layers are calls of other kernels (see `small`).

The packed weight takes the plain one's place, layer by layer, so memory does not double; `Prepacked.restore` puts back
the same bits, or, where they were rounded to 8 or 4, what they were rounded to. A weight that something else holds too
(an embedding tied to the head), and a layer that is more than an `nn.Linear` (quantised, carrying an adapter, replaced
by its owner) stay as they are.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quire.errors import ConfigError
from quire.kernels import native
from quire.models.panels import (
    Laid,
    PanelWeight,
    blocks_of,
    laid_out,
    multiplier,
    panel_forward,
)
from quire.models.siblings import join, siblings, watched
from quire.models.small import Small

__all__ = ["WEIGHTS", "Prepacked", "check_weights", "is_packed", "prepack", "unserved"]

log = logging.getLogger("quire")

WEIGHTS = ("auto", "plain", "prepacked", "int8", "int4")
"""auto: prepacked where it pays, that is in bfloat16 on a CPU; int8: packed, rounded to 8 bits, a scale per output;
int4: to 4 bits, a scale per 32 inputs of an output, and the head to 8."""

BITS = {"prepacked": 16, "int8": 8, "int4": 4}
"""Of a weight, by what it was packed into."""

_ROUNDED_TOLERANCE = {"int8": 0.4, "int4": 1.0}
"""Largest root mean square difference of logits after rounding, in their standard deviations: far above what rounding
does, and far below what a mistake does, after which they have nothing to do with each other (1.4)."""

TOLERANCE = {torch.bfloat16: 0.2, torch.float32: 2e-3}
"""Largest difference of logits after packing, in their standard deviations: the model's own rounding."""


_OUR_ROWS = {5: range(1, 17), 6: range(1, 33)}
"""Where oneDNN falls below the memory's speed, by the level of the kernels: with bfloat16 dot products, with AMX."""

TOGETHER_ROWS = range(1, 65)
"""Where layers that share an input are multiplied in one call; beyond, a call costs nothing beside its product."""


def check_weights(weights: str) -> None:
    """Raises ConfigError for an unknown choice."""
    if weights not in WEIGHTS:
        raise ConfigError(f"unknown weights {weights!r}; known: {', '.join(WEIGHTS)}")


def prepack(model: Any, weights: str = "auto") -> Prepacked | None:
    """Packs a model's linear layers, where that is asked for or pays.

    Args:
        model: a causal transformers model in eval mode.
        weights: one of `WEIGHTS`.

    Returns:
        What was changed; None: nothing was.

    Raises:
        ConfigError: "prepacked", "int8" or "int4" cannot be had here; says why.

    Cost: one pass over the weights, and two forwards of a few tokens that must agree.
    """
    check_weights(weights)
    if weights == "plain":
        return None
    rounded = weights in _ROUNDED_TOLERANCE
    reason = unserved(model) or (_not_rounded(model) if rounded else None)
    if weights == "auto" and (reason or model.dtype != torch.bfloat16):
        return None
    if reason is None:
        packed = Prepacked(model)
        reason = packed.pack()
        if reason is None and rounded:  # what takes packed weights takes rounded ones
            packed.restore()
            reason = packed.pack(weights)
        if reason is None:
            return packed
    if weights == "auto":
        log.info("%s: weights stay plain: %s", type(model).__name__, reason)
        return None
    raise ConfigError(f"weights {weights!r}: {reason}; use auto or plain")


def unserved(model: Any) -> str | None:
    """Why there are no packed weights for a model, or a layer, of this dtype here; None: there are."""
    if model.device.type != "cpu":
        return f"they are for CPUs, and the model is on {model.device}"
    if model.dtype not in TOLERANCE:
        name = str(model.dtype).removeprefix("torch.")
        return f"they are for bfloat16 and float32, and the model computes in {name}"
    if model.dtype != torch.bfloat16 and not torch.backends.mkldnn.is_available():
        return "this build of torch comes without oneDNN"
    if model.dtype == torch.bfloat16 and not (_onednn_serves_bf16() or native.load()):
        return "this processor has no bfloat16 in oneDNN, and the CPU kernels were not built"
    return None


def _not_rounded(model: Any) -> str | None:
    """Why there are no weights of 8 or 4 bits for this model here."""
    if native.load() is None:
        return "the CPU kernels were not built, and torch's own products of 8 or 4 bits are slower than plain ones"
    if model.dtype != torch.bfloat16:
        name = str(model.dtype).removeprefix("torch.")
        return f"they are for models that compute in bfloat16, and this one computes in {name}"
    return None


def _onednn_serves_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is one that `Prepacked` put in a plain one's place."""
    return isinstance(weight, PanelWeight) or weight.is_mkldnn


class Prepacked:
    """A model's linear layers while their weights are packed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._layers = _packable(model)
        self._packed: list[tuple[nn.Linear, bool]] = []
        self._laid: dict[nn.Linear, Laid] = {}
        """Those that our kernel multiplies."""
        self._siblings: list[list[nn.Linear]] = []
        self._joined: list[tuple[nn.Linear, Callable[[Tensor], Tensor]]] = []
        self.small = Small(model)
        self.form = "prepacked"
        """What the layers hold: one of `BITS`."""

    @property
    def n_layers(self) -> int:
        """Layers that are packed now."""
        return len(self._packed)

    def layers(self) -> list[nn.Linear]:
        """Those that are packed now."""
        return [m for m, _ in self._packed]

    @property
    def n_bytes(self) -> int:
        """Of their weights."""
        weights = [m.weight for m, _ in self._packed]
        return sum(
            w.held_bytes if isinstance(w, PanelWeight) else w.numel() * w.element_size()
            for w in weights
        )

    def pack(self, form: str = "prepacked") -> str | None:
        """Packs the layers in one of the forms of `BITS`, and compares the model with itself.

        Returns:
            None; or why they were left as they were.
        """
        if not self._layers:
            return "none of this model's layers is a plain linear layer with a weight of its own"
        with watched(self._layers) as calls:
            before = _logits(self.model)
        self._siblings = siblings(self.model, calls)
        del calls
        found = math.inf
        try:
            self.pack_layers(form)
            self.join()
            for lend in (
                self.small.replace,
                self.small.undo,
            ):  # where norms decide too much they stay the model's own
                lend()
                found, most = _apart(_logits(self.model), before, form, self.model.dtype)
                if found <= most:
                    return None
        except Exception as e:  # noqa: BLE001 - a model whose code reads the weight itself may raise anything
            self.restore()
            return f"the model's own code does not take them ({' '.join(str(e).split())[:120]})"
        self.restore()
        return f"logits differ by {found:.2g} standard deviations"

    def pack_layers(self, form: str = "prepacked") -> None:
        """Packs the layers and asks nothing."""
        self.form = form
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        for layer in self._layers:
            bits = BITS[form]
            self._pack(layer, 8 if layer is head and bits < 8 else bits)

    def join(self) -> None:
        """Lets layers that share an input be multiplied in one call, where our kernel takes them. Idempotent."""
        self.part()
        onednn = next((m for m, _ in self._packed if m.weight.is_mkldnn), None)
        rows = TOGETHER_ROWS if onednn is None else _our_rows()
        for group in self._siblings:
            laid = [self._laid[m] for m in group if m in self._laid]
            if len(laid) == len(group) and len({x.words for x in laid}) == 1:
                self._joined += join(group, multiplier(*laid), rows)

    def part(self) -> None:
        """Gives every layer a call of its own. Idempotent."""
        while self._joined:
            layer, own = self._joined.pop()
            object.__setattr__(layer, "forward", own)

    @torch.inference_mode(mode=False)
    def _pack(self, layer: nn.Linear, bits: int) -> None:
        plain, bias = layer.weight, layer.bias
        if bits == 16 and (plain.dtype != torch.bfloat16 or _onednn_serves_bf16()):
            weight = torch.ops.mkldnn._reorder_linear_weight(plain.detach())
            laid = _in_place(weight, plain, bias)
            forward = _forward(weight, bias, laid)
        else:
            weight = PanelWeight.of(plain.detach(), bits)
            laid = laid_out(weight, bias)
            forward = panel_forward(weight, bias)
        if laid is not None:
            self._laid[layer] = laid
        self._packed.append((layer, plain.requires_grad))
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        object.__setattr__(layer, "forward", forward)

    @torch.inference_mode(mode=False)
    def restore(self) -> None:
        """Gives every layer its weight back: bit for bit, or as rounded to 8 or 4 bits where it was. Idempotent."""
        self.small.undo()
        self.part()
        self._laid.clear()
        while self._packed:
            layer, trained = self._packed.pop()
            weight = layer.weight.detach()
            plain = weight.plain() if isinstance(weight, PanelWeight) else weight.to_dense()
            layer._parameters["weight"] = nn.Parameter(plain, requires_grad=trained)
            object.__delattr__(layer, "forward")


def _apart(after: Tensor, before: Tensor, form: str, dtype: torch.dtype) -> tuple[float, float]:
    """How far logits are from what they were, in their standard deviations, and how far they may be."""
    apart = (after - before) / before.std().clamp_min(1e-9)
    if form in _ROUNDED_TOLERANCE:
        return float(apart.square().mean().sqrt()), _ROUNDED_TOLERANCE[form]
    return float(apart.abs().max()), TOLERANCE[dtype]


def _our_rows() -> range:
    """How many rows our kernel multiplies of weights that oneDNN packed."""
    library = native.load()
    return range(0) if library is None else _OUR_ROWS.get(library.isa, range(0))


def _in_place(weight: Tensor, plain: Tensor, bias: Tensor | None) -> Laid | None:
    """oneDNN's blocks for our kernel, where the processor has the instructions that it gains from and they are panels.

    A processor without bfloat16 dot products multiplies in float32, which oneDNN does as well as we.
    """
    if not _our_rows() or plain.dtype != torch.bfloat16:
        return None
    address, n_bytes = torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight)
    found = blocks_of(address, n_bytes, plain)
    if found is None or (bias is not None and bias.dtype != torch.bfloat16):
        return None
    panel, words = found
    n, k = plain.shape
    return Laid(address, weight, n, k, words, panel, bias=bias)


def _forward(
    weight: Tensor, bias: Tensor | None, laid: Laid | None = None
) -> Callable[[Tensor], Tensor]:
    """`F.linear` over a weight that oneDNN packed; where gradients are wanted, over a plain copy."""
    multiply = partial(
        torch.ops.mkldnn._linear_pointwise.default, attr="none", scalars=[], algorithm=""
    )
    k, ours = weight.shape[1], _our_rows()
    in_place = None if laid is None else multiplier(laid)

    def forward(input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        if torch.is_grad_enabled() and (
            input.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return linear(input, weight.to_dense(), bias)
        if in_place is not None and input.numel() // k in ours and input.dtype == weight.dtype:
            return in_place(input)[0]
        out: Tensor = multiply(input, weight, bias)
        return out

    return forward


def _packable(model: nn.Module) -> list[nn.Linear]:
    """Linear layers that are nothing more, with a weight that nobody else holds."""
    held = Counter(
        p.data_ptr()
        for _, p in model.named_parameters(remove_duplicate=False)
        if p.numel() and not is_packed(p)  # by somebody else, who gives it back
    )
    wrappers = [
        m for m in model.modules() if hasattr(m, "base_layer")
    ]  # of adapters, which merge into the weight
    adapted = {id(inner) for m in wrappers for inner in m.modules()}
    found = []
    for parent in model.modules():
        for name, m in parent.named_children():
            if (
                type(m) is nn.Linear
                and id(m) not in adapted
                and "forward" not in m.__dict__
                and not is_packed(m.weight)
                and m.weight.dtype in TOLERANCE
                and m.weight.numel()
                and held[m.weight.data_ptr()] == 1
                and not (name == "kv_b_proj" and getattr(parent, "quire_absorbed", False))
            ):
                found.append(m)
    return list(dict.fromkeys(found))


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """Of a few tokens, without any cache."""
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.tensor([[(7 * i + 3) % vocab for i in range(1, 12)]], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits
