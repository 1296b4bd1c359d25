"""Linear layers whose weights lie as oneDNN reads them fastest.

A decode step reads every weight once. torch's plain path in bfloat16 reads them at a fraction of the memory's speed;
the same product over weights reordered once gives the same bits, faster up to some 32 rows and no slower beyond.

The packed weight takes the plain one's place, layer by layer, so memory does not double; `Prepacked.restore` puts back
the same bits. A weight that something else holds too (an embedding tied to the head), and a layer that is more than an
`nn.Linear` (quantised, carrying an adapter, replaced by its owner) stay as they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quire.errors import ConfigError

__all__ = ["WEIGHTS", "Prepacked", "check_weights", "prepack"]

log = logging.getLogger("quire")

WEIGHTS = ("auto", "plain", "prepacked")
"""auto: prepacked where it pays and changes no bit, that is in bfloat16 on a CPU that oneDNN serves in it."""

_TOLERANCE = {torch.bfloat16: 0.2, torch.float32: 2e-3}
"""Largest difference of logits after packing, in their standard deviations: the model's own rounding."""


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
        ConfigError: "prepacked" cannot be had here; says why.

    Cost: one pass over the weights, and two forwards of a few tokens that must agree.
    """
    check_weights(weights)
    if weights == "plain":
        return None
    reason = _unserved(model)
    if weights == "auto" and (reason or model.dtype != torch.bfloat16):
        return None
    if reason is None:
        packed = Prepacked(model)
        reason = packed.pack()
        if reason is None:
            return packed
    if weights == "auto":
        log.info("%s: weights stay plain: %s", type(model).__name__, reason)
        return None
    raise ConfigError(f"weights 'prepacked': {reason}; use auto or plain")


def _unserved(model: Any) -> str | None:
    """Why oneDNN has nothing for this model here."""
    if model.device.type != "cpu":
        return f"they are for CPUs, and the model is on {model.device}"
    if model.dtype not in _TOLERANCE:
        name = str(model.dtype).removeprefix("torch.")
        return f"they are for bfloat16 and float32, and the model computes in {name}"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch comes without oneDNN"
    if model.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 in oneDNN"
    return None


class Prepacked:
    """A model's linear layers while their weights are packed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._layers = _packable(model)
        self._packed: list[tuple[nn.Linear, bool]] = []

    @property
    def n_layers(self) -> int:
        """Layers that are packed now."""
        return len(self._packed)

    @property
    def n_bytes(self) -> int:
        """Of their weights."""
        return sum(m.weight.numel() * m.weight.element_size() for m, _ in self._packed)

    def pack(self) -> str | None:
        """Packs the layers and compares the model with itself.

        Returns:
            None; or why they were left as they were.
        """
        if not self._layers:
            return "none of this model's layers is a plain linear layer with a weight of its own"
        before = _logits(self.model)
        try:
            self.pack_layers()
            worst = float((_logits(self.model) - before).abs().max() / before.std().clamp_min(1e-9))
        except Exception as e:  # noqa: BLE001 - a model whose code reads the weight itself may raise anything
            self.restore()
            return f"the model's own code does not take them ({' '.join(str(e).split())[:120]})"
        if not worst <= _TOLERANCE[self.model.dtype]:
            self.restore()
            return f"logits differ by {worst:.2g} standard deviations"
        return None

    def pack_layers(self) -> None:
        """Packs the layers and asks nothing."""
        for layer in self._layers:
            self._pack(layer)

    @torch.inference_mode(mode=False)
    def _pack(self, layer: nn.Linear) -> None:
        plain = layer.weight
        weight = torch.ops.mkldnn._reorder_linear_weight(plain.detach())
        packed = nn.Parameter(weight, requires_grad=False)
        self._packed.append((layer, plain.requires_grad))
        layer._parameters["weight"] = packed
        object.__setattr__(layer, "forward", _forward(weight, layer.bias))

    @torch.inference_mode(mode=False)
    def restore(self) -> None:
        """Gives every layer its weight back, bit for bit. Idempotent."""
        while self._packed:
            layer, trained = self._packed.pop()
            plain = nn.Parameter(layer.weight.detach().to_dense(), requires_grad=trained)
            layer._parameters["weight"] = plain
            object.__delattr__(layer, "forward")


def _forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`F.linear` over a packed weight; where gradients are wanted, over a plain copy."""
    multiply = partial(
        torch.ops.mkldnn._linear_pointwise.default, attr="none", scalars=[], algorithm=""
    )

    def forward(input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
        if torch.is_grad_enabled() and (
            input.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return linear(input, weight.to_dense(), bias)
        out: Tensor = multiply(input, weight, bias)
        return out

    return forward


def _packable(model: nn.Module) -> list[nn.Linear]:
    """Linear layers that are nothing more, with a weight that nobody else holds."""
    held = Counter(
        p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False) if p.numel()
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
                and m.weight.dtype in _TOLERANCE
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
