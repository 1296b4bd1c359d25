"""Quire: the KV cache for transformer inference as one system.

    import quire
    quire.attach(model, kv="bf16")        # an ordinary Hugging Face model; its own generate() now uses the cache

The names below are the public surface. They are imported on first use (PEP 562), so that `import quire` costs
milliseconds and never imports torch; only touching `attach`, `KVCache` or `Engine` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.cache import KVCache, attach
    from quire.engine import Engine, SamplingParams
    from quire.errors import (
        CapacityError,
        ConfigError,
        InvariantError,
        QuireError,
        RequestError,
        TierError,
    )
    from quire.spec import CacheSpec, KVConfig

__version__ = "0.1.0"

__all__ = [
    "CacheSpec",
    "CapacityError",
    "ConfigError",
    "Engine",
    "InvariantError",
    "KVCache",
    "KVConfig",
    "QuireError",
    "RequestError",
    "SamplingParams",
    "TierError",
    "__version__",
    "attach",
]

_HOMES = {
    "CacheSpec": "quire.spec",
    "CapacityError": "quire.errors",
    "ConfigError": "quire.errors",
    "Engine": "quire.engine",
    "InvariantError": "quire.errors",
    "KVCache": "quire.cache",
    "KVConfig": "quire.spec",
    "QuireError": "quire.errors",
    "RequestError": "quire.errors",
    "SamplingParams": "quire.engine",
    "TierError": "quire.errors",
    "attach": "quire.cache",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in, once."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names without importing what they stand for."""
    return sorted(set(globals()) | set(__all__))
