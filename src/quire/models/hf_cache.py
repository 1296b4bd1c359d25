"""The cache object that a transformers model sees: a `transformers.Cache` whose layers write into blocks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from quire.attention.read import Row
from quire.attention.step import Step
from quire.errors import CapacityError, ConfigError, InvariantError, RequestError
from quire.models.forward import CURRENT, Forward
from quire.models.repeat import repeat
from quire.models.saved import revive
from quire.store.snapshot import load_table, read_snapshot, save_table
from quire.store.table import BlockTable

if TYPE_CHECKING:
    from quire.models.bridge import Bridge
    from quire.models.worn import State, Worn


class BlockLayer(CacheLayerMixin):
    """One attention layer: new keys and values go to the blocks and come back unchanged."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, layer: int, cache: KVCache) -> None:
        super().__init__()
        self.layer = layer
        self._cache = ref(
            cache
        )  # no circle: blocks go back when the cache does, not when garbage is collected
        self.is_initialized = True
        self.is_sliding = False

    @property
    def cache(self) -> KVCache:
        """The cache that the layer is part of."""
        found = self._cache()
        if found is None:
            raise InvariantError("a layer outlived its cache")
        return found

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: blocks are taken when a forward begins."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling() and self.cache.bridge.compiled is not None:
            # `quire::attend` writes them, see `models.compiled`
            return key_states, value_states
        now = CURRENT.get()
        if now is None:
            raise InvariantError("a KVCache is used only by the model that it was attached to")
        names = self.cache.bridge.field_names(self.layer)
        offset = self.cache.bridge.key_offsets.get(self.layer)
        if offset is not None:  # a constant on every key: softmax does not see it, codecs do
            key_states = key_states + offset[:, None]
        now.write(self.layer, names, key_states, value_states)
        if self.cache.bridge.way == "dense":
            return self.cache.history(now, self.layer, names)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        raise InvariantError("crop the cache, not one of its layers")


