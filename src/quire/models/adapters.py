"""Switching adapters between forwards, for models that carry some: PEFT's wrapper, or transformers' own integration."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quire.errors import ConfigError, RequestError

__all__ = ["Adapters", "check_adapter_folder", "load_adapters", "unwrap"]

_WEIGHTS = "adapter_model.safetensors"


def check_adapter_folder(name: str, folder: Path) -> None:
    """Raises ConfigError, before any model is loaded, where that folder holds no adapter that can be served."""
    where = f"adapter {name!r} at {folder}"
    if re.fullmatch(r"[A-Za-z0-9][\w-]*", name) is None:
        raise ConfigError(f"adapter {name!r}: a name has letters, digits, _ and - only")
    if find_spec("peft") is None:
        raise ConfigError(f"{where} needs the package peft; pip install 'quire[adapters]'")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{where}: there is no readable adapter_config.json") from None
    if kind != "LORA":
        raise ConfigError(f"{where} is of type {kind}; LoRA adapters are served")
    if not (folder / _WEIGHTS).is_file():
        raise ConfigError(f"{where} has no {_WEIGHTS}; other files may hold code and are not read")


def load_adapters(model: Any, folders: Mapping[str, Path]) -> Any:
    """The model in PEFT's wrapper, with these LoRA adapters loaded and none of them active.

    Args:
        model: a causal transformers model.
        folders: of each adapter, by its name; `check_adapter_folder` has looked at them.

    Raises:
        ConfigError: an adapter is of another model.
    """
    import peft
    from safetensors import safe_open

    made: Any = None
    for name, folder in folders.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing is counted below
            try:
                if made is None:
                    made = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name)
                else:
                    made.load_adapter(str(folder), adapter_name=name)
            except (ValueError, RuntimeError, KeyError, TypeError, OSError) as e:
                why = " ".join(str(e).split())[:200]
                raise ConfigError(f"adapter {name!r} does not fit this model: {why}") from e
        with safe_open(folder / _WEIGHTS, "numpy") as file:
            there = {key for key in file.keys() if "lora_" in key}  # noqa: SIM118 - it is no dictionary
        named = (f"{n}." for n, _ in made.named_parameters() if "lora_" in n)
        own = {n.replace(f".{name}.", ".", 1).rstrip(".") for n in named if f".{name}." in n}
        if own != there:
            odd = len(own ^ there)
            raise ConfigError(
                f"adapter {name!r} does not fit this model: {odd} tensors have no counterpart on the other side"
            )
    made.base_model.disable_adapter_layers()
    return made.eval()


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
        # transformers' integration; PEFT's wrapper has layers instead, and passes on what it is asked for
        own = hasattr(type(self.model), "enable_adapters")
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
