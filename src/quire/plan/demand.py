"""How much memory a model, its cache and its users take, and what fits.

    device   |weights|  KV of all users  |activations|allowance|
             0       ^ what is left is the cache's          ^ device_bytes

Bytes of the cache are those of `CacheSpec.blocks_for`, which is what the engine's pools hand out: whole blocks, scales,
raw windows and alignment included. Everything is per rank of a tensor-parallel group and fits when it fits one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from quire.errors import ConfigError
from quire.plan.catalogue import Device
from quire.plan.kept import Kept, refuse_nothing_to_drop
from quire.plan.layout import KVLayer, Layout, StateLayer, build_layout
from quire.plan.shape import ModelShape
from quire.plan.weights import Parameters, weight_bytes
from quire.retention import parse_keep
from quire.spec import DTYPE_BYTES, CacheSpec, Field, KVConfig

PREFILL_TOKENS = 2048
"""Tokens of a step that the activations are counted for."""

SLAB_BYTES = 2 << 20
"""Per size of block, the last slab may stay nearly empty (`store/arena.py`)."""

_MOST_TOKENS = 1 << 32


@dataclass(frozen=True)
class Setup:
    """What is planned.

    Args:
        shape: the model.
        config: codec, retention, block size.
        parameters: of the weights; None where nobody knows them.
        weight_form: one of `weights.BITS`, or "given" with `given_weight_bytes`.
        given_weight_bytes: what the user or the files say instead.
        device: None to ask for bytes alone.
        ranks: devices that share each layer (tensor parallel).
        reserve: share of a device's memory left to the runtime and to fragmentation.
        encoder_tokens: of an encoder-decoder, per request.
        headroom: whether weights, activations and reserve are counted at all; without, the device holds cache only.
    """

    shape: ModelShape
    config: KVConfig
    parameters: Parameters | None = None
    weight_form: str = "bfloat16"
    given_weight_bytes: int | None = None
    device: Device | None = None
    ranks: int = 1
    reserve: float = 0.1
    encoder_tokens: int | None = None
    headroom: bool = True

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ConfigError(f"--tp must be at least 1, not {self.ranks}")
        if not 0 <= self.reserve < 1:
            raise ConfigError(
                f"--reserve is a share of the device in [0, 1), not {self.reserve:g}; 0.1 is the default"
            )


class Demand:
    """The arithmetic of one setup.

    Raises:
        ConfigError: the codec cannot serve this model.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        shape = setup.shape
        self.layout = _layout(shape, shape.layers, setup.config)
        ranks = setup.ranks
        self.rank_layout = (
            self.layout
            if ranks == 1
            else _layout(shape, [_shard(x, ranks) for x in shape.layers], setup.config)
        )
        self._cross = self._encoder_spec()
        self.keep = parse_keep(setup.config.keep)
        self.kept: Kept | None = None
        """What a policy that scores lets one rank hold; None for all others."""
        if not self.keep.full:
            everything = _layout(shape, shape.layers, replace(setup.config, keep="full"))
            refuse_nothing_to_drop(f"keep={self.keep.text!r}", everything.spec)
        if not self.keep.full and not self.keep.spans and not self.keep.reads:
            whole = Kept(self.layout, self.keep.policy).bytes_per_token
            self.kept = Kept(self.rank_layout, self.keep.policy, whole)

    @property
    def spec(self) -> CacheSpec:
        """Groups of the whole model."""
        return self.layout.spec

    # -- the cache -----------------------------------------------------------------------------------------------

    @cached_property
    def bytes_per_token(self) -> float:
        """One cached token in all layers that see it, raw windows aside."""
        spec = self.spec
        raw = {g.raw for g in spec}
        return sum(g.bytes_per_token for g in spec if g.name not in raw)

    @cached_property
    def layer_bytes_per_token(self) -> dict[int, float]:
        """The same by layer; layers with state only, and those that read another's, are not in it."""
        spec = self.spec
        raw = {g.raw for g in spec}
        out: dict[int, float] = {}
        for g in spec:
            if g.recurrent or g.name in raw:
                continue
            for layer in g.layers:
                share = len(g.heads(layer)) / len(g.coords)
                out[layer] = out.get(layer, 0.0) + g.bytes_per_token * share
        return dict(sorted(out.items()))

    @property
    def bytes_per_sequence(self) -> int:
        """State that does not grow with the context, an encoder's keys and values among it."""
        return self.spec.bytes_per_sequence + self._cross_bytes(1)

    def sequence_bytes(self, n_tokens: int) -> int:
        """What one sequence of so many tokens holds on one rank, in whole blocks.

        Under a policy that scores: after its prompt, just before tokens go again.
        """
        return self.cache_bytes(n_tokens) + self._cross_bytes(self.setup.ranks)

    def cache_bytes(self, n_tokens: int) -> int:
        """The same without an encoder's keys and values."""
        if self.kept is not None:
            return self.kept.most_bytes(n_tokens, n_tokens)
        return self.rank_layout.spec.bytes_for(n_tokens)

    def peak_bytes(self, n_tokens: int) -> int:
        """The most that a prompt of so many tokens holds on one rank, until it is computed.

        Under a policy that scores all of it is there, and the copy of what stays; under spans what they need, and a
        chunk of `PREFILL_TOKENS`.
        """
        if self.keep.full:
            return self.sequence_bytes(n_tokens)
        cross = self._cross_bytes(self.setup.ranks)
        if self.kept is not None:
            return self.kept.peak_bytes(n_tokens, PREFILL_TOKENS) + cross
        spec = self.rank_layout.spec
        return spec.bytes_for(n_tokens, chunk_tokens=PREFILL_TOKENS) + cross

    def kept_tokens(self, n_tokens: int) -> int:
        """Of so many tokens those that stay per layer and head on average, where all would by themselves."""
        if self.kept is None or not self.keep.policy.bounded:
            return n_tokens
        return min(n_tokens, self.kept.tokens(n_tokens))

    @cached_property
    def growing_bytes_per_token(self) -> float:
        """What one more token adds for good."""
        if self.kept is None or self.keep.policy.once:
            return self.spec.bytes_per_token
        dropped = sum(g.bytes_per_token for g in Kept(self.layout, self.keep.policy).groups)
        share = self.keep.policy.budget.share if self.keep.policy.bounded else 1.0
        return self.spec.bytes_per_token - (1 - share) * dropped

    def _encoder_spec(self) -> CacheSpec | None:
        shape = self.setup.shape
        if not shape.cross:
            return None
        ranks = self.setup.ranks
        layers = [_shard(x, ranks) for x in shape.cross]
        return _layout(shape, layers, KVConfig(block_tokens=self.setup.config.block_tokens)).spec

    def _cross_bytes(self, ranks: int) -> int:
        shape = self.setup.shape
        if self._cross is None:
            return 0
        tokens = self.setup.encoder_tokens or shape.encoder_tokens
        if tokens is None:
            raise ConfigError(
                f"{shape.name}: an encoder-decoder keeps keys and values of its input too, and the config does not say "
                "how long that is; give --encoder-tokens"
            )
        spec = self._cross
        if ranks == 1 and self.setup.ranks > 1:
            config = KVConfig(block_tokens=self.setup.config.block_tokens)
            spec = _layout(shape, shape.cross, config).spec
        return spec.bytes_for(tokens)

    # -- the device ----------------------------------------------------------------------------------------------

    @cached_property
    def weight_bytes(self) -> int:
        """All weights, over all ranks. Zero only where `headroom` is off."""
        s = self.setup
        if not s.headroom:
            return 0
        if s.given_weight_bytes is not None:
            return s.given_weight_bytes
        if s.parameters is None:
            raise ConfigError(
                f"{s.shape.name}: its weights cannot be counted from its config; give --weights, as in --weights 40GiB"
            )
        return weight_bytes(s.parameters, s.weight_form)

    @cached_property
    def activation_bytes(self) -> int:
        """Per rank: a step's hidden states and the widest layer's, and the logits of one row per token of decode."""
        if not self.setup.headroom:
            return 0
        shape = self.setup.shape
        config = shape.config.get("text_config") or shape.config
        wide = config.get("intermediate_size") or config.get("ffn_dim") or 4 * shape.hidden
        wide = max(wide) if isinstance(wide, list) else int(wide)
        width = DTYPE_BYTES[shape.dtype]
        return PREFILL_TOKENS * width * (4 * shape.hidden + 2 * wide // self.setup.ranks)

    @property
    def device_bytes(self) -> int:
        """Of all ranks together. Raises ConfigError without a device."""
        return self._device.memory_bytes * self.setup.ranks

    @cached_property
    def rank_kv_bytes(self) -> int:
        """What a rank has left for the cache: below zero where the weights alone are too much."""
        s = self.setup
        per_rank = math.ceil(self.weight_bytes / s.ranks) + self.activation_bytes + self.reserved
        per_rank += self.rank_layout.table_bytes
        return self._device.memory_bytes - per_rank

    @property
    def reserved(self) -> int:
        """Per rank: what is left to the runtime and to fragmentation."""
        return int(self._device.memory_bytes * self.setup.reserve) if self.setup.headroom else 0

    @property
    def _device(self) -> Device:
        if self.setup.device is None:
            raise ConfigError("what fits needs a device: --device h100, or --device 8GiB")
        return self.setup.device

    # -- what fits -----------------------------------------------------------------------------------------------

    @cached_property
    def slack_bytes(self) -> int:
        """Slabs that are only partly filled: one per size of block, as the store has them."""
        if not self.setup.headroom:
            return 0
        return sum(max(SLAB_BYTES, b) for b in {g.block_bytes for g in self.rank_layout.spec})

    def _apart(self, n_tokens: int) -> int:
        """Beside what sequences hold: slack, and that one of them at a time holds the prompt it is computing."""
        more = max(0, self.peak_bytes(n_tokens) - self.sequence_bytes(n_tokens))
        if self.kept is not None and self.setup.headroom:
            more += SLAB_BYTES * self.kept.pools(n_tokens)
        return self.slack_bytes + more

    def fits(self, users: int, n_tokens: int) -> bool:
        """Whether so many sequences of so many tokens fit at once, one of them computing its prompt."""
        need = users * self.sequence_bytes(n_tokens) + self._apart(n_tokens)
        return need <= self.rank_kv_bytes

    def max_users(self, n_tokens: int) -> int:
        """Most sequences of so many tokens."""
        room = self.rank_kv_bytes - self._apart(n_tokens)
        return max(0, room // self.sequence_bytes(n_tokens))

    def max_context(self, users: int) -> int | None:
        """Most tokens that each of so many sequences may have; None where the context costs nothing more."""
        if not self.fits(users, 1):
            return 0
        if self.fits(users, _MOST_TOKENS):
            return None
        return _last(lambda n: self.fits(users, n), 1, _MOST_TOKENS)

    def outgrows_weights(self) -> int | None:
        """Tokens from which one user's cache is larger than the weights; None where it never is."""
        weights = self.weight_bytes
        whole = self if self.setup.ranks == 1 else Demand(replace(self.setup, ranks=1))

        if not weights or whole.cache_bytes(_MOST_TOKENS) <= weights:
            return None
        return _last(lambda n: whole.cache_bytes(n) <= weights, 0, _MOST_TOKENS) + 1


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last number for which it holds, which it does at `low` and not at `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _layout(
    shape: ModelShape,
    layers: list[KVLayer | StateLayer] | tuple[KVLayer | StateLayer, ...],
    config: KVConfig,
) -> Layout:
    return build_layout(layers, config, dtype=shape.dtype, shared=shape.shared)


def _shard(x: KVLayer | StateLayer, ranks: int) -> KVLayer | StateLayer:
    """A rank's part: heads are shared out as far as they go, then copied; latents are copied."""
    if isinstance(x, KVLayer):
        return replace(x, heads=-(-x.heads // ranks))
    return replace(x, fields=tuple(_split(f, ranks) for f in x.fields))


def _split(f: Field, ranks: int) -> Field:
    return replace(f, shape=(-(-f.shape[0] // ranks), *f.shape[1:]))