class BlockHybridLayer(LinearAttentionLayer, BlockLayer):
    """Attention and recurrent state in one layer (Falcon-H1)."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, layer: int, cache: KVCache, number_of_states: int) -> None:
        BlockLayer.__init__(self, layer, cache)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.is_initialized = True

    update = BlockLayer.update
    get_mask_sizes = BlockLayer.get_mask_sizes
    get_seq_length = BlockLayer.get_seq_length
    get_max_length = BlockLayer.get_max_length


class KVCache(Cache):
    """Rows of sequences in a model's blocks; pass it as `past_key_values`, or let the attached model make one.

    `len(cache.tables)` is the batch; each row has its own length, padding is not stored. `crop`, `reorder_cache` and
    `copy.deepcopy` (a fork) work as transformers' generation expects.
    """

    def __init__(self, bridge: Bridge) -> None:
        layers: list[Any] = []
        for i, kind in enumerate(bridge.layer_kinds):
            if kind == "attention":
                layers.append(BlockLayer(i, self))
            elif kind == "state":
                layers.append(LinearAttentionLayer(number_of_states=bridge.states_in(i)))
            elif kind == "hybrid":
                layers.append(BlockHybridLayer(i, self, bridge.states_in(i)))
            else:
                layers.append(DummyLayer())
        super().__init__(layers=layers)
        self._recurrent = [
            (i, x) for i, x in enumerate(layers) if isinstance(x, LinearAttentionCacheLayerMixin)
        ]
        self.bridge = bridge
        self.tables: list[BlockTable] = []
        self.columns = 0
        """Columns that generation has fed, padding included: what it takes for the cache's length."""
        self._recording = False
        self.shares = False
        """Whether it finds what others have computed and leaves what it computes; `generate()` decides that."""
        self.adapters = b""
        """Where it shares: digest of those that the model wears, and what they said of themselves."""
        self._worn: State = ()
        self.tokens: list[list[int]] = []
        """Where it shares: the tokens of each row, live lists that its tables follow."""
        self.heard: list[list[int]] = []
        """Where a policy reads them once more: the tokens of each row."""
        self.driven = False
        """Whether a runner drives it, and not the model's own `generate()`."""
        self._starts: list[int] = []
        self._token: Any = None

    # -- a forward inside generate() -----------------------------------------------------------------------------

    def begin(
        self,
        batch: int,
        queries: int,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        ids: torch.Tensor | None = None,
    ) -> None:
        """Makes room for a forward over `[batch, queries]` and makes it current.

        Args:
            ids: its tokens, where it has any.

        Raises:
            RequestError: the batch is not the cache's, or ids restart in spite of what is cached.
            CapacityError: no room; nothing has changed.
        """
        if not self.tables:
            self.tables = [self.bridge.store.open() for _ in range(batch)]
            if not self.bridge.keep.full:
                rules = self.bridge.rules(self.bridge.keep)
                for table in self.tables:
                    rules.apply(table, None)
        if len(self.tables) != batch:
            raise RequestError(
                f"this cache holds {len(self.tables)} sequences, the batch has {batch}"
            )
        valid = None
        counts = [queries] * batch
        if mask is not None and mask.ndim == 2:
            new = mask[:, -queries:].bool()
            if not bool(new.all()):
                valid = new.reshape(-1).nonzero().squeeze(-1)
                counts = new.sum(1).tolist()
        self._starts = [t.length for t in self.tables]
        self._check_positions(position_ids, valid, counts)
        self._check_states(queries)
        self._check_keepers(queries)
        self._hear(ids, valid)
        try:
            for table, n in zip(self.tables, counts, strict=True):
                table.append(n, drafts=n if self._recording else 0)
        except BaseException:
            self.rollback()
            raise
        rows = [Row(t, s, t.length) for t, s in zip(self.tables, self._starts, strict=True)]
        step = Step(self.bridge.store, self.bridge.layout, rows, self.bridge.device)
        self.bind(list(self.tables))
        self._token = CURRENT.set(self.bridge.forward(step, batch, queries, valid))

    def end(self, queries: int) -> None:
        """After the forward: what it computed is final, unless drafts are being recorded."""
        now = CURRENT.get()
        CURRENT.reset(self._token)
        self._token = None
        if now is not None and now.watch is not None:
            now.watch.finish()
        self.unbind(self.tables)
        self.columns += queries
        for t, row in zip(self.tables, self.heard, strict=False):
            repeat(t, row, self.bridge.read)
        if not self._recording:
            for t in self.tables:
                t.commit()

    def rollback(self) -> None:
        """After a forward that failed: the tokens it was to add are forgotten."""
        if self._token is not None:
            CURRENT.reset(self._token)
            self._token = None
        for row, start in zip(self.heard, self._starts, strict=False):
            del row[start:]
        for t, start in zip(self.tables, self._starts, strict=True):
            if t.length > start:
                if any(c.group.recurrent for c in t.chains) and start:
                    t.reset()
                else:
                    t.truncate(start)

    def _check_positions(
        self, position_ids: torch.Tensor | None, valid: torch.Tensor | None, counts: list[int]
    ) -> None:
        if (
            position_ids is None
            or position_ids.ndim != 2
            or not any(self._starts)
            or valid is not None
        ):
            return
        if int(position_ids[0, 0]) == 0 and self._starts[0] > 0 and counts[0] > 1:
            raise RequestError(
                f"the cache already holds {self._starts[0]} tokens but the input starts at position 0 again; pass only "
                "the new tokens, or a fresh cache"
            )

    def _check_keepers(self, queries: int) -> None:
        """A further prompt moves the length at which tokens go to its own end."""
        for table in self.tables:
            if table.keeper is None:
                continue
            if self._recording:
                raise RequestError(
                    f"keep={self.bridge.keep.text!r} drops or chooses tokens at fixed lengths, which drafts do not "
                    "have; assisted decoding goes with keep='full' or a window"
                )
            if queries > 1 and table.length:
                table.keeper.begin_prompt(table, queries)

    def _hear(self, ids: torch.Tensor | None, valid: torch.Tensor | None) -> None:
        """Notes the new tokens for a policy that reads them once more.

        Raises:
            RequestError: there are none, or some are unknown; or the context has no room for a repetition.
        """
        rules = self.bridge.rules(self.bridge.keep)
        if not rules.scores or not rules.policy.repeats:
            return
        who = f"keep={self.bridge.keep.text!r} reads tokens once more"
        if ids is None:
            raise RequestError(f"{who}, and this input is embeddings; use keep='keydiff'")
        here = torch.ones_like(ids, dtype=torch.bool).view(-1)
        if valid is not None:
            here = torch.zeros_like(here)
            here[valid] = True
        new = [r[m].tolist() for r, m in zip(ids, here.view(ids.shape), strict=True)]
        heard = self.heard or [[] for _ in new]
        if self.tokens:  # `shorten` has noted them already, what was found included
            heard = [row[: len(row) - len(n)] for row, n in zip(self.tokens, new, strict=True)]
        for table, row, more in zip(self.tables, heard, new, strict=True):
            if len(row) != table.length:
                raise RequestError(f"{who}, and this cache does not know all that it holds")
            length, keeper = table.length + len(more), table.keeper
            if not table.length or len(more) > 1:
                rules.context_tokens(self.bridge.max_context_tokens, length)
            elif keeper is not None:
                need = length + keeper.spare(length)
                if need > length and need > self.bridge.max_context_tokens:
                    raise RequestError(
                        f"{who}, at {length} tokens up to position {need}, and the context is "
                        f"{self.bridge.max_context_tokens}; generate fewer, or take a smaller every or repeats"
                    )
        self.heard = [[*row, *more] for row, more in zip(heard, new, strict=True)]

    def _check_states(self, queries: int) -> None:
        if (
            self.bridge.has_state
            and not self.bridge.chunked_prefill
            and queries > 1
            and any(self._starts)
        ):
            raise RequestError(
                "this model (Mamba-1 kind) restarts its scan on several tokens at once; feed one token, or start afresh"
            )

    # -- recurrent state -----------------------------------------------------------------------------------------

    def bind(self, tables: Sequence[BlockTable]) -> None:
        """Gathers the rows' recurrent states into the layers. New sequences begin without."""
        for i, layer in self._recurrent:
            self.bridge.load_state(i, layer, tables)

    def unbind(self, tables: Sequence[BlockTable]) -> None:
        """Scatters the states back into the rows' blocks."""
        for i, layer in self._recurrent:
            self.bridge.store_state(i, layer, tables)

    # -- what generation calls -----------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.tables)

    @property
    def batch_size(self) -> int:
        return len(self.tables) or -1

    @property
    def is_croppable(self) -> bool:
        return not self.bridge.has_state

    @property
    def recording(self) -> bool:
        """Whether tokens are drafts until the next `crop`."""
        return self._recording

    def activate_past_recording(self) -> None:
        """From here on tokens are drafts until the next `crop`; nothing is shared any more."""
        self._recording = True
        self.shares, self.tokens = False, []
        for t in self.tables:
            t.leave()

    def wear(self, worn: Worn) -> None:
        """Finds out whether it shares, and with whom: those who wore the same."""
        digest = worn.digest()
        self.shares, self.adapters, self._worn = digest is not None, digest or b"", worn.state()

    def check_worn(self, worn: Worn) -> None:
        """Shares nothing more if the adapters were changed within a `generate()`."""
        if self._worn and worn.state() != self._worn:
            self.shares, self.tokens = False, []
            for t in self.tables:
                t.leave()

    def follow(self, tokens: list[list[int]]) -> None:
        """Says which live lists hold the rows' tokens."""
        self.tokens = tokens
        for table, row in zip(self.tables, tokens, strict=True):
            table.follow(row)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens of every row; what stays is accepted.

        Raises:
            RequestError: a positive number, or tokens that can no longer be taken back.
        """
        if tokens_to_remove > 0:
            raise RequestError("crop takes zero or a negative number: how many tokens to remove")
        for t in self.tables:
            t.truncate(max(0, t.length + tokens_to_remove))
            t.accept(t.length)
            t.commit()
        for rows in (self.tokens, self.heard):
            for table, row in zip(self.tables, rows, strict=False):
                del row[table.length :]
        self.columns = max(0, self.columns + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was: forks where a row is wanted again, releases what nobody wants."""
        order = beam_idx.tolist()
        used: set[int] = set()
        fresh: list[BlockTable] = []
        forks: list[BlockTable] = []
        try:
            for i in order:
                if i in used:
                    forks.append(self.tables[i].fork())
                fresh.append(forks[-1] if i in used else self.tables[i])
                used.add(i)
        except CapacityError:
            for t in forks:
                t.release()
            raise
        for i, t in enumerate(self.tables):
            if i not in used:
                t.release()
        self.tables = fresh
        if self.tokens:
            self.follow([list(self.tokens[i]) for i in order])
        self.heard = [list(self.heard[i]) for i in order] if self.heard else []

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.tables)).repeat_interleave(repeats))

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Refused: sparse attention keeps an index beside keys and values. Raises ConfigError."""
        raise ConfigError("its sparse attention keeps an index of its own beside keys and values")

    def reset(self) -> None:
        """Gives every block back; the cache is as new."""
        for t in self.tables:
            t.release()
        self.tables, self.tokens, self.heard, self.columns = [], [], [], 0

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes every row to a file of its own in `folder`, bit for bit; `load` continues from there.

        Raises:
            ConfigError: nothing to save, or the folder cannot be written.
        """
        if not self.tables:
            raise ConfigError("this cache is empty; there is nothing to save")
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(
                f"{place} cannot be made ({e.strerror}); choose another folder"
            ) from e
        for i, table in enumerate(self.tables):
            about = {"row": str(i), "rows": str(len(self.tables)), "columns": str(self.columns)}
            if self.heard:
                about["tokens"] = json.dumps(self.heard[i])
            save_table(place / f"row{i}.safetensors", table, about)

    @classmethod
    def load(cls, bridge: Bridge, folder: str | os.PathLike[str]) -> KVCache:
        """A cache as `save` wrote it, for a model attached with the same configuration.

        Raises:
            ConfigError: no such files, or they are of another model or configuration.
            TierError: a file is damaged.
            CapacityError: no room.
        """
        cache, place = cls(bridge), Path(folder)
        rows, at = 1, 0
        while at < rows:
            path = place / f"row{at}.safetensors"
            snapshot = read_snapshot(path)
            about = snapshot.extra
            if about.get("row") != str(at) or (at and int(about["rows"]) != rows):
                raise ConfigError(f"{path} is not row {at} of a saved cache")
            rows, cache.columns = int(about["rows"]), int(about["columns"])
            cache.tables.append(load_table(snapshot, bridge.store, partial(revive, bridge)))
            if "tokens" in about:
                cache.heard.append([int(t) for t in json.loads(about["tokens"])])
            at += 1
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """A fork: shares full blocks, copies the partly filled ones."""
        twin = KVCache(self.bridge)
        twin.tables = [t.fork() for t in self.tables]
        twin.columns, twin._recording, twin.shares = self.columns, self._recording, self.shares
        twin.adapters, twin._worn = self.adapters, self._worn
        if self.tokens:
            twin.follow([list(row) for row in self.tokens])
        twin.heard = [list(row) for row in self.heard]
        return twin

    def __del__(self) -> None:
        for t in getattr(self, "tables", ()):
            t.release()

    # -- looking -------------------------------------------------------------------------------------------------

    def history(
        self, now: Forward, layer: int, names: tuple[str, str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense fallback: all keys and values of the batch, `[B, heads, columns + T, D]`, zeros where padding was."""
        rows = now.step.rows
        longest = self.columns + now.queries
        made = []
        for name in names:
            per_row = [self.bridge.read_all(r, layer, name) for r in rows]
            out = per_row[0].new_zeros(len(rows), per_row[0].shape[0], longest, per_row[0].shape[2])
            for i, x in enumerate(per_row):
                out[i, :, longest - x.shape[1] :] = x
            made.append(out)
        return made[0], made[1]

    def held_bytes(self) -> int:
        """Bytes of the blocks that the rows reference, a shared block once."""
        seen = {
            (id(c.pool), int(b)): c.group.block_bytes
            for t in self.tables
            for c in t.chains
            for b in c.live()
        }
        return sum(seen.values())

    def __repr__(self) -> str:
        lengths = [t.length for t in self.tables]
        return f"KVCache({len(lengths)} rows, lengths {lengths}, {self.held_bytes():,} bytes)"
