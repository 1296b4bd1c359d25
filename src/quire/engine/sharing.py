"""How a request comes to its table: over what is cached, or after whoever computes it. No torch.

A new prefix that several requests bring at once is computed by the first of them. The others wait, without a row and
without memory, for as long as the next chunk that they lack is promised by a request before them; each is let in when
what they have in common lies in the cache. A promise ends with the request that gave it, so nobody waits for the dead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quire.errors import RequestError
from quire.store.sharing import Sharing

if TYPE_CHECKING:
    from quire.engine.audit import Auditor
    from quire.engine.engine import Engine
    from quire.engine.request import Sample
    from quire.engine.runner import Room, Table

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
        self.adapter_digest = adapter_digest or (lambda name: name.encode())

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
        sample.awaits = sharing.awaited(path, sample.seat)
        if sample.awaits is not None:
            return None
        table = sharing.take(path)
        if rules is not None:
            rules.apply(table, sample.prompt_tokens)
        path.promise(sample.prompt_tokens, sample.seat)
        if self.auditor is not None:
            self.auditor.found(sample, table.length)
        return table


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
    return found
