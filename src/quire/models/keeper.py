"""One sequence under a policy that scores: what was seen of its tokens, and which of them stay when they are due."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quire.attention.read import Row
from quire.errors import CapacityError, ConfigError, InvariantError
from quire.models.choosing import by_block, inside, make_parts
from quire.models.moving import read_field, read_raw, row_mover
from quire.models.outside import Piece
from quire.plan.kept import unit_tokens
from quire.retention.contract import FOREVER, Called, Seen
from quire.retention.press import CannotScoreError
from quire.spec import Coord, Residual
from quire.store.chain import Chain
from quire.store.compact import Part, compact, companion, families, settled
from quire.store.table import BlockTable

if TYPE_CHECKING:
    from quire.models.keep import Rules

__all__ = ["Keeper", "Line"]

log = logging.getLogger("quire")


@dataclass
class Line:
    """What is known of each slot of one chain: `[coordinates, capacity]` float32."""

    mass: torch.Tensor | None = None
    notes: torch.Tensor | None = None


class Keeper:
    """One sequence's. Made by `Rules.apply`; `store.table.Keeper` is what the table knows of it."""

    def __init__(self, rules: Rules, prompt_tokens: int | None, context_tokens: int = 0) -> None:
        self.rules = rules
        self.first = prompt_tokens
        """How long the first prompt is; None: as much as is appended first."""
        self.context = context_tokens
        """After so many tokens of it some go already, before the rest is read; 0: at its end only."""
        self.prompt_tokens = self.due = context_tokens or prompt_tokens or 0
        self.publish: Callable[[BlockTable, Keeper | None], None] | None = None
        """Told once, when tokens are due for the first time: of what was kept, or None where nothing went."""
        self.borrowed = False
        """Whether the table's last blocks are others' still (`resume`)."""
        self.lines: dict[str, Line] = {}
        self.queries: dict[int, torch.Tensor] = {}
        """Layer to `[n, H_q, D]`: the last queries, at the positions before `seen`."""
        self.scales: dict[int, float] = {}
        self.pieces: dict[int, list[Piece]] = {}
        """Layer to what entered its attention so far, for a scorer from outside that looks at it."""
        self.seen = 0
        self.repeated = 0
        """Tokens before it were read once more already, for a policy that wants that."""
        self.repeating = False

    # -- what the table asks ---------------------------------------------------------------------------------------

    def before_append(self, table: BlockTable, n_tokens: int) -> None:
        if self.repeating:
            return
        if not self.due:
            self.prompt_tokens = self.due = table.length + n_tokens
        if self.borrowed:
            table.own_tails()
            self.borrowed = False
        if table.length == table.committed == self.due:
            self._compact(table)
            self._pass()
        if table.length + n_tokens > self.due:
            raise InvariantError(
                f"a chunk of {n_tokens} tokens from {table.length} on passes {self.due}, where tokens go"
            )

    def spare(self, length: int) -> int:
        if not self.repeats_at(length):
            return 0
        return self.rules.repeat_tokens(length - self.repeated)

    def until(self, start: int, stop: int) -> int:
        if not self.due:
            return stop
        return min(stop, self.due if start < self.due else self._after())

    def _after(self) -> int:
        """When tokens go next once they have gone at `due`: at the prompt's end, where that was its context's."""
        first = self.first or 0
        if 0 < self.context == self.due < first and not self.rules.policy.once:
            return first
        return self.due + int(self.rules.policy.every)

    def _pass(self) -> None:
        """Tokens have gone at `due`."""
        due, self.due = self.due, self._after()
        if due == self.context:
            self.prompt_tokens = self.first or due

    def reads_by(self, position: int) -> None:
        """Its queries read all that stays."""
        return

    def fork(self) -> Keeper:
        twin = Keeper(self.rules, self.first, self.context)
        twin.prompt_tokens, twin.due, twin.seen = self.prompt_tokens, self.due, self.seen
        twin.lines = {
            name: Line(*(None if x is None else x.clone() for x in (line.mass, line.notes)))
            for name, line in self.lines.items()
        }
        twin.queries, twin.scales = dict(self.queries), dict(self.scales)
        twin.pieces = {layer: list(x) for layer, x in self.pieces.items()}
        twin.repeated = self.repeated
        return twin

    @property
    def state_bytes(self) -> int:
        """What it knows of its sequence, beside the arena."""
        lines = [x for line in self.lines.values() for x in (line.mass, line.notes)]
        return sum(x.nbytes for x in [*lines, *self.queries.values()] if x is not None)

    def finish(self, table: BlockTable) -> None:
        if self.publish is not None and table.length == table.committed == self.due == self.context:
            try:
                self._compact(table)
            except CapacityError:
                return
            self._pass()

    def resume(self, state: Keeper) -> None:
        """Goes on, over an empty sequence's own lengths, where another's tokens went for the first time.

        Args:
            state: a fork of that one's keeper, taken then; nothing of it is written to.
        """
        known = state.fork()
        self.lines, self.queries, self.scales = known.lines, known.queries, known.scales
        self.seen, self.repeated = known.seen, known.repeated
        self.borrowed = True
        self._pass()

    def record(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        if self.pieces:
            raise ConfigError(
                f"keep={self.rules.keep.text!r}: what its scorer looks at is not saved with a prompt of which nothing "
                "went yet; save after the next token"
            )
        about = {n: getattr(self, n) for n in ("first", "context", "prompt_tokens", "due", "seen")}
        about |= {"repeated": self.repeated, "keep": self.rules.keep.canonical}
        about["scales"] = {str(layer): x for layer, x in self.scales.items()}
        arrays = {f"queries:{layer}": q for layer, q in self.queries.items()}
        for name, line in self.lines.items():
            known = (("mass", line.mass), ("notes", line.notes))
            arrays |= {f"{what}:{name}": x for what, x in known if x is not None}
        return about, {name: x.cpu().numpy() for name, x in arrays.items()}

    def reset(self) -> None:
        self.prompt_tokens = self.due = self.context or self.first or 0
        self.borrowed = False
        self.seen = self.repeated = 0
        self.lines, self.queries, self.pieces = {}, {}, {}

    def begin_prompt(self, table: BlockTable, n_tokens: int) -> None:
        if self.rules.policy.once and table.length:
            return
        self.prompt_tokens = self.due = table.length + n_tokens

    # -- what a forward tells ----------------------------------------------------------------------------------------

    def asked(self, row: Row) -> int:
        """How many of the row's last queries are to be watched."""
        queries = self.rules.policy.queries
        if self.repeating:
            return row.stop - row.start
        if queries is None:
            return 0
        if queries == "all":
            return row.stop - row.start
        return max(0, row.stop - max(row.start, self.due - int(queries)))

    def records(self, row: Row) -> bool:
        """Whether what enters a layer's attention is kept for a scorer: until tokens have gone."""
        return self.rules.records and row.stop <= self.due < FOREVER

    def add(
        self, chain: Chain, tiles: slice, slots: torch.Tensor | slice, mass: torch.Tensor
    ) -> None:
        """Books `mass: [tiles, n]` at slots of a chain."""
        line = self._line(chain, "mass", slots)
        if isinstance(slots, slice):
            target = line[tiles, slots]
            target += mass if self.rules.policy.over == "sum" else (mass - target).clamp_min_(0)
        elif self.rules.policy.over == "sum":
            line[tiles].index_add_(1, slots, mass)
        else:
            line[tiles, slots] = torch.maximum(line[tiles, slots], mass)

    def write(self, chain: Chain, tiles: slice, slots: slice, notes: torch.Tensor) -> None:
        """Books what the policy noted of new tokens, `[tiles, n]`."""
        self._line(chain, "notes", slots)[tiles, slots] = notes

    def remember(self, layer: int, q: torch.Tensor, scale: float, stop: int) -> None:
        """Keeps the last of the queries `q: [n, H_q, D]` that end at `stop`."""
        last = self.rules.policy.last_queries
        old = self.queries.get(layer)
        both = q.float() if old is None else torch.cat([old, q.float()])
        self.queries[layer], self.scales[layer] = both[-last:].clone(), scale
        self.seen = stop

    def _line(self, chain: Chain, what: str, slots: torch.Tensor | slice) -> torch.Tensor:
        line = self.lines.setdefault(chain.group.name, Line())
        end = slots.stop if isinstance(slots, slice) else int(slots.max()) + 1
        found: torch.Tensor | None = getattr(line, what)
        if found is None or found.shape[1] < end:
            grown = torch.zeros(
                len(chain.group.coords), max(64, end + end // 4), device=self.rules.bridge.device
            )
            if found is not None:
                grown[:, : found.shape[1]] = found
            setattr(line, what, grown)
            found = grown
        return found

    # -- reading once more -------------------------------------------------------------------------------------------

    def repeats_at(self, length: int) -> bool:
        """Whether tokens are about to go at this length that were not read once more yet."""
        if self.repeating or length != self.due or not self.rules.policy.repeats:
            return False
        return self.repeated < length and self.rules.kept_tokens(length) < length

    def forget_behind(self, table: BlockTable, length: int) -> None:
        """What was booked at the places of tokens from `length` on means nothing: these tokens are gone."""
        for chains in families(table).values():
            for chain in chains:
                line = self.lines.get(chain.group.name)
                if line is not None and line.mass is not None:
                    line.mass[:, chain.slot(length) :] = 0

    # -- dropping ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _compact(self, table: BlockTable) -> None:
        """Raises CapacityError; nothing has changed then."""
        rules, length = self.rules, table.length
        if rules.kept_tokens(length) >= length:
            self._forget()
            self._tell(table, None)
            return
        wanted = {}
        for name, chains in families(table).items():
            try:
                wanted[name] = self._choose(table, chains)
            except CannotScoreError as e:
                log.warning("keep=%r: %s; all %d tokens stay", rules.keep.text, e, length)
                self._forget()
                self._tell(table, None)
                return
        before = families(table)
        lines = {c.group.name: c for chains in before.values() for c in chains}
        every = {n: c.slot(length) for n, c in lines.items()}
        lows = {n: settled(table, c) for n, c in lines.items()}
        compact(table, wanted, row_mover(rules.layout))
        after = families(table)
        fresh: dict[str, Line] = {}
        for name, parts in wanted.items():
            for part, chain in zip(parts, after[name], strict=True):
                fresh[chain.group.name] = self._carried(before[name], chain, part, lows, every)
        self.lines = fresh
        self._forget()
        self._tell(table, self)

    def _tell(self, table: BlockTable, kept: Keeper | None) -> None:
        publish, self.publish = self.publish, None
        if publish is not None:
            publish(table, kept)

    def _forget(self) -> None:
        """Of the last N queries' attention nothing is left for the next time, nor of what a scorer was given."""
        self.pieces = {}
        if isinstance(self.rules.policy.queries, int):
            for line in self.lines.values():
                line.mass = None

    def _carried(
        self,
        old: Sequence[Chain],
        new: Chain,
        part: Part,
        lows: Mapping[str, int],
        every: Mapping[str, int],
    ) -> Line:
        """The kept slots' figures, and those of all slots behind the ones that were chosen from."""
        out = Line()
        source = {coord: c for c in old for coord in c.group.coords}
        for what in ("mass", "notes"):
            rows = []
            for coord, slots in zip(part.coords, part.slots, strict=True):
                chain = source[coord]
                name = chain.group.name
                have: torch.Tensor | None = getattr(self.lines.get(name, Line()), what)
                if have is None:
                    break
                row = have[chain.group.coords.index(coord)]
                if len(row) < every[name]:
                    row = torch.nn.functional.pad(row, (0, every[name] - len(row)))
                at = torch.from_numpy(slots).to(row.device)
                rows.append(torch.cat([row[at], row[lows[name] : every[name]]]))
            if len(rows) == len(part.coords):
                setattr(out, what, torch.stack(rows))
        return out

    def _choose(self, table: BlockTable, chains: list[Chain]) -> list[Part]:
        """What each coordinate of a family keeps."""
        rules, policy, length = self.rules, self.rules.policy, table.length
        raw = companion(table, chains[0])
        always = list(policy.protect(length, self.prompt_tokens))
        if raw is not None and isinstance(raw.group.span, Residual):
            always.append((0, raw.group.span.sinks))  # their codes are not read; they stay in place
        scores: dict[Coord, torch.Tensor] = {}
        safe: dict[Coord, torch.Tensor] = {}
        for chain in chains:
            low = settled(table, chain)
            positions = chain.true_positions(length)[:, :low]
            for layer in chain.group.layers:
                first = chain.group.tile_index(layer)
                heads = chain.group.heads(layer)
                tiles = slice(first, first + len(heads))
                own = torch.from_numpy(np.array(positions[tiles])).long().to(rules.bridge.device)
                kept = inside(own, always)
                seen = self._show(table, chain, layer, tiles, own, low)
                found = policy.score(seen) if low else own.float()
                if found.shape != own.shape:
                    raise InvariantError(
                        f"{policy.name}: scores of {tuple(found.shape)} for {tuple(own.shape)} tokens"
                    )
                for i, head in enumerate(heads):
                    scores[layer, head], safe[layer, head] = found[i].float(), kept[i]
        group = chains[0].group
        unit, size = unit_tokens(rules.layout, group), group.block_tokens
        lossy = raw is not None
        rest = length - chains[0].position(settled(table, chains[0]))
        if unit > 1:
            scores, safe = by_block(scores, unit), by_block(safe, unit)
        budget = max(0, rules.kept_tokens(length) - rest) // unit
        counts = self._counts(scores, safe, budget, length)
        grain = size // unit if lossy else 1
        return make_parts(scores, safe, counts, grain, size, unit)

    def _counts(
        self,
        scores: Mapping[Coord, torch.Tensor],
        safe: Mapping[Coord, torch.Tensor],
        budget: int,
        length: int,
    ) -> dict[Coord, int]:
        """How many units each coordinate keeps in all."""
        policy = self.rules.policy
        free = {c: s[~safe[c]] for c, s in scores.items()}
        sure = {c: int(safe[c].sum()) for c in scores}
        left = max(0, budget - max(sure.values()))
        more = policy.allocate(free, left, length)
        return {c: sure[c] + max(0, min(int(more[c]), len(free[c]))) for c in scores}

    def _show(
        self,
        table: BlockTable,
        chain: Chain,
        layer: int,
        tiles: slice,
        positions: torch.Tensor,
        low: int,
    ) -> Seen:
        rules, policy = self.rules, self.rules.policy
        line = self.lines.get(chain.group.name, Line())
        names = rules.bridge.field_names(layer)

        def read(name: str) -> torch.Tensor:
            if names[0] == "latent":
                parts = names if name == "k" else names[:1]
                fields = [
                    read_field(rules.store, rules.layout, chain, layer, n, low) for n in parts
                ]
                return torch.cat(fields, -1)
            return read_field(rules.store, rules.layout, chain, layer, name, low)

        def cut(x: torch.Tensor | None) -> torch.Tensor | None:
            if x is None:
                return None
            if x.shape[1] < low:
                x = torch.nn.functional.pad(x, (0, low - x.shape[1]))
            return x[tiles, :low]

        queries = at = None
        if policy.last_queries and layer in self.queries:
            q = self.queries[layer]
            share = q.shape[1] // len(rules.heads(layer))
            mine = [h * share + g for h in chain.group.heads(layer) for g in range(share)]
            queries = q[:, mine].transpose(0, 1)
            at = torch.arange(self.seen - q.shape[0], self.seen, device=q.device)
        called = None
        if rules.outside is not None:
            called = partial(self._call, table, chain, layer)
        mass = cut(line.mass)
        if (policy.queries is not None or policy.repeats) and mass is None:
            mass = torch.zeros(positions.shape, device=positions.device)
        return Seen(
            coords=tuple((layer, h) for h in chain.group.heads(layer)),
            n_layers=len(rules.layers),
            positions=positions,
            length=table.length,
            prompt_tokens=self.prompt_tokens,
            read=read,
            mass=mass,
            queries=queries,
            query_positions=at,
            scale=self.scales.get(layer, 1.0),
            notes=cut(line.notes),
            called=called,
            turn=rules.turn(layer),
        )

    def _call(self, table: BlockTable, chain: Chain, layer: int) -> Called:
        """What a scorer from outside is given of a layer: every token, those that are still raw as well."""
        rules, length = self.rules, table.length
        outside = rules.outside
        assert outside is not None
        low, raw = settled(table, chain), companion(table, chain)

        def whole(name: str) -> torch.Tensor:
            parts = []
            if low:
                parts.append(read_field(rules.store, rules.layout, chain, layer, name, low))
            if raw is not None and low < length:
                parts.append(read_raw(rules.store, raw, layer, name, low, length))
            return torch.cat(parts, 1)

        k, v = (whole(name) for name in rules.bridge.field_names(layer))
        pieces = self.pieces.get(layer, ())
        return outside.called(layer, k, v, pieces, rules.kept_tokens(length))
