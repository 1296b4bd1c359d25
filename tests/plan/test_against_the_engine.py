"""The planner reads from a config what the engine finds by running a model; its bytes are those that pools hand out."""

from __future__ import annotations

import pytest

import zoo
from quire.codecs.recipe import available
from quire.errors import ConfigError
from quire.models.attach import connect
from quire.plan.checked import CHECKED
from quire.plan.demand import Demand, Setup
from quire.plan.layout import build_layout
from quire.plan.shape import ModelShape, read_shape
from quire.spec import CacheSpec, KVConfig
from quire.store import BlockStore

RECIPES = (
    "auto",
    *available(),
    "kivi:bits=4,residual=32",
    "k=int8,v=int4",
    "int8;skip_layers=-1",
    "int4;sinks=4;window=40",
    "cq:form=8c10b;window=40",
    "k=kvquant:bits=3,tile=16,v=kvquant:sink=4",
)
FEW = ("auto", "int4", "kivi:bits=2")
WIDE = ("llama", "gemma3", "llama4", "deepseek_v3", "gemma4", "falcon_new", "qwen3_next", "mamba2")
"""Families that differ in what they keep get every recipe; the others a few."""


def the_engines(name: str) -> tuple[ModelShape, CacheSpec]:
    """The config as read, and the spec of a model made from it."""
    model = zoo.build(name)
    shape = read_shape(model.config.to_dict(), name, dtype="float32")
    bridge = connect(model, KVConfig(), memory="32MiB", way=zoo.ZOO[name].way, self_test=False)
    try:
        return shape, bridge.layout.spec
    finally:
        bridge.close()


def peak_bytes(spec: CacheSpec, n_tokens: int) -> int:
    """What one sequence really holds at most, decoding up to `n_tokens`."""
    table = BlockStore(spec, 1 << 30).open()
    table.append(n_tokens - 40)
    table.commit()
    peak = 0
    while table.length < n_tokens:
        table.append(1)
        peak = max(peak, table.held_bytes())
        table.commit()
    return peak


def never_at_once(spec: CacheSpec) -> int:
    """Bodies of spans shorter than a block: sealed for a moment when others hold less. Real windows are longer."""
    short = [g for g in spec if g.raw is not None and max(g.span.reach(401)) < g.block_tokens]
    return sum(g.block_bytes for g in short)


@pytest.mark.parametrize("name", zoo.names())
def test_config_and_model_agree_to_the_byte(name: str) -> None:
    shape, spec = the_engines(name)
    mine = build_layout(shape.layers, KVConfig(), dtype="float32", shared=shape.shared)
    assert mine.spec == spec
    served = 0
    for kv in RECIPES if name in WIDE else FEW:
        try:
            demand = Demand(Setup(shape, KVConfig(kv), given_weight_bytes=0))
        except ConfigError:
            continue
        served += 1
        planned, held = demand.sequence_bytes(401), peak_bytes(demand.spec, 401)
        assert held <= planned <= 1.01 * held + never_at_once(demand.spec), (kv, planned, held)
    state_only = all(g.recurrent for g in spec)
    assert served >= (1 if state_only else 2)


def test_a_run_through_the_model_holds_what_was_planned() -> None:
    """Not only the pools' own count: tokens computed by the model, blocks encoded by its codec."""
    from quire.engine.runner import Item
    from quire.models.open import open_runner

    for name, kv in (("gemma3", "int4"), ("qwen3_next", "auto")):
        model = zoo.build(name)
        demand = Demand(
            Setup(read_shape(model.config.to_dict(), name, dtype="float32"), KVConfig(kv))
        )
        runner = open_runner(model, kv=kv, memory="64MiB")
        table, peak = runner.open(), 0
        ids = [(7 * i + 3) % zoo.VOCAB for i in range(66)]
        for i in range(66):
            table.append(1)
            peak = max(peak, runner.usage().held_bytes)
            runner.forward([Item(table, ids, i, i + 1, 0)])
            table.commit()
        assert peak <= demand.sequence_bytes(66) <= 1.01 * peak, name
        table.release()
        runner.close()


@pytest.mark.slow
def test_every_class_of_the_sweep_is_read_as_it_runs() -> None:
    """All causal classes that a tiny model can be made of; the exceptions are refused by name or by the engine."""
    import torch

    import zoo_sweep
    from quire.models.probe import probe

    apart = {
        "deepseek_v4": "compressed attention",
        "inkling_text": "its state",
        "zaya": "its state",
        "mimo_v2_flash": "KV heads of window layers",
        "recurrent_gemma": "states outside the cache",
    }
    indexed = {"axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"}
    read = 0
    for kind in zoo_sweep.all_causal_types():
        try:
            model = zoo_sweep.build_any(kind).to(torch.bfloat16)
            found = probe(model)
        except Exception:  # noqa: BLE001 - classes that cannot be built or cached are the sweep's affair
            continue
        if kind in apart or kind in indexed:
            continue
        shape = read_shape(model.config.to_dict(), kind, dtype="bfloat16")
        by_layer = sorted(shape.layers, key=repr)
        assert by_layer == sorted(found.layers, key=repr), kind
        assert shape.shared == found.shared, kind
        assert shape.kind in CHECKED, kind
        read += 1
    assert read >= 150
