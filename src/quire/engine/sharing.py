"""How a request comes to its table: over what is cached, or after whoever computes it. No torch.

A new prefix that several requests bring at once is computed by the first of them. The others wait, without a row and
without memory, for as long as the next chunk that they lack is promised by a request before them; each is let in when
what they have in common lies in the cache. Who would resume from a compaction waits for it in the same way. A promise
ends with the request that gave it, so nobody waits for the dead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from quire.errors import RequestError
from quire.store.checkpoints import common_tokens
from quire.store.index import packed
from quire.store.sharing import Sharing
from quire.store.whole import Whole, whole_name

if TYPE_CHECKING:
    from quire.engine.audit import Auditor
    from quire.engine.engine import Engine
    from quire.engine.request import Request, Sample
    from quire.engine.runner import Room, Table
    from quire.store.path import Path
    from quire.store.tiering import Tiering
    from quire.store.whole_tiers import Rising

SHORT_S = 0.0005
"""A tier that has nothing says so within this, and the request need not sit out a step."""
IDLE_S = 0.01
LOOKED_AT = 32
"""Of those that wait, when a prompt is planned: the next ones."""

__all__ = ["Opener", "check_share", "sharing_report"]


def check_share(share: str | None, sharing: Sharing | None) -> bool:
    """Whether a request that asks for `share` (None: what the runner does) looks its prefix up.

    Raises:
        RequestError: unknown, or asked of a runner that shares nothing.
    """
    if share not in (None, "off", "prefix"):
        raise RequestError(f"unknown share {share!r}; known: off, prefix")
    if share == "prefix" and sharing is None:
        raise RequestError("this runner shares nothing; open it with share='prefix'")
    return sharing is not None and share != "off"


def _limit(sample: Sample) -> int:
    """At most so many of its tokens may be found: logits from there on are wanted."""
    return (sample.unscored or len(sample.tokens)) - 1


@dataclass(slots=True)
class Wanted:
    """The compaction that a sample resumes from, or leaves behind for others: see `store.whole`."""

    sharing: Sharing
    sample: Sample
    rules: Any
    name: bytes
    n_tokens: int

    @classmethod
    def of(cls, sharing: Sharing, sample: Sample, rules: Any, adapter: bytes) -> Wanted | None:
        """Of a sample whose policy lets others find it; None for all others."""
        if rules is None or not rules.published:
            return None
        n = sample.request.context or sample.prompt_tokens
        path = sharing.path(sample.tokens, sample.request.namespace, adapter)
        name = whole_name(path, n, rules.said)
        return cls(sharing, sample, rules, name, n)

    def find(self) -> Whole | None:
        """What is published, where the sample can go on behind it."""
        if self.n_tokens > _limit(self.sample):
            return None
        tokens = self.sample.tokens[: self.n_tokens]
        return self.sharing.wholes.find(self.name, tokens, self.rules.said)

    def open(self, whole: Whole) -> Table:
        """A table over it."""
        table = self.sharing.wholes.open(whole)
        request = self.sample.request
        keeper = self.rules.apply(table, self.sample.prompt_tokens, request.context)
        keeper.resume(whole.state)
        return table

    def seek(self, tiering: Tiering) -> Rising | None:
        """Asks the tiers, once; what the sample has to wait for now."""
        if self.sample.sought or self.n_tokens > _limit(self.sample):
            return None
        self.sample.sought = True
        tokens = packed(self.sample.tokens[: self.n_tokens])
        self.sample.rising = tiering.wholes.want(self.name, tokens, self.rules.said)
        return self.sample.rising

    def awaited(self) -> bool:
        """Whether somebody before the sample computes it; noted, so that the sample waits."""
        if not self.sharing.computing(self.name, self.sample.seat):
            return False
        self.sharing.stats.waits += 1
        self.sample.awaits = self.name
        return True

    def promise(self, path: Path) -> None:
        """The sample computes it, and who comes behind may wait."""
        path.promise_whole(self.name)

    def publish(self, table: Any, kept: Any) -> None:
        """Told by the sample's keeper when tokens were due: of itself, or None where all of them stay."""
        if kept is not None:
            tokens, policy = self.sample.tokens[: self.n_tokens], self.rules.said
            hints = self.sample.request.hints
            self.sharing.wholes.publish(self.name, tokens, policy, table, kept.fork(), hints)
        elif table.path is not None:
            table.path.withdraw_whole()


