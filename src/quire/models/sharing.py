"""What a model's blocks depend on beside their tokens, as digests; and which models can share prefixes at all."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from quire.errors import ConfigError
from quire.models.bridge import Bridge
from quire.models.load import fingerprint
from quire.models.rope import Regimes
from quire.spec import KVConfig
from quire.store.share import parse_share
from quire.store.sharing import Sharing
from quire.store.snapshot import spec_digest

__all__ = ["AdapterDigests", "open_sharing"]


def open_sharing(bridge: Bridge, config: KVConfig) -> Sharing | None:
    """The prefix cache of a bridge's store; None where nothing is to be shared.

    The base of all names is a digest of the weights as loaded (a sample of each), the model's own configuration, the
    dtype, the way into the model and the layout of the blocks.

    Raises:
        ConfigError: keys of this model depend on more than what lies before them, or it keeps recurrent state.
    """
    share = parse_share(config.share)
    if not share.on:
        return None
    model = bridge.model
    kind = Regimes(model).kind
    if kind != "fixed":
        raise ConfigError(
            f"share={config.share!r}: this model's RoPE ({kind}) turns keys by the length of the whole sequence, so "
            "equal beginnings differ; use share='off'"
        )
    if bridge.has_state or not bridge.chunked_prefill:
        raise ConfigError(
            f"share={config.share!r}: this model keeps recurrent state, of which no checkpoints are made yet; "
            "use share='off'"
        )
    about = (
        fingerprint(model.named_parameters()),
        model.config.to_json_string(use_diff=False),
        str(model.dtype),
        bridge.way,
        spec_digest(bridge.layout.spec),
    )
    return Sharing(
        bridge.store,
        sha256(repr(about).encode()).digest(),
        evict=share.evict,
        explain=share.explain,
        ghost=share.ghost,
    )


class AdapterDigests:
    """Digests of a model's adapters, made anew when somebody loads other weights under the same name.

    Args:
        model: with its adapters' parameters named `….NAME.…`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[str, tuple[tuple[tuple[int, int], ...], bytes]] = {}

    def __call__(self, name: str) -> bytes:
        """32 bytes. Cost: a look at every parameter of the adapter; its numbers only when one was touched."""
        part = f".{name}."
        own = [(n, p) for n, p in self.model.named_parameters() if part in f".{n}."]
        state = tuple((p.data_ptr(), p._version) for _, p in own)
        known = self._known.get(name)
        if known is None or known[0] != state:
            digest = sha256(f"{name} {fingerprint(own)}".encode()).digest()
            self._known[name] = known = state, digest
        return known[1]
