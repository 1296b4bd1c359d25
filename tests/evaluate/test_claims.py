"""Claims: figures that the issue's arithmetic gives, honest verdicts, and a page that the command makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.errors import CapacityError
from quire.evaluate.claims import Claim, Outcome, arithmetic, later, measured, run_claims
from quire.evaluate.claims.arithmetic import projections
from quire.evaluate.claims.slips import slips

ALL = (*arithmetic.CLAIMS, *measured.CLAIMS, *later.CLAIMS)
LENGTHS = [300, 500, 700, 900, 2400] * 40


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    bench = measured.Bench(quick=True, lengths=LENGTHS)
    return {r["name"]: r for r in run_claims(arithmetic.CLAIMS, bench)}


@pytest.mark.parametrize(
    ("name", "verdict", "figures"),
    [
        ("projections", "arithmetic", ["1,124,750", "2,499"]),
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
    assert len(rows) == len(arithmetic.CLAIMS) == 17


def test_without_lengths_the_claims_about_paging_say_what_they_need() -> None:
    found = run_claims(arithmetic.CLAIMS[-2:], measured.Bench())
    assert [r["verdict"] for r in found] == ["not here"] * 2
    assert all("--lengths" in r["why"] for r in found)


def test_the_count_of_projections_is_a_sum() -> None:
    assert projections(3, 4) == (3 + 4 + 5 + 6, 3 + 3)


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


def test_the_published_page_lists_every_claim_and_slip() -> None:
    text = (Path(__file__).parents[2] / "docs" / "claims.md").read_text(encoding="utf-8")
    for claim in ALL:
        assert f"| {claim.claim} |" in text, claim.name
    for slip in slips():
        assert slip["right"] in text
