"""How fast matrices are multiplied here, and what a prompt multiplies: its measure, as memory's speed is a step's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from quire.bench.machine import timed
from quire.models.forward import windows_of
from quire.models.prepack import Prepacked, unserved

__all__ = ["SHAPE", "Product", "prompt_work"]

SHAPE = 1024, 2048, 2048
"""Rows, inner width and columns: what a layer of a 1 B model multiplies for a chunk of a prompt."""


CHOOSING_ROWS = 64
"""Of the products that are timed to choose among the forms."""


class Product:
    """A product of two matrices, in the fastest form that is at hand: torch's own, or packed as linear layers are.

    Args:
        dtype: of the matrices, and of the result.
        shape: rows, inner width, columns.

    Cost: a few products.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, int, int] = SHAPE) -> None:
        rows, k, n = shape
        self.work = 2 * rows * k * n
        """Multiplications and additions."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(rows, k, generator=draw).to(dtype)
        layer = _Layer(torch.randn(n, k, generator=draw).to(dtype))
        plain = layer.inner.weight.detach()
        self.forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "torch": partial(linear, weight=plain)
        }
        if unserved(layer) is None:
            Prepacked(layer).pack_layers()
            self.forms["packed"] = layer.inner
        # few rows: torch's own product is slow where the processor knows no bfloat16
        few = x[:CHOOSING_ROWS]
        seconds = {n: self._least(partial(form, few)) for n, form in self.forms.items()}
        self.form = min(seconds, key=seconds.__getitem__)
        """Which one is fastest."""
        self._multiply = partial(self.forms[self.form], x)

    def gflop_per_s(self) -> float:
        """The better of two products, in 10^9 multiplications and additions a second."""
        return self.work / self._least(self._multiply) / 1e9

    @torch.inference_mode()
    def run(self) -> None:
        """One product."""
        self._multiply()

    @torch.inference_mode()
    def _least(self, form: Callable[[], object]) -> float:
        return min(timed(form) for _ in range(2))


class _Layer(nn.Module):
    """A linear layer as a model holds one."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        n, k = weight.shape
        self.inner = nn.Linear(k, n, bias=False, device="meta")
        self.inner.weight = nn.Parameter(weight, requires_grad=False)
        self.dtype, self.device = weight.dtype, weight.device


def prompt_work(runner: Any, n_tokens: int) -> int | None:
    """Multiplications and additions of a prompt: linear layers, and attention over what each query reads.

    The head answers one position. None where there is more that is not counted: experts, convolutions, latents.
    """
    model, bridge = runner.model, getattr(runner, "bridge", None)
    config = model.config.get_text_config(decoder=True)
    held = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    head, products, counted = model.get_output_embeddings(), 0, 0
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    counted += sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    for m in model.modules():
        if isinstance(m, nn.Linear):
            products += m.in_features * m.out_features * (1 if m is head else n_tokens)
            counted += 0 if id(m.weight) in tables else m.weight.numel()
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    if bridge is None or bridge.has_state or experts or counted != held:
        return None
    layers = bridge.layers()
    if any(names != ("k", "v") for _, names in layers):
        return None
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = sum(_pairs(n_tokens, _window(bridge, layer)) for layer, _ in layers)
    return int(2 * (products + 2 * heads * width * pairs))


def _window(bridge: Any, layer: int) -> int | None:
    """Of a layer's queries; the raw window beside what is coded is not one."""
    groups = [g for g in bridge.layout.spec.groups if layer in g.layers]
    widths = [windows_of([g])[layer] for g in groups]
    return None if None in widths else max(w for w in widths if w is not None)


def _pairs(n_tokens: int, window: int | None) -> int:
    """Of a query and a key that it reads."""
    w = min(n_tokens, window or n_tokens)
    return w * (w + 1) // 2 + (n_tokens - w) * w
