"""What the server tells about itself: to whom, how often, and that nobody's words reach another."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.serve.config import ServeConfig
from quire.serve.dashboard import FILES
from quire.serve.guard import OPEN_PATHS
from quire.serve.recent import Recent, percentiles
from quire.serve.watch import MOST_SEATS_EACH
from served import serving, wait_for

STREAM = {"accept": "text/event-stream"}


def ask(served: Any, who: str | None, prompt: str, model: str) -> None:
    served.client(who).completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0)


def stats(served: Any, who: str | None = None) -> dict[str, Any]:
    with served.http(who) as client:
        answer = client.get("/v1/kv/stats")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@contextlib.contextmanager
def watching(served: Any, who: str | None = None) -> Iterator[Iterator[dict[str, Any]]]:
    """The documents of one open dashboard."""
    with served.http(who) as client, client.stream("GET", "/v1/kv/stats", headers=STREAM) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield (
            json.loads(line.removeprefix("data: "))
            for line in answer.iter_lines()
            if line.startswith("data: ")
        )


def test_the_figures_are_those_of_the_store_and_the_engine(packaged: Any) -> None:
    before = stats(packaged)
    prompt = "The dashboard counts what it sees, and it sees this prompt for the first time. "
    for ending in ("One.", "Two."):
        ask(packaged, None, prompt + ending, "packaged")
    packaged.wait_idle()
    wait_for(lambda: done(stats(packaged)) >= 2 + done(before))
    after = stats(packaged)
    usage = packaged.engine.stats().usage
    blocks = after["blocks"]
    assert blocks["total_bytes"] == usage.total_bytes
    assert blocks["cached_bytes"] == usage.cached_bytes > 0
    assert sum(p["bytes"]["cached"] for p in blocks["pools"]) == usage.cached_bytes
    assert blocks["pools"][0]["codecs"] == ["fp32"]
    assert blocks["pools"][0]["tier"] == "cpu"
    places = [n * sum(row) for n, row in blocks["cells"]]
    assert (
        sum(places)
        == packaged.engine.runner.bridge.store.arena.slabs
        * next(iter(packaged.engine.runner.bridge.store.pools.values())).per_slab
    )
    assert after["prompts"]["tokens"] > before["prompts"]["tokens"]
    assert after["prompts"]["found_tokens"] >= before["prompts"]["found_tokens"] + 16
    assert after["misses"]["differs"] >= before["misses"].get("differs", 0) + 1
    assert after["waits"]["first_token_s"]["n"] >= 2
    assert after["waits"]["between_tokens_s"]["p50"] > 0
    assert after["you"] == {"tenant": "anybody", "operator": True}
    assert after["engine"]["corrupt"] == {"name with other tokens": 0}
    texts = [b["text"] for tree in after["tree"] for b in tree["branches"]]
    assert texts


def done(document: dict[str, Any]) -> int:
    return sum(row["done"] for row in document["tenants"])


def test_a_tenant_is_told_of_itself_only(keyed: Any) -> None:
    """Whatever another sends, a tenant's document keeps its form and holds no trace of it."""
    secret = {"alice": "zanzibar quixotic walrus ", "bob": "heliotrope fjord umbrella "}
    for who, words in secret.items():
        for _ in range(2):
            ask(keyed, who, words * 4, "tiny")
    wait_for(lambda: all(row["done"] for row in stats(keyed, "root")["tenants"]))
    for who, other in (("alice", "bob"), ("bob", "alice")):
        seen = stats(keyed, who)
        assert seen["you"] == {"tenant": who, "operator": False}
        assert [row["tenant"] for row in seen["tenants"]] == [who]
        assert {tree["tenant"] for tree in seen["tree"]} == {who}
        assert not {"blocks", "engine"} & set(seen)
        said = json.dumps(seen)
        assert other not in said
        assert not any(word in said for word in secret[other].split())
        assert secret[who][:8] in said, "the test shows nothing: its own words are not there"
        assert "other namespace" not in seen["misses"]
    root = stats(keyed, "root")
    assert {"alice", "bob"} <= {row["tenant"] for row in root["tenants"]}
    assert {"alice", "bob"} <= {tree["tenant"] for tree in root["tree"]}
    said = json.dumps(root)
    assert not any(word in said for words in secret.values() for word in words.split())


def test_why_a_tenant_missed_does_not_say_that_another_has_it(keyed: Any) -> None:
    prompt = "both of them think of this very sentence, and one comes second " * 2

    def reasons(who: str) -> dict[str, int]:
        keyed.wait_idle()
        found: dict[str, int] = keyed.service.watch._misses(scope(who), ["alice", "bob"])
        return found

    def scope(who: str) -> Any:
        from quire.serve.watch import Scope

        return Scope(who, who == "root")

    before = {who: reasons(who) for who in ("root", "bob")}
    ask(keyed, "alice", prompt, "tiny")
    ask(keyed, "bob", prompt, "tiny")
    for who, reason in (("root", "other namespace"), ("bob", "never stored")):
        wait_for(lambda w=who, r=reason: reasons(w).get(r, 0) > before[w].get(r, 0))
    assert "other namespace" not in reasons("bob")


