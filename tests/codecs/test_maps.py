"""Bit maps: each layer, head and tensor in its own recipe, read as that recipe reads, in the bytes planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from quire.codecs import parse_recipe
from quire.engine import Engine
from quire.engine.params import SamplingParams
from quire.engine.runner import Item
from quire.errors import ConfigError
from quire.evaluate.decode import twin
from quire.models.load import weights_digest
from quire.models.open import open_runner
from quire.plan.layout import KVLayer, build_layout
from quire.spec import Field, KVConfig, Residual

HEAD = "[map]\nlayers = 3\nheads = 2\n"
FIELDS = tuple(Field(n, (16,), "float32") for n in ("k", "v"))
LAYERS = [KVLayer(i, 2, FIELDS) for i in range(3)]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def made(text: str) -> str:
        file = tmp_path / "bits.toml"
        file.write_text(text)
        return f"map:{file}"

    return made


def spec_of(kv: str) -> Any:
    return build_layout(LAYERS, KVConfig(kv, block_tokens=16), dtype="float32").spec


def test_a_map_of_one_recipe_is_that_recipe(write: Any) -> None:
    for kv in (
        "auto",
        "int8",
        "k=int8,v=int4",
        "kivi:bits=2,residual=32,group=16",
        "int4;sinks=4;window=32",
    ):
        assert spec_of(write(f'{HEAD}kv = "{kv}"\n')) == spec_of(kv)


def test_layers_that_stay_plain_are_skip_layers(write: Any) -> None:
    kv = write(HEAD + 'kv = "int4"\n[[map.parts]]\nlayers = [0, 2]\nkv = "auto"\n')
    assert spec_of(kv) == spec_of("int4;skip_layers=0,2")


def test_heads_and_tensors_each_in_their_own(write: Any) -> None:
    kv = write(
        HEAD + 'kv = "int8"\n'
        '[[map.parts]]\nlayers = [0, 1]\nkv = "k=int8,v=int4;window=32"\n'
        '[[map.parts]]\nlayers = [1]\nheads = [1]\nkv = "auto"\n'
    )
    assert {c.name for c in parse_recipe(kv).loaded()} == {"int8", "int4"}
    spec = spec_of(kv)
    forms = {g.coords: g.codec for g in spec if not g.name.endswith(".raw")}
    assert {c: f for cs, f in forms.items() for c in cs} == {
        (0, 0): "k=int8,v=int4",
        (0, 1): "k=int8,v=int4",
        (1, 0): "k=int8,v=int4",
        (1, 1): "fp32",
        (2, 0): "int8",
        (2, 1): "int8",
    }
    windows = {g.coords: g.span.residual_tokens for g in spec if isinstance(g.span, Residual)}
    assert windows == {((0, 0), (0, 1), (1, 0)): 32, ((2, 0), (2, 1)): 0}
    tile = {
        n: next(g for g in spec_of(n) if g.raw is not None).tile_bytes
        for n in ("int8", "k=int8,v=int4")
    }
    plain = 2 * 16 * 4
    want = (2 * tile["int8"] + 3 * tile["k=int8,v=int4"]) / 16 + plain
    assert spec.bytes_per_token == want


@pytest.mark.parametrize("attention", ["torch", "reference", "auto"])
def test_every_head_reads_what_its_own_recipe_reads(write: Any, attention: str) -> None:
    """In the first layer, whose keys depend on nothing before it; then the whole in two chunkings, as law 4 says."""
    model = zoo.build("llama")
    shape = model.config
    n, heads = shape.num_hidden_layers, shape.num_key_value_heads
    kv = write(
        f'[map]\nlayers = {n}\nheads = {heads}\nkv = "int8"\ndigest = "{weights_digest(model)}"\n'
        '[[map.parts]]\nlayers = [0]\nheads = [1]\nkv = "k=int4,v=int8"\n'
        '[[map.parts]]\nlayers = [1]\nheads = [0]\nkv = "auto"\n'
    )
    tokens = torch.randint(1, zoo.VOCAB, (83,), generator=torch.Generator().manual_seed(3)).tolist()
    seen, logits = {}, {}
    for name, recipe, ends in (
        ("map", kv, [83]),
        ("chunks", kv, [7, 40, 41, 82, 83]),
        ("int8", "int8", [83]),
        ("mixed", "k=int4,v=int8", [83]),
    ):
        runner = open_runner(
            twin(model),
            kv=recipe,
            memory=1 << 24,
            block_tokens=16,
            attention=attention,
            weights="plain",
        )
        table = runner.open()
        try:
            start = 0
            for stop in ends:
                table.append(stop - start)
                out = runner.forward([Item(table, tokens, start, stop, 1)])
                table.commit()
                start = stop
            logits[name] = out[-1]
            table.append(1)
            seen[name] = {
                f: runner.bridge.read_prefix(table, 83, 0, f).clone()  # type: ignore[union-attr]
                for f in ("k", "v")
            }
        finally:
            table.release()
            runner.bridge.close()  # type: ignore[union-attr]
    for field in ("k", "v"):
        assert torch.equal(seen["map"][field][0], seen["int8"][field][0])
        assert torch.equal(seen["map"][field][1], seen["mixed"][field][1])
    assert not torch.equal(seen["int8"]["k"][1], seen["mixed"]["k"][1])
    # the kernels round single queries to integers over quantised blocks, as they do under one recipe
    near = 1e-2 if attention == "auto" else 2e-4
    torch.testing.assert_close(logits["map"], logits["chunks"], atol=near, rtol=1e-3)


def test_bytes_held_are_the_bytes_planned(write: Any) -> None:
    model = zoo.build("llama")
    n, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    kv = write(
        f'[map]\nlayers = {n}\nheads = {heads}\nkv = "int4;window=32"\n'
        '[[map.parts]]\nlayers = [1]\nheads = [1]\nkv = "k=int8,v=auto"\n'
    )
    runner = open_runner(twin(model), kv=kv, memory=1 << 24, block_tokens=16, weights="plain")
    spec = runner.bridge.layout.spec  # type: ignore[union-attr]
    table = runner.open()
    try:
        for length in (1, 16, 33, 160):
            table.append(length - table.length)
            runner.forward([Item(table, [1] * length, table.committed, length, 1)])
            table.commit()
            assert table.held_bytes() <= spec.bytes_for(length)
        most = max(g.block_bytes for g in spec)
        assert table.held_bytes() >= spec.bytes_for(160) - most * len(spec.groups)
    finally:
        table.release()
        runner.bridge.close()  # type: ignore[union-attr]


def test_another_model_is_refused(write: Any) -> None:
    model = zoo.build("llama")
    n, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    shape = f'[map]\nlayers = {n}\nheads = {heads}\nkv = "int8"\n'
    other = write(shape + 'digest = "00ff"\n')
    with pytest.raises(ConfigError, match="was measured on other weights"):
        open_runner(twin(model), kv=other, memory=1 << 24)
    with pytest.raises(
        ConfigError, match="a map of 7 layers of 2 KV heads, and this model has 3 of 2"
    ):
        spec_of(write('[map]\nlayers = 7\nheads = 2\nkv = "int8"\n'))


PART = HEAD + 'kv = "int8"\n[[map.parts]]\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kv = 1\n", "has no [map] table"),
        ("[map\n", "not TOML"),
        ('[map]\nkv = "int8"\n', "must say layers = how many the model has"),
        (HEAD, 'must say kv = a recipe, as kv = "int4"'),
        (HEAD + 'kv = "int5"\n', "unknown codec 'int5'"),
        (HEAD + 'kv = "int4;skip_layers=1"\n', "leave it out"),
        (HEAD + 'kv = "auto;window=4"\n', "none does here"),
        (HEAD + 'kv = "map:other"\n', "must say kv = a recipe"),
        (HEAD + 'kv = "int8"\nbits = 4\n', "unknown key 'bits'"),
        (PART + 'layers = [3]\nkv = "int4"\n', "part 1: layers is a list of numbers within 0..2"),
        (PART + 'layers = [0]\nheads = [2]\nkv = "int4"\n', "a list of numbers within 0..1"),
        (PART + 'layers = []\nkv = "int4"\n', "not []"),
    ],
)
def test_what_is_no_map_is_one_clear_line(write: Any, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_recipe(write(text))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_file_and_options_outside(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        parse_recipe(f"map:{tmp_path}/nowhere.toml")
    with pytest.raises(ConfigError, match="options stand in its own recipes"):
        parse_recipe("map:a.toml;sinks=4")


@pytest.mark.parametrize(
    ("keep", "share"),
    [
        ("full", "prefix"),
        ("sinks:4+window:48", "off"),
        ("ada(snapkv:budget=0.4)", "off"),
        ("quest:budget=64", "off"),
    ],
)
def test_heads_in_different_forms_under_policies_and_shared_prefixes(
    write: Any, keep: str, share: str
) -> None:
    """Every other policy was tried as well; these are one of each kind that splits, scores or reads by head."""
    model = zoo.build("llama")
    kv = write(
        f"[map]\nlayers = {model.config.num_hidden_layers}\nheads = {model.config.num_key_value_heads}\n"
        'kv = "int8"\n[[map.parts]]\nlayers = [0]\nheads = [1]\nkv = "k=int4,v=int8;sinks=4"\n'
        '[[map.parts]]\nlayers = [1]\nheads = [0]\nkv = "auto"\n'
    )
    prompt = torch.randint(
        1, zoo.VOCAB, (150,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    runner = open_runner(
        twin(model),
        kv=kv,
        keep=keep,
        share=share,
        memory=64 << 20,
        block_tokens=16,
        weights="plain",
    )
    try:
        engine = Engine(runner, None, eos_token_ids=())
        said, cached = [], []
        for batch in ([prompt], [prompt, prompt[:80]]):
            first, *_ = [engine.add_request(p, SamplingParams(max_tokens=12)) for p in batch]
            while engine.has_work:
                for delta in engine.step():
                    assert delta.error is None, delta.error
                    if delta.output is not None and delta.request_id == first:
                        said.append(delta.output.token_ids)
                        cached.append(delta.output.figures.cached_tokens)
        assert said[0] == said[1], "alone and in a batch, computed and found"
        assert cached == ([0, 144] if share == "prefix" else [0, 0])
    finally:
        runner.close()


def test_the_planner_reads_a_map(write: Any) -> None:
    from quire.plan.demand import Demand, Setup
    from quire.plan.shape import read_shape

    config = {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 99, "intermediate_size": 64, "dtype": "bfloat16",
    }  # fmt: skip
    shape = read_shape(config, "tiny", dtype=None)

    def planned(kv: str) -> float:
        return Demand(Setup(shape, KVConfig(kv))).bytes_per_token

    part = '[[map.parts]]\nlayers = [1]\nheads = [0]\nkv = "int4"\n'
    mixed = planned(write(f'{HEAD}kv = "int8"\n{part}'))
    assert mixed == pytest.approx((5 * planned("int8") + planned("int4")) / 6)
