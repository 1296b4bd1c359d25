"""Claims: figures that the issue's arithmetic gives, honest verdicts, and a page that the command makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import CapacityError
from quire.evaluate.claims import (
    Claim,
    Outcome,
    arithmetic,
    dropped,
    later,
    measured,
    memory,
    rates,
    run_claims,
)
from quire.evaluate.claims.arithmetic import projections, scores
from quire.evaluate.claims.slips import slips

PARTS = (arithmetic, measured, memory, rates, dropped, later)
ALL = tuple(c for part in PARTS for c in part.CLAIMS)
REQUESTS = [(n - 100, 100) for n in (300, 500, 700, 900, 2400)] * 40


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    bench = measured.Bench(quick=True, requests=REQUESTS)
    return {r["name"]: r for r in run_claims(arithmetic.CLAIMS, bench)}


@pytest.mark.parametrize(
    ("name", "verdict", "figures"),
    [
        ("projections", "arithmetic", ["1,124,750", "2,499"]),
        ("attention", "arithmetic", ["8.00 and 4.00 times"]),
        ("document", "arithmetic", ["99.8%"]),
        ("sizes", "arithmetic", ["0.5 MiB and 2 GiB", "0.3125 MiB and 1.25 GiB", "4.5 MiB"]),
        ("70b", "arithmetic", ["1.25 GiB, 10 GiB, 40 GiB, 305.18 GiB", "320 GiB"]),
        ("128k", "arithmetic", ["40 GiB"]),
        ("heads", "arithmetic", ["71 times", "8 times"]),
        ("mla", "arithmetic", ["93.3%", "82.2%", "98.2% to 98.6%"]),
        ("gqa-int4", "contradicted", ["12.8", "15.1"]),
        ("mistral", "arithmetic", ["131,072"]),
        ("read", "arithmetic", ["1 ms"]),
        ("million", "arithmetic", ["79.0 GB", "89.5 GB"]),
        ("kivi-8x", "contradicted", ["5.20"]),
        ("kvquant-8x", "contradicted", ["6.9 times"]),
        ("coupled", "arithmetic", ["16 times"]),
        ("bound", "arithmetic", ["425 users"]),
        ("paging-waste", "reproduced", ["60.0%"]),
        ("paging-users", "reproduced", ["times as many"]),
    ],
)
def test_arithmetic(rows: Any, name: str, verdict: str, figures: list[str]) -> None:
    assert rows[name]["verdict"] == verdict, rows[name]
    for figure in figures:
        assert figure in rows[name]["ours"], rows[name]["ours"]


def test_every_claim_of_arithmetic_is_in_that_table(rows: Any) -> None:
    assert len(rows) == len(arithmetic.CLAIMS) == 18


def test_without_lengths_the_claims_about_paging_say_what_they_need() -> None:
    found = run_claims(arithmetic.CLAIMS[-2:], measured.Bench())
    assert [r["verdict"] for r in found] == ["not here"] * 2
    assert all("--lengths" in r["why"] for r in found)


def test_the_count_of_projections_is_a_sum() -> None:
    assert projections(3, 4) == (3 + 4 + 5 + 6, 3 + 3)


def test_the_count_of_scores_is_that_of_two_loops() -> None:
    for prompt, output in ((3, 4), (0, 5), (7, 1)):
        without = sum(q + 1 for i in range(output) for q in range(prompt + i))
        cached = sum(q + 1 for q in range(prompt + output - 1))
        assert scores(prompt, output) == (without, cached)


def test_names_are_unique_and_verdicts_known() -> None:
    names = [c.name for c in ALL]
    assert len(set(names)) == len(names) >= 28
    with pytest.raises(AssertionError):
        Outcome("x", "maybe")
    for claim in later.CLAIMS:
        found = claim.run(None)
        assert found.verdict == "not here"
        assert found.why


def test_a_claim_that_fails_spoils_no_other() -> None:
    def fails(_: Any) -> Outcome:
        raise CapacityError("no room\nat all")

    both = (Claim("a", "c", "s", fails), Claim("b", "c", "s", lambda _: Outcome("1", "arithmetic")))
    found = run_claims(both, None)
    assert found[0]["verdict"] == "not here"
    assert found[0]["why"] == "could not be run: no room at all"
    assert found[1]["verdict"] == "arithmetic"


def test_slips_carry_the_right_numbers() -> None:
    text = json.dumps(slips(), ensure_ascii=False)
    for right in ("320 KiB and 10 GiB", "0.78 MiB and 3.12 GiB", "128 query heads", "0.83 GB each"):
        assert right in text, right
    assert len(slips()) == 9


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("projections-run", "reproduced"),
        ("step", "reproduced"),
        ("codec-bytes", "contradicted"),
        ("copy-on-write", "reproduced"),
        ("continuous", "reproduced"),
        ("stale", "reproduced"),
    ],
)
def test_counts_on_the_packaged_model(name: str, verdict: str) -> None:
    """Those that do not depend on times."""
    (claim,) = (c for c in measured.CLAIMS if c.name == name)
    found = claim.run(measured.Bench(quick=True))
    assert found.verdict == verdict, found
    if name == "projections-run":
        assert "2,544" in found.ours
        assert "95" in found.ours


# -- tokens that are dropped -------------------------------------------------------------------------------------


def _claim(name: str) -> Claim:
    (claim,) = (c for c in dropped.CLAIMS if c.name == name)
    return claim


@pytest.mark.parametrize(
    ("recall", "ppl", "verdict"),
    [
        (0.995, 10.05, "reproduced"),
        (0.95, 10.05, "contradicted"),
        (0.995, 10.2, "contradicted"),
    ],
)
def test_a_fifth_is_enough_where_text_and_answers_stay(
    recall: float, ppl: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    asked = []

    def evaluate(_m: Any, _t: Any, configs: Any, tasks: Any, *_: Any, **more: Any) -> Any:
        asked.append((tasks, more.get("ask")))
        of = {"full": (1.0, 10.0), "h2o:budget=0.2": (recall, ppl), "random:budget=0.2": (0.3, 12)}
        rows = []
        for _, keep in configs:
            right = of[keep][0] if more.get("ask") == "before" else 0.2
            rows.append(SimpleNamespace(keep=keep, metric="recall", depth=None, value=right))
            rows.append(SimpleNamespace(keep=keep, metric="recall", depth=0.5, value=9.0))
            rows.append(
                SimpleNamespace(keep=keep, metric="perplexity", depth=None, value=of[keep][1])
            )
        return SimpleNamespace(rows=rows)

    monkeypatch.setattr("quire.evaluate.run.evaluate", evaluate)
    found = _claim("h2o").run(measured.Bench(quick=True))
    assert found.verdict == verdict
    assert "random fifth +20.0%" in found.ours
    assert "20% when asked after" in found.ours
    assert asked == [(["needle"], "before"), (["needle"], "after"), (["ppl"], None)]


def test_a_model_without_sinks_says_so_and_one_that_falls_apart_reproduces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = measured.Bench(quick=True)
    bench.ids = bench.ids[:700]
    found = _claim("sinks").run(bench)
    assert found.verdict == "not here", found
    assert "of 24 heads rest on the first token" in found.ours
    figures = iter([20.0, 200.0, 20.0, 21.0])
    monkeypatch.setattr(dropped, "_perplexity", lambda *_: next(figures))
    assert _claim("sinks").run(bench).verdict == "reproduced"
    from types import SimpleNamespace

    heads = [SimpleNamespace(sinks=(0,))] * 12
    monkeypatch.setattr("quire.evaluate.attention.look", lambda *_: SimpleNamespace(heads=heads))
    assert _claim("sinks").run(bench).verdict == "contradicted"


def test_perplexity_of_a_stream_is_that_of_one_pass() -> None:
    """Behind the first tokens only, and through a window as wide as the text what the model itself says."""
    import torch

    bench = measured.Bench(quick=True)
    ids = bench.ids[:300]
    with bench.opened("auto", keep="window:4000") as runner:
        found = dropped._perplexity(runner, ids, 200)
    with torch.no_grad():
        logs = bench.loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    want = -sum(float(logs[i, ids[i + 1]]) for i in range(200, 299)) / 99
    assert found == pytest.approx(2.718281828459045**want, rel=1e-4)


@pytest.mark.slow
def test_a_fifth_on_the_packaged_model() -> None:
    found = _claim("h2o").run(measured.Bench(quick=True))
    assert found.verdict == "contradicted", found


# -- rooms, blocks and windows -----------------------------------------------------------------------------------


def test_requests_are_shortened_alike() -> None:
    requests, by = memory.scaled(REQUESTS, 50, 240)
    assert by == 10
    assert set(requests) == {(20, 10), (40, 10), (60, 10), (80, 10), (230, 10)}
    assert len(requests) == 50
    assert requests == memory.scaled(REQUESTS, 50, 240)[0]
    assert memory.scaled([(5, 5)], 9, 100) == ([(5, 5)], 1.0)


def test_rooms_hold_four_and_blocks_as_many_as_fit() -> None:
    """Counts, not times: 8 requests of 40 tokens in an arena of four rooms of 128."""
    bench = measured.Bench(quick=True)
    requests = [(30, 10)] * 8
    ways = {
        (block, waves): memory.serve(bench, requests, room=128, block=block, waves=waves)
        for block, waves in ((128, True), (128, False), (16, False))
    }
    assert all(s.tokens == 80 and s.preempted == 0 for s in ways.values())
    assert [s.steps for s in ways.values()] == [20, 20, 10]
    assert [s.users for s in ways.values()] == [4, 4, 8]


def test_uneven_requests_join_as_others_leave() -> None:
    bench = measured.Bench(quick=True)
    requests = [(8, 4), (8, 20), (8, 4), (8, 4), (8, 16), (8, 4), (8, 4), (8, 4)]
    waves, joined = (
        memory.serve(bench, requests, room=32, block=32, waves=w) for w in (True, False)
    )
    assert waves.steps == 20 + 16
    assert joined.steps == 20
    assert joined.users > waves.users


def test_waste_is_what_the_last_block_leaves() -> None:
    assert memory.waste_of([32, 64], 32) == 0
    assert memory.waste_of([1, 33], 32) == pytest.approx(1 - 34 / 96)


@pytest.mark.parametrize(("name", "verdict"), [("window", "reproduced"), ("block-size", None)])
def test_claims_about_layout(name: str, verdict: str | None) -> None:
    (claim,) = (c for c in memory.CLAIMS if c.name == name)
    found = claim.run(measured.Bench(quick=True))
    if verdict is not None:  # the other one compares times
        assert found.verdict == verdict, found
        assert "up to position 124, and 4 x 31 = 124" in found.ours
        assert "65,536 bytes" in found.ours
    else:
        assert "256, 128, 64, 32, 16, 8 blocks" in found.ours
        assert "drawn evenly" in found.why


def test_paging_needs_prompts_and_outputs() -> None:
    (claim,) = (c for c in memory.CLAIMS if c.name == "paging-speed")
    found = claim.run(measured.Bench(requests=[(5,), (6,)]))
    assert found.verdict == "not here"
    assert "prompt and output" in found.why


# -- rates -------------------------------------------------------------------------------------------------------


def test_the_line_through_points() -> None:
    line = rates.fit([(0, 1.0), (10, 3.0), (20, 5.0)])
    assert (line.fixed_s, line.s_per_byte, line.r2) == pytest.approx((1, 0.2, 1))
    assert rates.fit([(0, 1.0), (10, 5.0), (20, 3.0)]).r2 == pytest.approx(0.25)


def test_the_machine_reads_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that the claim divides by, against those of the tables; a step leaves a text as it was."""
    small = dict(layers=2, hidden=64, heads=2, intermediate=96, vocab=128)
    monkeypatch.setattr(rates, "SHAPE", small)
    machine = rates.Machine((48, 600))
    try:
        assert machine.cache_bytes(600) == 600 * 2 * 2 * 64 * 4 == machine.texts[600].used_bytes()
        per_layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
        assert machine.weight_bytes == 4 * (2 * per_layer + 64 + 128 * 64)
        for _ in range(2):
            machine.decode(600)
        assert machine.texts[600].length == 600
        machine.prefill()
        assert machine.runner.usage().held_bytes == sum(
            t.held_bytes() for t in machine.texts.values()
        )
        found = rates.measure(machine, 1)
        assert set(found) == {48, 600, "prompt", "read", "product"}
    finally:
        machine.close()


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "reproduced"),
        ({"prompt": 0.004}, "contradicted"),  # as fast as its weights are read
        ({"read": 0.0005}, "contradicted"),  # memory that is far faster than the steps
        ({4096: 0.5}, "not here"),  # no line
    ],
)
def test_what_binds_a_step_is_judged_by_its_times(
    monkeypatch: pytest.MonkeyPatch, change: dict[Any, float], verdict: str
) -> None:
    monkeypatch.setattr(
        rates, "SHAPE", dict(layers=1, hidden=64, heads=1, intermediate=4, vocab=64)
    )
    cache = {n: n * 2 * 64 * 4 for n in (512, 2048, 4096, 8192)}
    rate = rates.STREAM_BYTES / 0.01
    seconds: dict[Any, float] = {n: 0.001 + b / (0.8 * rate) for n, b in cache.items()}
    work = 2 * rates.CHUNK * (4 * 64 * 64 + 3 * 64 * 4 + 3 * 64 + 64 * 64)
    seconds |= {"read": 0.01, "product": 0.005, "prompt": 1.1 * work / (rates.PRODUCT / 0.005)}
    monkeypatch.setattr(rates, "measure", lambda *_: seconds | change)
    (claim,) = rates.CLAIMS
    found = claim.run(measured.Bench(quick=True))
    assert found.verdict == verdict, found
    if not change:
        assert "80% of a streaming read" in found.ours
        assert "r2 1.000" in found.ours


def test_the_published_page_lists_every_claim_and_slip() -> None:
    text = (Path(__file__).parents[2] / "docs" / "claims.md").read_text(encoding="utf-8")
    for claim in ALL:
        assert f"| {claim.claim} |" in text, claim.name
    for slip in slips():
        assert slip["right"] in text
