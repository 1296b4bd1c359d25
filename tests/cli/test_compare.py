"""--compare none: the same tokens, and a time for every step."""

from __future__ import annotations

import re
from pathlib import Path


def test_tokens_are_identical_and_every_step_has_two_times(quire, tiny: Path, greedy) -> None:
    base = ("run", "hello", "--model", tiny, "--max-tokens", 24, "--compare", "none")
    document = quire(*base, "--json").json
    found = document["compare"]
    assert found["identical"] is True
    assert found["same_tokens"] == 24
    assert document["requests"][0]["token_ids"] == greedy("hello", 24)
    assert found["without"]["token_ids"] == greedy("hello", 24)
    steps = found["steps"]
    assert [s["step"] for s in steps] == list(range(1, 25))
    assert [s["context"] for s in steps] == list(range(5, 29))
    assert all(s["with_s"] > 0 and s["without_s"] > 0 for s in steps)
    done = quire(*base)
    assert "identical, all 24" in done.err
    assert done.out == document["requests"][0]["text"] + "\n"
    assert len(re.findall(r"^ *\d+(?:–\d+)? +\d+.* ms .* ms .*×$", done.err, re.MULTILINE)) > 5


def test_sampled_text_is_drawn_alike(quire, tiny: Path) -> None:
    """Without a seed both runs use the one that the first drew."""
    args = ("run", "hello", "--model", tiny, "--max-tokens", 12, "--temperature", 1.5)
    found = quire(*args, "--compare", "none", "--json").json["compare"]
    assert found["identical"] is True


def test_where_they_part_is_said(quire, tiny: Path, monkeypatch) -> None:
    """A cache that lies: its baseline writes something else from the third token on."""
    from quire.models.runner import NoCacheRunner

    honest = NoCacheRunner.forward

    def forward(self, items, adapter=None):
        logits = honest(self, items, adapter)
        if items[0].stop >= 7:
            logits[:, 11] += 1e3
        return logits

    monkeypatch.setattr(NoCacheRunner, "forward", forward)
    base = ("run", "hello", "--model", tiny, "--max-tokens", 8, "--compare", "none")
    found = quire(*base, "--json").json["compare"]
    assert found["identical"] is False
    assert found["same_tokens"] == 2
    assert len(found["steps"]) == 3, "times are compared as far as the texts agree"
    assert re.search(r"the same for 2, then '.+' with the cache and '.+' without", quire(*base).err)
