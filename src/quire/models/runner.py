"""What the engine drives: forwards over items of many sequences, in the form that the model's way allows."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from quire.attention.read import Row
from quire.attention.step import Step
from quire.errors import InvariantError, RequestError
from quire.models.adapters import Adapters, unwrap
from quire.models.bridge import Bridge
from quire.models.forward import CURRENT
from quire.models.hf_cache import KVCache
from quire.models.keep import Rules
from quire.models.prepack import Prepacked
from quire.models.repeat import repeat
from quire.models.rope import Regimes
from quire.models.saved import revive
from quire.models.sharing import AdapterDigests, open_tiering
from quire.models.yielding import Yield, parse_yield
from quire.retention import Keep
from quire.spec import Usage
from quire.store import cold
from quire.store.below import Below
from quire.store.table import BlockTable
from quire.store.tiering import Tiering
from quire.store.tiers.recipe import TiersConfig


class Item(Protocol):
    """One sequence's share in a forward (the engine's `Item`)."""

    table: Any
    tokens: Sequence[int]
    start: int
    stop: int
    logits: int


UNBOUNDED_TOKENS = 1 << 30
"""The context of a model that names no limit (recurrent ones)."""


def context_tokens(config: Any, stretch: float = 1.0) -> int:
    """The longest sequence that the config admits."""
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(limit * stretch) if limit else UNBOUNDED_TOKENS


class ModelRunner:
    """Runs items through a bridge.

    packed, patched: all items in one forward, tokens of all sequences in one row;
    rows: single tokens as a batch of rows, longer items one by one;
    dense: every item by itself.
    """

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.model = bridge.model
        self.device = bridge.device
        config = self.model.config.get_text_config(decoder=True)
        self.vocab_size = int(config.vocab_size)
        self._regimes = Regimes(self.model)
        self.max_context_tokens = context_tokens(config, self._regimes.stretch)
        self.chunked_prefill = bridge.chunked_prefill
        self.max_rows: int | None = None
        self.cache = KVCache(bridge)
        self.cache.driven = True
        self.adapters = bridge.adapters
        self.sharing = bridge.sharing
        self.audit = bridge.audit
        self.adapter_digest = AdapterDigests(bridge.adapters.model)
        self.weights = bridge.weights
        self.tiering: Tiering | None = None
        self._yields: dict[str, Yield] = {}
        self.below: Below | None = None
        """Host memory, and disks, for running sequences."""

    # -- sequences -----------------------------------------------------------------------------------------------

    def open(
        self,
        keep: Keep | None = None,
        prompt_tokens: int | None = None,
        context_tokens: int = 0,
    ) -> BlockTable:
        """A table for a new sequence.

        Args:
            keep: which of its tokens stay; None for what the runner was opened with.
            prompt_tokens: how long its prompt will be; None: what is appended first.
            context_tokens: see `Rules.apply`.
        """
        table = self.bridge.store.open()
        keep = keep or self.keep
        if not (keep.full and self.keep.full):
            self.rules(keep).apply(table, prompt_tokens, context_tokens)
        return table

    def revive(self, table: BlockTable, about: Any, arrays: Any) -> None:
        """Gives a table that was read from a file its keeper, see `models.saved.revive`."""
        revive(self.bridge, table, about, arrays)

    @property
    def keep(self) -> Keep:
        """What sequences keep that ask for nothing else."""
        return self.bridge.keep

    def rules(self, keep: Keep) -> Rules:
        """What a policy means here. Raises ConfigError where it cannot be had."""
        return self.bridge.rules(keep)

    def cut(self, table: Any, start: int, stop: int) -> int:
        """How far [start, stop) may be computed before some of a sequence's tokens go, or its states are kept."""
        keeper, path = table.keeper, table.path
        if keeper is not None and self.chunked_prefill:
            stop = keeper.until(start, stop)
        return stop if path is None else path.until(start, stop)

    @property
    def restart_tokens(self) -> int | None:
        """A sequence that grows past so many tokens is computed anew; None: never (see `Regimes`)."""
        return self._regimes.restart_tokens

    def fits(self, n_tokens: int, keep: Keep | None = None, prompt_tokens: int = 0) -> bool:
        chunk = 1 if self.chunked_prefill else n_tokens
        if self.restart_tokens is not None and n_tokens > self.restart_tokens:
            chunk = max(chunk, self.restart_tokens + 1)
        if keep is None or (keep.full and self.keep.full):
            here = self.bridge.store.fits(n_tokens, chunk_tokens=chunk)
            return here or self.oversize(n_tokens)
        rules = self.rules(keep)
        most = rules.most_tokens(n_tokens, prompt_tokens)
        return self.bridge.store.fits(most, chunk_tokens=min(chunk, most), groups=rules.groups)

    def oversize(self, n_tokens: int) -> bool:
        """Whether a sequence is served with its cold blocks in the tiers, and not otherwise."""
        below, store = self.below, self.bridge.store
        if below is None or not below.config.offload or store.fits(n_tokens):
            return False
        return cold.fits(store, n_tokens, below.capacity_bytes)

    def yields(self, text: str) -> Yield:
        """What a request may give up when memory runs short. Raises ConfigError."""
        found = self._yields.get(text)
        if found is None:
            found = self._yields[text] = parse_yield(self.bridge, text)
        return found

    def context_tokens(self, keep: Keep | None = None, prompt_tokens: int = 0) -> int:
        """The longest sequence that can be attended to: without end where a window bounds every distance.

        Raises:
            RequestError: its policy reads such a prompt once more, and that does not fit.
        """
        if keep is None:
            return self.max_context_tokens
        rules = self.rules(keep)
        if rules.endless:
            return UNBOUNDED_TOKENS
        return rules.context_tokens(self.max_context_tokens, prompt_tokens)

    def usage(self) -> Usage:
        return self.bridge.store.usage()

    def check_adapter(self, name: str) -> None:
        """Raises RequestError when the model has no such adapter."""
        self.adapters.check(name)

    @property
    def bytes_per_token(self) -> float:
        return self.bridge.layout.spec.bytes_per_token

    def open_tiers(self, config: TiersConfig, weights: bytes) -> None:
        """Puts tiers below the prefix cache; `weights` tells these from all others. Raises ConfigError."""
        self.tiering, self.below = open_tiering(self, config, weights)

    def close(self) -> None:
        """Gives the model back as it was: its attention, its cache, its weights. Idempotent.

        Tiers that last get what is cached first.
        """
        if self.tiering is not None:
            self.tiering.close()
        elif self.below is not None:
            self.below.stack.close()
        self.bridge.close()

    # -- forwards ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, items: Sequence[Item], adapter: str | None = None) -> torch.Tensor:
        """Computes every item's new tokens.

        Returns:
            `[sum(item.logits), vocab] float32`, in item order.
        """
        self.adapters.use(adapter)
        logits = self._forward(items)
        for item in items:
            if item.table.keeper is not None:
                repeat(item.table, item.tokens, self.read)
        return logits

    def read(self, item: Item) -> None:
        """Computes an item for what it leaves behind; within a forward, under its adapter."""
        self._run([item])

    def _forward(self, items: Sequence[Item]) -> torch.Tensor:
        batches = self._batches(items)
        if len(batches) == 1:
            return self._run(items)
        out: list[torch.Tensor | None] = [None] * len(items)
        for batch in batches:
            logits = self._run([items[i] for i in batch])
            parts = logits.split([items[i].logits for i in batch])
            for i, part in zip(batch, parts, strict=True):
                out[i] = part
        wanted = [x for x in out if x is not None and len(x)]
        return torch.cat(wanted) if wanted else torch.empty(0, self.vocab_size, device=self.device)

    def _batches(self, items: Sequence[Item]) -> list[list[int]]:
        """Which items may share a forward: one RoPE regime each, and what the way allows."""
        groups: dict[Any, list[int]] = {}
        way = self.bridge.way
        for i, item in enumerate(items):
            key: Any = self._regimes.of(item.stop)
            if way == "dense" or (
                way == "rows" and not (item.stop - item.start == 1 and item.start > 0)
            ):
                key = ("alone", i)
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def _run(self, items: Sequence[Item]) -> torch.Tensor:
        """One forward (or a few, where a dense model must not read across a lossy block's boundary)."""
        if self.bridge.way == "dense" and any(g.raw for g in self.bridge.layout.spec.groups):
            return self._run_by_blocks(items[0])
        rows = [self._row(x) for x in items]
        if self.bridge.has_state and not self.chunked_prefill:
            for r in rows:
                if r.start and r.stop - r.start > 1:
                    raise InvariantError(
                        "a Mamba-1 kind restarts its scan on several tokens at once; prefill whole prompts"
                    )
        tokens = [t for x, r in zip(items, rows, strict=True) for t in x.tokens[r.start : r.stop]]
        if tokens and max(tokens) >= self.vocab_size:
            raise RequestError(
                f"token id {max(tokens)} is outside the vocabulary of {self.vocab_size}"
            )
        step = Step(self.bridge.store, self.bridge.layout, rows, self.device)
        wanted = [x.logits for x in items]
        batched = self.bridge.way in ("rows", "dense")
        shape = (len(items), -1) if batched else (1, -1)
        ends = itertools.accumulate(r.stop - r.start for r in rows)
        at = [i for end, n in zip(ends, wanted, strict=True) for i in range(end - n, end)]
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        index = None  # a decode step wants them all
        if len(at) < len(tokens):
            index = torch.tensor(at, dtype=torch.int64, device=self.device)
        return self._call(
            step, ids.view(shape), step.positions().view(shape), rows, index, batched=batched
        )

    def _row(self, item: Item) -> Row:
        """The item's row; from the start where its RoPE regime changes and nobody has seen to it before."""
        if self._regimes.crosses(item.start, item.stop):
            item.table.reset()
            item.table.append(item.stop)
            return Row(item.table, 0, item.stop)
        return Row(item.table, item.start, item.stop)

    def _run_by_blocks(self, item: Item) -> torch.Tensor:
        """A dense item cut at block boundaries, so that all queries of a forward read the same decoded positions."""
        size = max(g.block_tokens for g in self.bridge.layout.spec.groups)
        cuts = [item.start, *range((item.start // size + 1) * size, item.stop, size), item.stop]
        parts = []
        for a, b in itertools.pairwise(cuts):
            row = Row(item.table, a, b)
            step = Step(self.bridge.store, self.bridge.layout, [row], self.device)
            n = max(0, min(b - a, b - (item.stop - item.logits)))
            ids = torch.tensor([list(item.tokens[a:b])], device=self.device)
            index = torch.arange(b - a - n, b - a, device=self.device)
            parts.append(
                self._call(step, ids, step.positions().view(1, -1), [row], index, batched=True)
            )
        return torch.cat(parts)

    def _call(
        self,
        step: Step,
        ids: torch.Tensor,
        pos: torch.Tensor,
        rows: list[Row],
        index: torch.Tensor | None,
        *,
        batched: bool,
    ) -> torch.Tensor:
        """One forward of the model; logits of the flat token positions `index`, None for all, float32."""
        accepts = self.bridge.shape.accepts
        kwargs: dict[str, Any] = {self.bridge.shape.cache_name: self.cache, "use_cache": True}
        if "position_ids" in accepts:
            kwargs["position_ids"] = pos
        if self.bridge.way == "patched":
            kwargs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=self.device)
        model = self._model_for(rows, index)
        if model is not self.model and self.bridge.compiled is not None:
            kwargs["attention_mask"] = self.bridge.compiled.mask
        flat_index = not batched or ids.shape[0] == 1
        trimmed = index is not None and "logits_to_keep" in accepts and flat_index
        if trimmed:
            assert index is not None
            # one that nobody wants, where none is wanted: an empty choice would mean all
            kwargs["logits_to_keep"] = index if len(index) else index.new_zeros(1)
        tables = [r.table for r in rows]
        self.cache.columns = rows[0].start if self.bridge.way == "dense" else 0
        self._regimes.reset()
        now = self.bridge.forward(step, ids.shape[0], ids.shape[1], packed=not batched)
        self.cache.bind(tables)
        token = CURRENT.set(now)
        try:
            logits = model(input_ids=ids, **kwargs).logits
        finally:
            CURRENT.reset(token)
            step.settle()
        self.cache.unbind(tables)
        if now.watch is not None:
            now.watch.finish()
        flat: torch.Tensor = logits.reshape(-1, logits.shape[-1])
        if index is None:
            return flat.float()
        return (flat[: len(index)] if trimmed else flat[index]).float()

    def _model_for(self, rows: list[Row], index: torch.Tensor | None) -> Any:
        """The compiled model for a step of single tokens whose logits are all wanted, where there is one."""
        compiled = self.bridge.compiled
        if compiled is None or index is not None or self.bridge.key_offsets:
            return self.model
        return compiled.model if all(r.stop - r.start == 1 for r in rows) else self.model


class NoCacheTable:
    """Stands in for a table where nothing is cached: it counts tokens and holds no bytes."""

    def __init__(self) -> None:
        self.length = 0

    def append(self, n_tokens: int, *, drafts: int = 0) -> None:
        self.length += n_tokens

    def commit(self, n_tokens: int | None = None) -> object:
        return ()

    def truncate(self, n_tokens: int) -> None:
        self.length = n_tokens

    def fork(self) -> NoCacheTable:
        twin = NoCacheTable()
        twin.length = self.length
        return twin

    def release(self) -> None:
        self.length = 0

    def held_bytes(self) -> int:
        return 0


class NoCacheRunner:
    """`--kv none`: recomputes every token of every sequence at every step, the baseline that a cache exists to beat."""

    chunked_prefill = False
    sharing = None
    max_rows: int | None = None
    bytes_per_token = 0.0

    def __init__(self, model: Any) -> None:
        self.adapters = Adapters(model)
        self.model = model = unwrap(model)
        self.device = torch.device(model.device)
        config = model.config.get_text_config(decoder=True)
        self.vocab_size = int(config.vocab_size)
        self._regimes = Regimes(model)
        self.max_context_tokens = context_tokens(config, self._regimes.stretch)
        self._trims = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.weights: Prepacked | None = None

    def close(self) -> None:
        """As `ModelRunner.close`."""
        if self.weights is not None:
            self.weights.restore()

    def open(self) -> NoCacheTable:
        return NoCacheTable()

    def fits(self, n_tokens: int) -> bool:
        return True

    def usage(self) -> Usage:
        return Usage(0, 0, 0, 0)

    def check_adapter(self, name: str) -> None:
        self.adapters.check(name)

    @torch.inference_mode()
    def forward(self, items: Sequence[Item], adapter: str | None = None) -> torch.Tensor:
        """As `ModelRunner.forward`; tokens [0, stop) of each item are computed anew."""
        self.adapters.use(adapter)
        out = []
        for item in items:
            self._regimes.reset()
            ids = torch.tensor([list(item.tokens[: item.stop])], device=self.device)
            few = {"logits_to_keep": item.logits} if self._trims and item.logits else {}
            logits = self.model(input_ids=ids, use_cache=False, **few).logits[0]
            out.append(logits[len(logits) - item.logits :].float())
        return torch.cat(out) if out else torch.empty(0, self.vocab_size)