class Opener:
    """Opens tables for a scheduler.

    Args:
        room: the runner, whose `sharing` is used where it has one.
        adapter_digest: what an adapter adds to the weights, as bytes.
        auditor: told of every hit.
    """

    def __init__(
        self,
        room: Room,
        adapter_digest: Callable[[str], bytes] | None = None,
        auditor: Auditor | None = None,
    ) -> None:
        self.room = room
        self.auditor = auditor
        self.sharing: Sharing | None = getattr(room, "sharing", None)
        self.tiering: Tiering | None = getattr(self.sharing, "tiering", None)
        self.adapter_digest = adapter_digest or (lambda name: name.encode())
        self._asked = False
        """Whether somebody has looked in this step, of those that may be loaded for."""
        self.waiting: Callable[[int], Sequence[Sample]] = lambda _: ()
        """About the first so many of those that wait; set by who has a scheduler."""
        self.put_off = False
        """Whether somebody was not looked up in this step for want of time: then nothing planned is no dead end."""

    def __call__(self, sample: Sample) -> Table | None:
        """A table that may hold a beginning of the sample's tokens; None while somebody before it computes them."""
        sharing, request, rules = self.sharing, sample.request, None
        if request.keep is not None:
            rules = self.room.rules(request.keep)  # type: ignore[attr-defined]
        if sharing is None or not request.share or (rules is not None and not rules.shares):
            if rules is None:
                return self.room.open()
            more = {"context_tokens": request.context} if request.context else {}
            return self.room.open(request.keep, sample.prompt_tokens, **more)  # type: ignore[call-arg]
        if sample.awaits is not None and sharing.computing(sample.awaits, sample.seat):
            return None
        if self.tiering is not None and self._asked and self.tiering.pace.left_s <= 0:
            self.put_off = True
            return None  # looking and asking have their time, too
        self._asked = True
        wanted = Wanted.of(sharing, sample, rules, self._adapter(request))
        if wanted is not None:
            table = self._resumed(wanted)
            if table is not None or sample.rising is not None or wanted.awaited():
                return table
        path = self._found(sharing, sample, rules)
        if path is None:
            return None
        table = sharing.take(path)
        keeper = None
        if rules is not None:
            keeper = rules.apply(table, sample.prompt_tokens, request.context)
        if sharing.states is not None:
            self._mark(sample, path)
        path.promise(sample.prompt_tokens, sample.seat)
        if wanted is not None and keeper is not None:
            wanted.promise(path)
            keeper.publish = wanted.publish
        self._joins()
        if self.auditor is not None:
            self.auditor.found(sample, table.length)
        return table

    def _found(self, sharing: Sharing, sample: Sample, rules: Any) -> Path | None:
        """What there is of a sample's tokens, on the device or below; None while it is on its way."""
        path = self._look(sharing, sample, rules)
        sample.awaits = sharing.awaited(path, sample.seat)
        if sample.awaits is not None or self.tiering is None:
            return None if sample.awaits is not None else path
        return self._brought_up(self.tiering, sample, path, rules)

    def _mark(self, sample: Sample, path: Path) -> None:
        """Where those that wait go on otherwise they will want a state: what they have in common is computed once."""
        mine = sample.request
        for other in self.waiting(LOOKED_AT):
            theirs = other.request
            same = (theirs.namespace, theirs.adapter) == (mine.namespace, mine.adapter)
            if other is not sample and same and theirs.share and other.seat > sample.seat:
                path.mark(common_tokens(sample.tokens, other.tokens[:-1]))

    def _look(self, sharing: Sharing, sample: Sample, rules: Any) -> Path:
        """What the device has of a sample's tokens."""
        request, limit, began = sample.request, _limit(sample), perf_counter()
        if rules is not None and rules.scores:
            first = request.context or sample.prompt_tokens
            limit = min(limit, rules.hit_limit(first), first)
        path = sharing.look(
            sample.tokens,
            request.namespace,
            limit=limit,
            adapter=self._adapter(request),
            hints=request.hints,
            label=request.request_id,
        )
        if self.tiering is not None:
            self.tiering.pace.spent(perf_counter() - began)
        return path

    def _adapter(self, request: Request) -> bytes:
        return b"" if request.adapter is None else self.adapter_digest(request.adapter)

    # -- from the tiers ------------------------------------------------------------------------------------------

    def _brought_up(self, tiering: Tiering, sample: Sample, path: Path, rules: Any) -> Path | None:
        """The prefix once all that tiers can give is bound; None where the sample has a `fetch` to wait for."""
        more = True
        while True:
            if sample.fetch is None:
                if not more or path.found <= sample.fetched:
                    return path
                sample.fetched = path.found
                began = perf_counter()
                sample.fetch = tiering.want(path)
                if sample.fetch is not None:
                    sample.fetch.done.wait(SHORT_S)
                tiering.pace.spent(perf_counter() - began)
                if sample.fetch is None:
                    return path
            fetch = sample.fetch
            if not tiering.ready(fetch) or not tiering.bind(fetch):
                return None
            sample.fetch, more = None, fetch.more or fetch.users > 1
            loaded = max(0, fetch.at - fetch.found) * path.sharing.grain
            sample.request.figures.loaded_tokens += loaded
            path = self._look(path.sharing, sample, rules)

    def _resumed(self, wanted: Wanted) -> Table | None:
        """A table over a published compaction, if there is one; the sample may have it to wait for (`rising`)."""
        whole = wanted.find() if self._rose(wanted) else None
        if whole is None:
            return None
        table = wanted.open(whole)
        self._joins()
        if self.auditor is not None:
            self.auditor.found(wanted.sample, whole.length, wanted.rules)
        return table

    def _joins(self) -> None:
        """Somebody computes in this step: copies have no more time than beside others."""
        if self.tiering is not None:
            self.tiering.pace.joined()

    def _rose(self, wanted: Wanted) -> bool:
        """Whether all that the tiers have of a compaction is bound; False where the sample has it to wait for."""
        tiering, sample = self.tiering, wanted.sample
        if tiering is None:
            return True
        rising, wholes = sample.rising, tiering.wholes
        if rising is None and wanted.find() is None:
            began = perf_counter()
            rising = wanted.seek(tiering)
            if rising is not None:
                rising.done.wait(SHORT_S)
            tiering.pace.spent(perf_counter() - began)
        if rising is None:
            return True
        if not wholes.ready(rising) or not wholes.bind(rising, wanted.rules.revived):
            return False
        sample.rising = None
        if wanted.find() is not None:
            sample.request.figures.loaded_tokens += wanted.n_tokens
        return True

    def arrived(self, sample: Sample) -> bool:
        """Whether a sample that loads may ask again for its table."""
        if self.tiering is None:
            return True
        if sample.rising is not None:
            return self.tiering.wholes.ready(sample.rising)
        return sample.fetch is None or self.tiering.ready(sample.fetch)

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Brings prefixes up while others compute, and lets go down what they pushed out."""
        if self.sharing is None or self.tiering is None:
            return
        self.tiering.end_schedule()
        for sample in samples:
            if self.tiering.pace.left_s <= 0:
                break
            request = sample.request
            if sample.fetch is not None or sample.fetched >= 0 or not request.share:
                continue
            if sample.parked is not None or sample.rising is not None:
                continue
            rules = None
            if request.keep is not None:
                rules = self.room.rules(request.keep)  # type: ignore[attr-defined]
                if not rules.shares:
                    continue
            wanted = Wanted.of(self.sharing, sample, rules, self._adapter(request))
            if wanted is not None and (wanted.find() or wanted.seek(self.tiering)):
                continue
            path = self._look(self.sharing, sample, rules)
            if self.sharing.awaited(path, sample.seat) is None:
                sample.fetched = path.found
                sample.fetch = self.tiering.want(path)
        self.tiering.pace.end_schedule()

    def begin_step(self, *, alone: bool) -> None:
        """See `Tiering.begin_step`."""
        self._asked = self.put_off = False
        if self.tiering is not None:
            self.tiering.begin_step(alone=alone)

    def wait(self) -> None:
        """There is nothing to compute: until something arrives, or for as long as nobody notices."""
        if self.tiering is not None:
            self.tiering.wait(IDLE_S)

    def forget(self, sample: Sample) -> None:
        """A sample is over."""
        if sample.rising is not None and self.tiering is not None:
            self.tiering.wholes.abandon(sample.rising)
            sample.rising = None
        if sample.fetch is not None and self.tiering is not None:
            self.tiering.abandon(sample.fetch)
            sample.fetch = None

    def flush(self) -> None:
        """See `Tiering.flush`."""
        if self.tiering is not None:
            self.tiering.flush()


def sharing_report(engine: Engine) -> dict[str, Any] | None:
    """What an engine's prefix cache has done and found out about itself, as plain data; None where there is none."""
    opener = engine.opener
    if opener.sharing is None:
        return None
    stats = opener.sharing.stats
    found: dict[str, Any] = {**asdict(stats), "hit_ratio": round(stats.hit_ratio, 6)}
    wholes = list(opener.sharing.wholes)
    found["wholes"] = {
        "count": len(wholes),
        "block_bytes": sum(w.block_bytes for w in wholes),
        "state_bytes": sum(w.state_bytes for w in wholes),
    }
    if opener.sharing.ghost is not None:
        found["ghost"] = [
            {**asdict(g), "hit_ratio": round(g.hit_ratio, 6)}
            for g in opener.sharing.ghost.figures()
        ]
    if opener.auditor is not None:
        found["audit"] = asdict(opener.auditor.stats)
    if opener.tiering is not None:
        found["tiers"] = opener.tiering.report()
    return found
