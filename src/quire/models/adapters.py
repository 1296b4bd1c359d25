"""Switching adapters between forwards, for models that carry some: PEFT's wrapper, or transformers' own integration."""

from __future__ import annotations

from typing import Any

from quire.errors import RequestError


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, which holds the adapted layers; any other model as it is."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) and hasattr(model, "peft_config") else model


class Adapters:
    """The adapters of one model. `use(None)` is the model as it was when this was made.

    Args:
        model: the model as the user gave it, wrapper and all.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = tuple(getattr(model, "peft_config", None) or ())
        self._now: str | None = None
        self._before: list[str] = []
        if self.names:
            active = model.active_adapters
            found = active() if callable(active) else active
            enabled = not any(
                getattr(m, "disable_adapters", False) is True for m in model.modules()
            )
            self._before = [found] if isinstance(found, str) else list(found) if enabled else []

    def check(self, name: str | None) -> None:
        """Raises RequestError when the model has no adapter of that name."""
        if name is not None and name not in self.names:
            has = f"it has {', '.join(self.names)}" if self.names else "it carries no adapters"
            raise RequestError(f"adapter {name!r} is not one of this model's: {has}")

    def use(self, name: str | None) -> None:
        """Makes one adapter the active one.

        Raises:
            RequestError: the model has none of that name.
        """
        if name == self._now:
            return
        self.check(name)
        self._activate(self._before if name is None else [name])
        self._now = name

    def _activate(self, names: list[str]) -> None:
        own = hasattr(
            self.model, "enable_adapters"
        )  # transformers' integration; PEFT's wrapper has layers instead
        layers = self.model if own else self.model.base_model
        on, off = (
            (layers.enable_adapters, layers.disable_adapters)
            if own
            else (layers.enable_adapter_layers, layers.disable_adapter_layers)
        )
        if not names:
            off()
            return
        on()
        layers.set_adapter(names if len(names) > 1 else names[0])
