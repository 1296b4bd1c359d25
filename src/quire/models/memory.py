"""How large an arena is: bytes, text with a unit, or a share of what the device has free."""

from __future__ import annotations

import re

import psutil
import torch

from quire.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def free_bytes(device: torch.device | str) -> int:
    """Bytes that the device could still give."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def total_bytes(device: torch.device | str) -> int:
    """Bytes that the device has in all."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def arena_bytes(memory: int | float | str, device: torch.device | str) -> int:
    """Resolves a memory argument.

    Args:
        memory: an integer is bytes, a float in (0, 1] a share of free memory; text may be either, or `"8GiB"`, `"50%"`.

    Raises:
        ConfigError: not one of these, or more than the device has.
    """
    if isinstance(memory, str):
        memory = parse_memory(memory)
    if isinstance(memory, bool) or memory <= 0:
        raise ConfigError(
            f"memory must be above zero, not {memory!r}; for example 8GiB, 0.5 or 50%"
        )
    if isinstance(memory, float):
        if memory > 1:
            raise ConfigError(
                f"memory as a share must lie in (0, 1], not {memory}; for bytes give a unit, as in 8GiB"
            )
        return int(memory * free_bytes(device))
    if memory > total_bytes(device):
        raise ConfigError(
            f"memory of {memory:,} bytes is more than the {total_bytes(device):,} that this machine's "
            f"{torch.device(device).type} has; 0.5 takes half of what is free"
        )
    return memory


def parse_memory(text: str) -> int | float:
    """A size in bytes as an integer, a share as a float, out of `"8GiB"`, `"0.5"` or `"50%"`. Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z%]*)\s*", text)
    if found is None:
        raise ConfigError(f"memory {text!r} is not a size; for example 8GiB, 500MB, 0.5 or 50%")
    number, unit = found[1], found[2].lower()
    if unit == "%":
        return float(number) / 100
    if unit not in _UNITS:
        raise ConfigError(
            f"memory {text!r}: unknown unit {found[2]!r}; known: KiB, MiB, GiB, KB, MB, GB, %"
        )
    if not unit and "." in number:
        return float(number)
    return int(float(number) * _UNITS[unit])
