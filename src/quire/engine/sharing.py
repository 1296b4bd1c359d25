"""How a request comes to its table: over what is cached, or after whoever computes it. No torch.

A new prefix that several requests bring at once is computed by the first of them. The others wait, without a row and
without memory, for as long as the next chunk that they lack is promised by a request before them; each is let in when
what they have in common lies in the cache. A promise ends with the request that gave it, so nobody waits for the dead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

from quire.errors import RequestError
from quire.store.checkpoints import common_tokens
from quire.store.sharing import Sharing

if TYPE_CHECKING:
    from quire.engine.audit import Auditor
    from quire.engine.engine import Engine
    from quire.engine.request import Sample
    from quire.engine.runner import Room, Table
    from quire.store.path import Path
    from quire.store.tiering import Tiering

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

    def __call__(self, sample: Sample) -> Table | None:
        """A table that may hold a beginning of the sample's tokens; None while somebody before it computes them."""
        sharing, request = self.sharing, sample.request
        rules = None
        if request.keep is not None:
            rules = self.room.rules(request.keep)  # type: ignore[attr-defined]
        if sharing is None or not request.share or (rules is not None and not rules.shares):
            if rules is None:
                return self.room.open()
            return self.room.open(request.keep, sample.prompt_tokens)  # type: ignore[call-arg]
        if sample.awaits is not None and sharing.computing(sample.awaits, sample.seat):
            return None
        if self.tiering is not None and self._asked and self.tiering.pace.left_s <= 0:
            return None  # looking and asking have their time, too
        self._asked = True
        path = self._look(sharing, sample, rules)
        sample.awaits = sharing.awaited(path, sample.seat)
        if sample.awaits is not None:
            return None
        if self.tiering is not None:
            better = self._brought_up(self.tiering, sample, path, rules)
            if better is None:
                return None
            path = better
        table = sharing.take(path)
        if rules is not None:
            rules.apply(table, sample.prompt_tokens)
        if sharing.states is not None:
            self._mark(sample, path)
        path.promise(sample.prompt_tokens, sample.seat)
        if self.auditor is not None:
            self.auditor.found(sample, table.length)
        return table

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
        request, began = sample.request, perf_counter()
        adapter = b"" if request.adapter is None else self.adapter_digest(request.adapter)
        limit = (sample.unscored or len(sample.tokens)) - 1  # logits from there on are wanted
        if rules is not None and rules.scores:
            limit = min(limit, rules.hit_limit(sample.prompt_tokens), sample.prompt_tokens)
        path = sharing.look(
            sample.tokens,
            request.namespace,
            limit=limit,
            adapter=adapter,
            hints=request.hints,
            label=request.request_id,
        )
        if self.tiering is not None:
            self.tiering.pace.spent(perf_counter() - began)
        return path

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

    def arrived(self, sample: Sample) -> bool:
        """Whether a sample that loads may ask again for its table."""
        return sample.fetch is None or self.tiering is None or self.tiering.ready(sample.fetch)

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Brings prefixes up while others compute, and lets go down what they pushed out."""
        if self.sharing is None or self.tiering is None:
            return
        self.tiering.end_schedule()
        for sample in samples:
            request = sample.request
            if sample.fetch is not None or sample.fetched >= 0 or not request.share:
                continue
            if sample.parked is not None:
                continue
            rules = None
            if request.keep is not None:
                rules = self.room.rules(request.keep)  # type: ignore[attr-defined]
                if not rules.shares:
                    continue
            path = self._look(self.sharing, sample, rules)
            if self.sharing.awaited(path, sample.seat) is None:
                sample.fetched = path.found
                sample.fetch = self.tiering.want(path)

    def begin_step(self, *, alone: bool) -> None:
        """See `Tiering.begin_step`."""
        self._asked = False
        if self.tiering is not None:
            self.tiering.begin_step(alone=alone)

    def wait(self) -> None:
        """There is nothing to compute: until something arrives, or for as long as nobody notices."""
        if self.tiering is not None:
            self.tiering.wait(IDLE_S)

    def forget(self, sample: Sample) -> None:
        """A sample is over."""
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
