"""What is derived from groups does not pile up when every request makes groups of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quire.spec import CacheGroup, CacheSpec, Field, Full
from quire.store import BlockStore
from quire.store import recent as module
from quire.store.recent import Recent

if TYPE_CHECKING:
    import pytest


def test_the_first_goes_when_there_are_too_many() -> None:
    found: Recent[int, str] = Recent(3)
    for i in range(5):
        found[i] = str(i)
    found[2] = "again"
    assert found.setdefault(9, "nine") == "nine"
    assert found.setdefault(9, "ten") == "nine"
    assert dict(found) == {3: "3", 4: "4", 9: "nine"}


def test_views_of_many_groups_are_forgotten_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recent.__init__, "__defaults__", (16,))
    field = Field("k", (4,), "float32")
    heads = [(0, h) for h in range(60)]
    whole = CacheGroup("a", tuple(heads), (field,), Full(), block_tokens=4)
    store = BlockStore(CacheSpec((whole,)), 1 << 20, device="cpu")
    first = CacheGroup("a/0", tuple(heads[:1]), (field,), Full(), block_tokens=4)
    store.view(first, 0, "k")[3] = 7.0
    for n in range(2, 60):
        part = CacheGroup(f"a/{n}", tuple(heads[:n]), (field,), Full(), block_tokens=4)
        for kind in (store.view, store.rows, store.slots):
            kind(part, 0, "k")
        assert max(map(len, (store._views, store._rows, store._slots))) <= 16
    assert (first, 0, "k") not in store._views
    assert bool((store.view(first, 0, "k")[3] == torch.tensor(7.0)).all())
    assert module.MOST >= 1024
