"""What the fast paths of a step read and write is what the plain views say."""

from __future__ import annotations

import pytest
import torch

from lossy import Lossy
from quire.attention import Row, Step
from quire.plan import KVLayer, build_layout
from quire.spans import Full, Span, Window
from quire.spec import Field, KVConfig
from quire.store import BlockStore

FIELDS = (Field("k", (8,), "float32"), Field("v", (8,), "float32"))
OTHER = (Field("k", (24,), "float32"), Field("v", (8,), "float32"))
TURNED = FIELDS[::-1]


@pytest.mark.parametrize("fields", [FIELDS, OTHER, TURNED], ids=["alike", "other", "turned"])
@pytest.mark.parametrize("span", [Full(), Window(6)], ids=["full", "window"])
@pytest.mark.parametrize("lossy", [False, True])
def test_both_fields_at_once_are_the_two_fields(
    fields: tuple[Field, ...], span: Span, lossy: bool
) -> None:
    codecs = {"": Lossy(4)} if lossy else None
    layers = [KVLayer(i, 3, fields, span) for i in range(2)]
    layout = build_layout(layers, KVConfig(block_tokens=4), dtype="float32", codecs=codecs)
    store = BlockStore(layout.spec, 1 << 20, device="cpu")
    tables = [store.open() for _ in range(3)]
    for table, n in zip(tables, (9, 10, 13), strict=True):
        table.append(n)
        fill(store, Step(store, layout, [Row(table, 0, n)]), fields)
        table.commit()
    for table in tables:
        table.append(1)
    step = Step(store, layout, [Row(t, t.length - 1, t.length) for t in tables])
    fill(store, step, fields)
    for layer in range(2):
        for read in step.of_layer(layer)[2]:
            both = step.gather_both(layer, read, ("k", "v"), torch.float32)
            for x, name in zip(both, ("k", "v"), strict=True):
                assert torch.equal(x, step.gather(layer, read, name, torch.float32)), name
                valid = (read.kpos >= 0).unsqueeze(1).expand(x.shape[:3])
                assert (x[~valid] == 0).all()
                assert (x[valid] != 0).all()


def fill(store: BlockStore, step: Step, fields: tuple[Field, ...]) -> None:
    """Writes numbers of their own everywhere, and looks at them through the plain view."""
    for layer in range(2):
        values = {f.name: torch.rand(step.n_tokens, 3, *f.shape) + 1 for f in fields}
        step.write(layer, values)
        for w in step.of_layer(layer)[0]:
            for name, x in values.items():
                view = store.view(w.group, layer, name)
                assert torch.equal(view[w.places.at, :, w.places.row], x)


def test_scratch_is_reused_and_can_be_written_in_any_mode() -> None:
    layout = build_layout([KVLayer(0, 1, FIELDS)], KVConfig(block_tokens=4), dtype="float32")
    store = BlockStore(layout.spec, 1 << 20, device="cpu")
    like = torch.zeros(1, 6)
    with torch.inference_mode():
        first = store.scratch(like, 5)
    again = store.scratch(like, 4)
    again.fill_(1.0)
    assert first.shape == (5, 6)
    assert first.data_ptr() == again.data_ptr()
    assert store.scratch(like, 50).shape == (50, 6)
