"""What goes on in the server, as one document: for the dashboard, `quire inspect URL`, and whoever asks.

    engine's thread, between two steps    copies: blocks, trees, counters          once a second at most
    a worker thread                       counts, percentiles, text                once per (tenant, operator)
    event loop                            the same bytes to everybody who looks

Nobody looks: nothing is done. A tenant is told of itself only; an operator of all, but never the text of another's
prompts: names and figures are the operator's business, words are their owner's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire import __version__
from quire.engine import EngineStats
from quire.engine.sharing import sharing_report
from quire.serve.errors import ApiError, event
from quire.serve.keys import Caller
from quire.serve.recent import Recent, percentiles
from quire.store.census import STATES, Branch, Census, hottest

if TYPE_CHECKING:
    from quire.serve.service import Service

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
"""From one look to the next."""

MOST_CELLS = 768
MOST_CHUNKS = 256
"""Of prefix trees, visited in one look by all who look together."""

MOST_BRANCHES, MOST_CHILDREN, MOST_LONE = 18, 5, 1
"""Told of all trees together, behind one branch, and of these that were never found again."""

MOST_TREES = 6
MOST_TENANTS = 50
MOST_SEATS, MOST_SEATS_EACH = 64, 8

_NOTHING: Mapping[str, int] = {}
_NO_REQUESTS = {"running": 0, "waiting": 0, "held_bytes": 0}


@dataclass(frozen=True)
class Scope:
    """Who is told, and so what."""

    tenant: str
    operator: bool


@dataclass(eq=False)
class Seat:
    """One stream of documents; a reader that is slow misses some."""

    scope: Scope
    latest: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(1))

    def put(self, what: bytes | None) -> None:
        """In place of what was not read yet."""
        if self.latest.full():
            self.latest.get_nowait()
        self.latest.put_nowait(what)


@dataclass(frozen=True)
class Look:
    """What was copied between two steps."""

    stats: EngineStats
    sharing: dict[str, Any] | None
    collisions: int
    census: Census | None
    trees: dict[Scope, list[tuple[str, list[Branch]]]]
    seconds: float


class Watch:
    """Looks once a second while somebody is interested."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.looks = 0
        """Times that the engine was looked at."""
        self.look_s = 0.0
        """Seconds that its thread gave to the last of them."""
        self._seats: set[Seat] = set()
        self._task: asyncio.Task[None] | None = None
        self._known: dict[Scope, tuple[float, dict[str, Any]]] = {}
        self._looking = asyncio.Lock()
        self._closed = False

    async def document(self, caller: Caller) -> dict[str, Any]:
        """How things are, at most a second old."""
        scope = Scope(caller.name, caller.operator)
        async with self._looking:
            known = self._known.get(scope)
            if known is None or time.monotonic() - known[0] >= PERIOD_S:
                await self._refresh({scope})
            return self._known[scope][1]

    def sit(self, caller: Caller) -> Seat:
        """A place to look on from; give it back with `leave`.

        Raises:
            ApiError: 429, too many look on; 503 while draining.
        """
        if self._closed:
            raise ApiError(503, "the server is shutting down", code="draining")
        scope = Scope(caller.name, caller.operator)
        mine = sum(seat.scope.tenant == scope.tenant for seat in self._seats)
        if len(self._seats) >= MOST_SEATS or mine >= MOST_SEATS_EACH:
            raise ApiError(
                429,
                f"{mine} of your dashboards are open; close one",
                code="watchers",
                retry_after_s=10.0,
            )
        seat = Seat(scope)
        self._seats.add(seat)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._tell())
        return seat

    def leave(self, seat: Seat) -> None:
        """Nobody looks on from there any more. Idempotent."""
        self._seats.discard(seat)

    async def events(self, seat: Seat) -> AsyncIterator[bytes]:
        """A document a second, as server-sent events."""
        while (what := await seat.latest.get()) is not None:
            yield what

    def close(self) -> None:
        """End all streams: nobody's dashboard holds a shutdown up."""
        self._closed = True
        for seat in self._seats:
            seat.put(None)

    # -- looking -------------------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        while self._seats and not self._closed:
            began = time.monotonic()
            try:
                async with self._looking:
                    await self._refresh({seat.scope for seat in self._seats})
            except Exception:
                logger.exception("the dashboards' look failed; they may ask again")
                for seat in self._seats:
                    seat.put(None)
                return
            ready: dict[Scope, bytes] = {}
            for seat in self._seats:
                if seat.scope in self._known:
                    if seat.scope not in ready:
                        ready[seat.scope] = event(self._known[seat.scope][1])
                    seat.put(ready[seat.scope])
            await asyncio.sleep(max(0.1, began + PERIOD_S - time.monotonic()))

    async def _refresh(self, scopes: set[Scope]) -> None:
        """New documents for these; the old ones of others are forgotten once they are too old to be given."""
        roots = {scope: self._roots(scope) for scope in scopes}
        look = await asyncio.wrap_future(self.service.engine.between(lambda: self._look(roots)))
        self.looks += 1
        self.look_s = look.seconds
        now = time.monotonic()
        found = {scope: (now, self._here(scope, look)) for scope in scopes}
        await asyncio.to_thread(self._finish, found, look)
        fresh = {s: k for s, k in self._known.items() if now - k[0] < PERIOD_S}
        self._known = fresh | found

    def _roots(self, scope: Scope) -> dict[bytes, str]:
        """Names of empty prefixes -> tenant, of those whose trees this scope may see."""
        sharing, owners = self.service.engine.opener.sharing, self.service.owners
        if sharing is None:
            return {}
        named = ((root, owners.get(salt)) for root, salt in list(sharing.roots.items()))
        return {
            root: owner
            for root, owner in named
            if owner is not None and (scope.operator or owner == scope.tenant)
        }

    def _look(self, roots: Mapping[Scope, Mapping[bytes, str]]) -> Look:
        """In the engine's thread, between two steps: copies only."""
        began = time.perf_counter()
        engine = self.service.engine
        sharing = engine.opener.sharing
        trees: dict[Scope, list[tuple[str, list[Branch]]]] = {}
        each = max(16, MOST_CHUNKS // max(1, len(roots)))
        for scope, names in roots.items():
            by_tenant: dict[str, list[Branch]] = {}
            branches = [] if sharing is None else hottest(sharing, names, each)
            for branch in branches:
                by_tenant.setdefault(names[branch.root], []).append(branch)
            trees[scope] = list(by_tenant.items())
        store = getattr(getattr(engine.runner, "bridge", None), "store", None)
        asked = any(scope.operator for scope in roots)
        return Look(
            engine.stats(),
            sharing_report(engine),
            0 if sharing is None else sharing.index.collisions,
            Census(store) if asked and store is not None else None,
            trees,
            time.perf_counter() - began,
        )

    # -- telling -------------------------------------------------------------------------------------------------

    def _here(self, scope: Scope, look: Look) -> dict[str, Any]:
        """What lives in the event loop; copied here, so that a thread can go on with it."""
        service, meters = self.service, self.service.meters
        requests = self._requests()
        if scope.operator:
            mine = {
                "running": look.stats.scheduler.running,
                "waiting": look.stats.scheduler.waiting,
                "held_bytes": 0 if look.stats.usage is None else look.stats.usage.held_bytes,
            }
            tenants = sorted({*meters.by_tenant, *requests}, key=lambda t: -self._weight(t))
            recent = meters.recent[None]
        else:
            mine = requests.get(scope.tenant, _NO_REQUESTS)
            tenants = [scope.tenant]
            recent = meters.recent.get(scope.tenant) or Recent()
        shown = tenants[:MOST_TENANTS]
        return {
            "object": "kv.stats",
            "version": __version__,
            "model": service.name,
            "models": list(service.models),
            "served": list(service.served),
            "kv": service.kv,
            "keep": service.keep,
            "share": "prefix" if service.shares else "off",
            "time_s": round(time.time(), 3),
            "up_s": round(time.time() - service.created_s, 1),
            "you": {"tenant": scope.tenant, "operator": scope.operator},
            "requests": mine,
            "series": recent.series(),
            "waits": recent.waits(),
            "prompts": self._prompts(tenants),
            "misses": self._misses(scope, tenants),
            "tenants": [{"tenant": t} | self._tenant(t, requests) for t in shown],
            "tenants_left_out": len(tenants) - len(shown),
            "chat": bool(service.prompts.template),
        }

    def _requests(self) -> dict[str, dict[str, int]]:
        """Running and waiting requests by tenant."""
        out: dict[str, dict[str, int]] = {}
        for run in self.service.runs:
            row = out.setdefault(run.caller.name, dict(_NO_REQUESTS))
            row["running" if run.started else "waiting"] += 1
            row["held_bytes"] += sum(s.request.figures.kv_bytes_held for s in run.streams)
        return out

    def _weight(self, tenant: str) -> int:
        row = self.service.meters.by_tenant.get(tenant, _NOTHING)
        return row.get("output", 0) + row.get("prompt", 0)

    def _tenant(self, tenant: str, requests: Mapping[str, dict[str, int]]) -> dict[str, Any]:
        meters = self.service.meters
        row = meters.by_tenant.get(tenant, _NOTHING)
        return {
            **requests.get(tenant, _NO_REQUESTS),
            "done": row.get("done", 0),
            "broken": row.get("broken", 0),
            "refused": sum(n for (who, _), n in meters.refusals.items() if who == tenant),
            "prompt_tokens": row.get("prompt", 0),
            "found_tokens": row.get("cached", 0),
            "output_tokens": row.get("output", 0),
        }

    def _prompts(self, tenants: Sequence[str]) -> dict[str, int]:
        rows = [self.service.meters.by_tenant.get(t, _NOTHING) for t in tenants]
        return {
            name: sum(row.get(key, 0) for row in rows)
            for name, key in (
                ("found", "found"),
                ("partly", "partly"),
                ("missed", "missed"),
                ("tokens", "prompt"),
                ("found_tokens", "cached"),
            )
        }

    def _misses(self, scope: Scope, tenants: Sequence[str]) -> dict[str, int]:
        """By reason. That another has a prefix is nothing that a tenant may learn."""
        known, out = set(tenants), dict[str, int]()
        for (tenant, reason), count in self.service.meters.misses.items():
            if tenant in known:
                hidden = reason == "other namespace" and not scope.operator
                said = "never stored" if hidden else reason
                out[said] = out.get(said, 0) + count
        return out

    def _finish(self, found: Mapping[Scope, tuple[float, dict[str, Any]]], look: Look) -> None:
        """The rest, in a thread."""
        blocks = None if look.census is None else self._blocks(look.census)
        for scope, (_, document) in found.items():
            document["waits"] = {n: percentiles(v) for n, v in document["waits"].items()}
            trees = sorted(look.trees[scope], key=lambda t: t[0] != scope.tenant)[:MOST_TREES]
            document["tree"] = [
                {
                    "tenant": tenant,
                    **self._branches(
                        branches, MOST_BRANCHES // len(trees), own=tenant == scope.tenant
                    ),
                }
                for tenant, branches in trees
            ]
            if scope.operator:
                document["blocks"] = blocks
                document["engine"] = self._engine(look)
                document["tiers"] = self._tiers(look)

    def _engine(self, look: Look) -> dict[str, Any]:
        scheduler, report = look.stats.scheduler, look.sharing or {}
        counters = (
            *("evicted_blocks", "stored_blocks", "merged_blocks", "copied_tokens", "waits"),
            "stored_states",
        )
        audit = report.get("audit", {})
        return {
            "steps": look.stats.steps,
            "preemptions": scheduler.preemptions,
            "stalls": scheduler.stalls,
            "recomputed_tokens": scheduler.recomputed_tokens,
            **{name: report[name] for name in counters if name in report},
            "loading": scheduler.loading,
            "corrupt": {"name with other tokens": look.collisions}
            | {f"{tier['tier']} tier": tier["corrupt"] for tier in self._tiers(look)}
            | ({"audit": audit["diverged"]} if audit else {}),
            "audited": audit.get("audited"),
            "look_s": round(look.seconds, 6),
        }

    def _tiers(self, look: Look) -> list[dict[str, Any]]:
        """Where evicted blocks lie, fastest first."""
        tiers: list[dict[str, Any]] = (look.sharing or {}).get("tiers", {}).get("levels", [])
        return tiers

    def _blocks(self, census: Census) -> dict[str, Any]:
        width, runs = census.cells(MOST_CELLS)
        usage = census.usage
        return {
            "total_bytes": usage.total_bytes,
            "held_bytes": usage.held_bytes,
            "cached_bytes": usage.cached_bytes,
            "free_bytes": usage.free_bytes,
            "pools": census.rows(),
            "states": list(STATES),
            "places_per_cell": width,
            "cells": runs,
        }

    def _branches(self, branches: Sequence[Branch], left: int, *, own: bool) -> dict[str, Any]:
        """The hottest of a tree, `left` of them, with words only for whom they belong to."""

        def told(some: Sequence[Branch], at: int) -> tuple[list[dict[str, Any]], int]:
            """Rows, and how many branches were left out."""
            nonlocal left
            out: list[dict[str, Any]] = []
            ordered = sorted(some, key=lambda b: -b.uses)
            lone = [b for b in ordered if b.uses < 2][:MOST_LONE]
            for branch in [*(b for b in ordered if b.uses >= 2), *lone][:MOST_CHILDREN]:
                if left <= 0:
                    break
                left -= 1
                row: dict[str, Any] = {
                    "at": at,
                    "tokens": branch.tokens,
                    "uses": branch.uses,
                    "chunks": branch.chunks,
                    "held_chunks": branch.held_chunks,
                }
                if own:
                    row["text"] = self.service.prompts.decode(branch.begins)
                row["children"], row["more"] = told(branch.children, at + branch.tokens)
                row["cut"] = branch.cut
                out.append(row)
            return out, len(some) - len(out)

        rows, more = told(branches, 0)
        return {"branches": rows, "more": more}
