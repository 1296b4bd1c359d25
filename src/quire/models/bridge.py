"""One model joined to one store: the way in, the memory behind it, and the pieces that a forward needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from quire.attention.cpu import CpuBackend
from quire.attention.read import Row
from quire.attention.reference import ReferenceBackend, TorchBackend
from quire.attention.step import Step
from quire.errors import ConfigError
from quire.kernels import native
from quire.models.adapters import Adapters
from quire.models.compiled import Compiled
from quire.models.forward import Forward, Watcher, windows_of
from quire.models.hf_cache import KVCache
from quire.models.hidden import note_hidden
from quire.models.keep import Rules, bind
from quire.models.load import weights_digest
from quire.models.outside import Outside
from quire.models.patches import Patches
from quire.models.prepack import Prepacked, prepack
from quire.models.probe import Shape
from quire.models.turn import Turner, find_turner
from quire.models.watch import Watch
from quire.models.worn import Worn
from quire.plan.layout import Layout
from quire.retention import Keep, parse_keep
from quire.spec import CacheGroup
from quire.store.chain import Chain
from quire.store.sharing import Sharing
from quire.store.store import BlockStore
from quire.store.table import BlockTable

WAYS = ("packed", "rows", "patched", "dense")

BACKENDS = {"reference": ReferenceBackend, "torch": TorchBackend, "cpu": CpuBackend}


def make_backend(name: str, device: str = "cpu") -> ReferenceBackend:
    """The attention backend of that name, "auto" for the fastest that works on a kind of device. Raises ConfigError."""
    if name == "auto":
        here = device == "cpu" and native.load() is not None
        return CpuBackend() if here else TorchBackend()
    if name not in BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    if name == "cpu" and device != "cpu":
        raise ConfigError(
            f"attention='cpu' reads the CPU's memory, and this model is on {device}; "
            "use 'auto', or load the model on the CPU"
        )
    return BACKENDS[name]()


class Bridge:
    """What attachment and engine share. Made by `quire.models.attach.connect`."""

    def __init__(
        self,
        model: Any,
        way: str,
        shape: Shape,
        layout: Layout,
        store: BlockStore,
        patches: Patches,
        adapters: Adapters,
        backend: str = "auto",
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.way = way
        self.shape = shape
        self.layout = layout
        self.store = store
        self.patches = patches
        self.device = torch.device(model.device)
        self.backend = make_backend(backend, self.device.type)
        self.weights: Prepacked | None = None
        self.compiled: Compiled | None = None
        self.chunked_prefill = True
        self.sharing: Sharing | None = None
        """Finds prefixes that were computed before; None where nothing is shared."""
        self.audit = 0.0
        """Share of the hits that an engine computes again and compares."""
        self.key_offsets: Mapping[int, torch.Tensor] = {}
        """Layer to `[H_kv, D]`, added to its keys where they enter the cache (`quire.evaluate.inject`)."""
        self.layer_kinds = shape.kinds
        self.has_state = shape.recurrent
        self.keep = parse_keep("full")
        """What sequences keep that ask for nothing else."""
        self._rules: dict[Keep, Rules] = {}
        self._outside: dict[Any, Outside] = {}
        self._turner: Turner | None = None
        self.observer: Callable[[Step], Watcher] | None = None
        """Stands in for the policies' watch, for who wants to see attention (`quire.evaluate.attention`)."""
        self._noting = False
        self._windows = windows_of(layout.spec.groups)
        self._names = {
            layer: tuple(f.name for f in layout.fields_of(g))
            for g in layout.spec.groups
            if not g.recurrent and g.raw is None
            for layer in g.layers
        }
        self._state_groups: dict[int, tuple[int, CacheGroup]] = {
            layer: (at, g)
            for at, g in enumerate(layout.spec.groups)
            if g.recurrent
            for layer in g.layers
        }

    def field_names(self, layer: int) -> tuple[str, str]:
        """What the two tensors given to `update` are called: k and v, or latent and k_rope."""
        first, second = self._names[layer]
        return first, second

    def states_in(self, layer: int) -> int:
        return self.shape.n_states.get(layer, 1)

    def forward(
        self,
        step: Step,
        batch: int,
        queries: int,
        valid: torch.Tensor | None = None,
        *,
        packed: bool = False,
    ) -> Forward:
        """A `Forward` over a planned step."""
        now = Forward(step, self.backend, batch, queries, valid, self._windows, packed)
        step.turn = self._turner
        now.watch = Watch.over(step) if self.observer is None else self.observer(step)
        if self.compiled is not None:
            now.names, now.linears = self._names, self.compiled.linears
        return now

    def turner(self) -> Turner:
        """Turns rotated vectors on, found when first asked for. Raises ConfigError."""
        if self._turner is None:
            self._turner = find_turner(self)
        return self._turner

    def find_turn(self) -> None:
        """Gives the layout the model's RoPE where a codec needs keys before it. Raises ConfigError."""
        codec = self.layout.unrotated
        if codec is None:
            return
        try:
            self.layout = replace(self.layout, turn=self.turner())
        except ConfigError as e:
            raise ConfigError(
                f"codec {codec.name} needs keys before RoPE, and of this model: {e}; use rope=after"
            ) from e

    def rules(self, keep: Keep) -> Rules:
        """What a policy means for this model. Raises ConfigError where it cannot be had."""
        found = self._rules.get(keep)
        if found is None:
            found = Rules(self, bind(keep, self.shape, lambda: self.digest))
            looks = found.scores and (found.policy.notes or found.records)
            if looks and not self._noting:
                self._noting = True
                self.patches.also(note_hidden(self.model, found.layers))
            self._rules[keep] = found
        return found

    def outside(self, rules: Rules) -> Outside:
        """A scorer from outside on this model, tried once. Raises ConfigError where it cannot be driven."""
        policy = rules.policy
        key = policy.given or policy.imports
        found = self._outside.get(key)
        if found is None:
            who = f"keep={rules.keep.text!r}"
            found = Outside(self, policy.scorer, rules.layers, rules.heads, who)
            self._outside[key] = found
        return found

    @cached_property
    def digest(self) -> str:
        """Of the weights, whatever dtype they are in, before they were packed."""
        return weights_digest(self.model)

    @cached_property
    def worn(self) -> Worn:
        """Which adapters the model's own `generate()` runs with."""
        return Worn(self.model, self.adapters.model, packed=self.weights is not None)

    @cached_property
    def max_context_tokens(self) -> int:
        """The longest sequence that the model admits."""
        return int(self._runner.max_context_tokens)

    @torch.no_grad()
    def read(self, item: Any) -> None:
        """Computes an item for what it leaves behind, within the model's own `generate()`."""
        self._runner.read(item)

    @cached_property
    def _runner(self) -> Any:
        from quire.models.runner import ModelRunner  # which drives bridges

        return ModelRunner(self)

    def cache(self) -> KVCache:
        """An empty cache for the model's own `generate()`."""
        return KVCache(self)

    # -- recurrent state -----------------------------------------------------------------------------------------

    def load_state(self, layer: int, into: Any, tables: Sequence[BlockTable]) -> None:
        """Gathers rows' states into a transformers linear-attention layer; one without history begins empty."""
        for j in range(into.number_of_states):
            into.conv_states[j] = into.recurrent_states[j] = None
            into.is_conv_states_initialized[j] = into.is_recurrent_states_initialized[j] = False
            into.has_previous_state[j] = False
        fresh = [t.committed == 0 for t in tables]
        if all(fresh) or layer not in self._state_groups:
            return
        if any(fresh):
            raise ConfigError(
                "a forward over recurrent layers cannot mix sequences with and without history"
            )
        at, group = self._state_groups[layer]
        where = self._units(at, group, tables)
        for (kind, j), f in zip(self.shape.states[layer], group.fields, strict=True):
            x = self.store.view(group, layer, f.name)[where, 0]
            into.dtype, into.device = x.dtype, x.device
            if kind == "conv":
                into.conv_states[j], into.is_conv_states_initialized[j] = x, True
                into.conv_kernel_size[j] = x.shape[-1]
            else:
                into.recurrent_states[j], into.is_recurrent_states_initialized[j] = x, True
            into.has_previous_state[j] = True

    def store_state(self, layer: int, out_of: Any, tables: Sequence[BlockTable]) -> None:
        """Scatters a layer's states into the rows' state blocks."""
        if layer not in self._state_groups:
            return
        at, group = self._state_groups[layer]
        where = self._units(at, group, tables)
        for (kind, j), f in zip(self.shape.states[layer], group.fields, strict=True):
            x = (out_of.conv_states if kind == "conv" else out_of.recurrent_states)[j]
            self.store.view(group, layer, f.name)[where, 0] = x

    def states_of(
        self, a: BlockTable, b: BlockTable
    ) -> Iterator[tuple[int, str, torch.Tensor, torch.Tensor]]:
        """(layer, field, both tables' states as `[1, 1, n]`) of every recurrent layer."""
        for layer, (at, group) in sorted(self._state_groups.items()):
            where = self._units(at, group, [a, b])
            for f in group.fields:
                x = self.store.view(group, layer, f.name)[where, 0].reshape(2, 1, 1, -1)
                yield layer, f.name, x[0], x[1]

    def _units(self, at: int, group: CacheGroup, tables: Sequence[BlockTable]) -> torch.Tensor:
        blocks = np.array([_chain_of(t, at, group).ids[0] for t in tables], np.int32)
        return torch.from_numpy(self.store.units(group, blocks)).to(self.device)

    # -- dense fallback ------------------------------------------------------------------------------------------

    def read_all(self, row: Row, layer: int, name: str) -> torch.Tensor:
        """`[heads, stop, D]`: a row's whole history of one field, as its last query reads it."""
        step = Step(self.store, self.layout, [Row(row.table, row.stop - 1, row.stop)], self.device)
        dtype = getattr(torch, self.layout.dtype)
        out: torch.Tensor | None = None
        for r in step.of_layer(layer)[2]:
            x = step.gather(layer, r, name, dtype)[0]
            mask = r.mask()
            keep = (
                torch.arange(x.shape[1], device=x.device)
                if mask is None
                else mask[0, 0].nonzero().squeeze(-1)
            )
            if out is None:
                heads = sum(
                    len(g.heads(layer))
                    for g in self.layout.spec.groups
                    if layer in g.layers and g.raw is None
                )
                out = x.new_zeros(heads, row.stop, x.shape[2])
            low, high = r.slots
            dropped = r.extents[0].positions is not None  # each head has positions of its own then
            at = r.pos_in(layer)[0].flatten(1)[:, low:high] if dropped else r.kpos
            for i, h in enumerate(r.group.heads(layer)):
                out[h, at[i if len(at) > 1 else 0, keep]] = x[i, keep]
        assert out is not None
        return out

    def layers(self) -> list[tuple[int, tuple[str, ...]]]:
        """(layer, names of its fields) of all layers that cache tokens."""
        return sorted(self._names.items())

    def read_prefix(self, table: BlockTable, n_tokens: int, layer: int, name: str) -> torch.Tensor:
        """`[heads, n_tokens, D]`: what the query behind the first `n_tokens` reads of one field; zeros where nothing.

        Tokens stand at their true positions, also where others were dropped. The table has room for that query's token.
        """
        return self.read_all(Row(table, n_tokens, n_tokens + 1), layer, name)[:, :n_tokens]

    def prepack(self, weights: str) -> None:
        """Packs the model's linear layers until `close`, see `models.prepack`. Raises ConfigError."""
        if weights != "plain":
            _ = self.digest  # of the weights as they were
        self.weights = prepack(self.model, weights)
        if self.weights is not None:
            self.patches.also(self.weights.restore)

    def close(self) -> None:
        """Undoes what was changed in the model."""
        self.patches.undo()


def _chain_of(table: BlockTable, at: int, group: CacheGroup) -> Chain:
    """The chain of a recurrent group: the at-th, unless a policy has split one before it by heads."""

    def holds(chain: Chain) -> bool:
        return chain.group.recurrent and chain.group.layers == group.layers

    chains = table.chains
    if at < len(chains) and holds(chains[at]):
        return chains[at]
    return next(c for c in chains if holds(c))