def test_figures_need_a_key_and_the_page_does_not(keyed: Any) -> None:
    with httpx.Client(base_url=keyed.url) as client:
        assert client.get("/v1/kv/stats").status_code == 401
        assert client.get("/v1/kv/stats", headers=STREAM).status_code == 401
        for path, (name, kind) in FILES.items():
            answer = client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == kind
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert name not in ("alice", "bob")
    assert set(FILES) | {"/health", "/live"} == OPEN_PATHS


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_markup_of_text() -> None:
    folder = Path(__file__).parents[2] / "src" / "quire" / "serve" / "page"
    for name, _ in FILES.values():
        text = (folder / name).read_text(encoding="utf-8")
        addresses = text.replace("http://www.w3.org/2000/svg", "")
        assert "://" not in addresses, name
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, name
        assert "localStorage" not in text
        assert " style=" not in text
        assert "onclick" not in text


def test_many_dashboards_are_one_look_and_none_is_none(packaged: Any) -> None:
    watch = packaged.service.watch
    wait_for(lambda: not watch._seats)
    wait_for(lambda: watch._task is None or watch._task.done())
    seen: list[float] = []
    ready = threading.Barrier(MOST_SEATS_EACH + 1)

    def look_on() -> None:
        with watching(packaged) as documents:
            next(documents)
            ready.wait(30)
            seen.append(next(documents)["time_s"])
            ready.wait(30)

    threads = [threading.Thread(target=look_on) for _ in range(MOST_SEATS_EACH)]
    for thread in threads:
        thread.start()
    ready.wait(30)
    looks = watch.looks
    with packaged.http() as client:
        refused = client.get("/v1/kv/stats", headers=STREAM)
    assert refused.status_code == 429
    assert "retry-after" in refused.headers
    ready.wait(30)
    assert len(seen) == MOST_SEATS_EACH
    assert watch.looks - looks <= 3, "each of them was a look"
    for thread in threads:
        thread.join()
    wait_for(lambda: not watch._seats)
    wait_for(watch._task.done)
    looks = watch.looks
    threading.Event().wait(1.3)
    assert watch.looks == looks, "nobody looks on"


def test_polling_costs_no_more_than_a_stream(packaged: Any) -> None:
    first = stats(packaged)
    looks = packaged.service.watch.looks
    times = {stats(packaged)["time_s"] for _ in range(10)}
    assert packaged.service.watch.looks - looks <= 2
    assert len(times) <= 3
    assert first["object"] == "kv.stats"


def test_an_open_dashboard_does_not_hold_a_shutdown_up(tiny_folder: Path) -> None:
    config = ServeConfig(port=0, drain_s=20, dashboard=False)
    with serving(str(tiny_folder), config, name="tiny") as served:
        with served.http() as client:
            assert client.get("/").status_code == 404
            assert client.get("/v1/kv/stats").status_code == 200
        with watching(served) as documents:
            next(documents)
            served.stop()
            assert sum(1 for _ in documents) <= 2
        wait_for(served.server.lifespan.shutdown_event.is_set)


def test_tiers_are_told_of(tiny_folder: Path) -> None:
    """What was evicted lies in a tier, and the dashboard says so to an operator."""
    config = ServeConfig(port=0, drain_s=5)
    with serving(str(tiny_folder), config, name="tiny", memory="1MiB", tiers="host:8MiB") as served:
        assert [t["blocks"] for t in stats(served)["tiers"]] == [0]
        for i in range(12):
            ask(served, None, f"{i} is the beginning of a prompt of its own. " * 8, "tiny")
        served.wait_idle()
        wait_for(lambda: stats(served)["tiers"][0]["blocks"] > 0)
        seen = stats(served)
        (tier,) = seen["tiers"]
        assert (tier["tier"], tier["ok"]) == ("host", True)
        assert 0 < tier["used_bytes"] <= tier["capacity_bytes"] == 8 << 20
        assert seen["engine"]["corrupt"] == {"name with other tokens": 0, "host tier": 0}
        assert seen["engine"]["evicted_blocks"] > 0


def test_the_last_minute_forgets() -> None:
    now = [100.0]
    recent = Recent(most=8, clock=lambda: now[0])
    recent.count("output", 5)
    recent.first_s.append((now[0], 0.5))
    assert sum(recent.series()["output"]) == 0  # the second is not over
    now[0] = 101.5
    recent.count("output", 2)
    assert recent.series()["output"][-1] == 5
    now[0] = 130.0
    assert recent.series()["output"][-30:-27] == [5, 2, 0]
    assert recent.waits()["first_token_s"] == [0.5]
    now[0] = 161.0
    assert recent.series()["output"][:2] == [2, 0]
    assert recent.waits()["first_token_s"] == []
    now[0] = 500.0
    assert recent.series()["output"] == [0] * 60


@pytest.mark.parametrize("n", [1, 2, 10, 99, 100])
def test_percentiles_are_the_nearest_ranks(n: int) -> None:
    values = [float(i) for i in range(1, n + 1)]
    found = percentiles(reversed(values))
    for p in (50, 90, 99):
        assert sum(v <= found[f"p{p}"] for v in values) / n >= p / 100
        assert sum(v < found[f"p{p}"] for v in values) / n < p / 100
    assert percentiles([]) == {"n": 0, "p50": None, "p90": None, "p99": None}
