"""Which adapters a model wears just now, as a digest: for `generate()`, which does not say.

PEFT's layers (and transformers' integration, which uses them) say of themselves which adapters are active, disabled or
merged. That and the weights of the active ones are digested when a `generate()` begins: a switch, other weights under
the same name, a merge make other names, for they are what blocks depend on beside the model that was opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import torch

from quire.models.load import fingerprint, full_digest

__all__ = ["KINDS", "Worn"]

KINDS = frozenset(
    (
        "LORA",
        "ADALORA",
        "IA3",
        "LOHA",
        "LOKR",
        "OFT",
        "BOFT",
        "VERA",
        "HRA",
        "FOURIERFT",
        "LN_TUNING",
    )
)
"""PEFT's types that add the same to every forward; others add prompts, or choose by what they read."""

State = tuple[tuple[Any, ...], ...]


class Worn:
    """The adapters in a model's layers.

    Args:
        model: the transformers model, which holds the adapted layers.
        given: the same, or the wrapper around it, which knows their types.
        packed: linear layers were packed, so that their weights cannot be read, nor merged into.
    """

    def __init__(self, model: Any, given: Any, *, packed: bool = False) -> None:
        self.model, self.given, self.packed = model, given, packed
        self._layers = self._find()
        self._known: tuple[object, bytes] | None = None
        self._hooks = {id(m): _hooks(m) for _, m in self._layers}
        self._merged = self._merges()

    def unknown(self) -> str | None:
        """The type of an adapter that may add something else to every forward; None where there is none."""
        configs = getattr(self.given, "peft_config", None) or {}
        types = (getattr(c, "peft_type", "") for c in configs.values())
        names = (str(getattr(t, "value", t)) for t in types)
        return next((n for n in names if n not in KINDS), None)

    def digest(self) -> bytes | None:
        """What a forward adds to the weights as they were opened; empty where nothing can be added, None if unknown.

        Unknown are adapters that depend on more than the model (chosen by row, or by a word in the text), and training.

        Cost: a look at every module, and a sample of the weights of adapters and adapted layers; all of the adapters'
        only where those were touched.
        """
        self._layers = self._find()
        if not self._layers:
            return b""
        if self.unknown() is not None or any(self._depends(m) for _, m in self._layers):
            return None
        if self.packed and self._merged != self._merges():
            return None
        said = [(name, *one) for (name, _), one in zip(self._layers, self.state(), strict=True)]
        parts = [x for name, m in self._layers for x in _parts(name, m)]
        said += [(name, repr(x)) for name, x in parts if not isinstance(x, torch.Tensor)]
        weights = [(name, x) for name, x in parts if isinstance(x, torch.Tensor)]
        touched = tuple((x.data_ptr(), x._version) for _, x in weights)
        bases = [] if self.packed else [x for name, m in self._layers for x in _base(name, m)]
        seen = repr(said), touched, fingerprint(weights), fingerprint(bases)
        if self._known is None or self._known[0] != seen:
            about = (seen[0], full_digest(weights), seen[3])
            self._known = seen, sha256(repr(about).encode()).digest()
        return self._known[1]

    def state(self) -> State:
        """What the layers of the last `digest` say of themselves now. Cost: about a microsecond a layer."""
        return tuple(_says(m) for _, m in self._layers)

    def _find(self) -> list[tuple[str, Any]]:
        return [
            (name, m)
            for name, m in self.model.named_modules()
            if hasattr(m, "adapter_layer_names") and hasattr(m, "active_adapters")
        ]

    def _depends(self, m: Any) -> bool:
        """Whether what a layer adds depends on the call: PEFT tells of rows and invocations by hooks for its length."""
        return bool(m.training) or _hooks(m) > self._hooks.get(id(m), 0)

    def _merges(self) -> list[tuple[str, ...]]:
        return [tuple(getattr(m, "merged_adapters", ())) for _, m in self._layers]


def _hooks(m: Any) -> int:
    return len(m._forward_pre_hooks)


def _active(m: Any) -> tuple[str, ...]:
    found = m.active_adapters
    return (found,) if isinstance(found, str) else tuple(found)


def _says(m: Any) -> tuple[Any, ...]:
    disabled = bool(getattr(m, "disable_adapters", False))
    merged = tuple(getattr(m, "merged_adapters", ()))
    active = () if disabled else _active(m)
    scaling = getattr(m, "scaling", None)
    scales = tuple(repr(scaling.get(a)) for a in active) if isinstance(scaling, dict) else ()
    return disabled, active, merged, scales


def _parts(name: str, m: Any) -> Iterator[tuple[str, Any]]:
    """What a layer's active adapters consist of: tensors, and numbers and words that say how they are used."""
    for adapter in _says(m)[1]:
        for attribute in (*m.adapter_layer_names, *getattr(m, "other_param_names", ())):
            holder: Any = getattr(m, attribute, None)
            if not hasattr(holder, "keys") or adapter not in holder:
                continue
            part, at = holder[adapter], f"{name}.{attribute}.{adapter}"
            if isinstance(part, torch.nn.Module):
                yield from ((f"{at}.{key}", x) for key, x in part.state_dict().items())
            elif isinstance(part, (torch.Tensor, int, float, str)):
                yield at, part


def _base(name: str, m: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that an adapter can be merged into."""
    layer = getattr(m, "base_layer", None)
    if isinstance(layer, torch.nn.Module):
        yield from ((f"{name}.{n}", p) for n, p in layer.named_parameters())
