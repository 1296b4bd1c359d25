"""Bytes: what a codec says, what the spec counts and what the pool hands out are one number, for every shape."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from quire.codecs import available, load_codec
from quire.errors import ConfigError
from quire.plan import KVLayer, build_layout
from quire.spec import CacheSpec, Field, KVConfig, aligned
from quire.store import BlockStore

Formula = Callable[[int, int], list[float]]

LINE = 64
FORMULAS: dict[str, tuple[Formula, Formula]] = {}
"""Recipe to the arrays of a key and of a value tile of B tokens and D channels, in bytes, by hand."""


def both(formula: Formula) -> tuple[Formula, Formula]:
    return formula, formula


for _name, _width in {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}.items():
    FORMULAS[_name] = both(lambda b, d, width=_width: [b * d * width])
FORMULAS["int8"] = both(lambda b, d: [b * d, 2 * b])
FORMULAS["int8:scale=channel"] = both(lambda b, d: [b * d, 2 * d])
FORMULAS["int8:scale=tensor"] = both(lambda b, d: [b * d, 2])
FORMULAS["fp8"] = both(lambda b, d: [b * d])
FORMULAS["fp8:scale=token"] = both(lambda b, d: [b * d, 2 * b])
for _name, _group in {"int4": 0, "int4:group=32": 32, "int4:group=64": 64}.items():
    FORMULAS[_name] = both(lambda b, d, g=_group: [b * d / 2, *[2 * b * d / (g or d)] * 2])
for _bits in (2, 4):
    for _g in (16, 32, 64):
        FORMULAS[f"kivi:bits={_bits},residual=40,group={_g}"] = both(
            lambda b, d, g=_g, bits=_bits: [b * d * bits / 8, *[2 * b * d / g] * 2]
        )
FORMULAS["kvarn"] = (
    lambda b, d: [b * d / 2, *[2 * d * b / 128] * 2, 2 * b],
    lambda b, d: [b * d / 4, *[2 * b] * 2, 2 * d * b / 128],
)
FORMULAS["kvarn:key_bits=2,value_bits=4,tile=32"] = (
    lambda b, d: [b * d / 4, *[2 * d * b / 32] * 2, 2 * b],
    lambda b, d: [b * d / 2, *[2 * b] * 2, 2 * d * b / 32],
)
for _form, _per_channel in {"2c8b": 4, "4c8b": 2, "8c8b": 1, "8c10b": 1.25, "1c2b": 2}.items():
    FORMULAS[f"cq:form={_form}"] = both(
        lambda b, d, bits=_per_channel: [b * math.ceil(d * bits / 8)]
    )
for _bits, _tile in ((4, 64), (3, 16), (2, 128)):
    FORMULAS[f"kvquant:bits={_bits},sink=0,tile={_tile}"] = (
        lambda b, d, bits=_bits, t=_tile: [
            b * d * bits / 8,
            b // t * 4 * 16 * math.ceil(0.01 * t * d / 16),
        ],
        lambda b, d, bits=_bits: [
            b * d * bits / 8,
            *[2 * b] * 2,
            *[b * n * max(1, round(0.01 * d)) for n in (1, 2)],
        ],
    )
FORMULAS["kvquant:sink=0,outliers=matrix,keys=token,sparse=0.02"] = both(
    lambda b, d: [b * d / 2, *[2 * b] * 2, b // 64 * 4 * 16 * math.ceil(0.02 * 64 * d / 16)]
)
FORMULAS["kvquant:sink=0,sparse=0"] = (
    lambda b, d: [b * d / 2],
    lambda b, d: [b * d / 2, *[2 * b] * 2],
)


def spec_of(kv: str, d: int, block: int, heads: int = 2, layers: int = 2) -> CacheSpec:
    fields = (Field("k", (d,), "bfloat16"), Field("v", (d,), "bfloat16"))
    made = [KVLayer(i, heads, fields) for i in range(layers)]
    return build_layout(made, KVConfig(kv, block_tokens=block), dtype="bfloat16").spec


def held_bytes(spec: CacheSpec, n: int) -> int:
    """What a sequence of n tokens, computed in chunks, makes the pools hold."""
    blocks = max(g.block_bytes for g in spec.groups)
    store = BlockStore(
        spec, 2 * sum(spec.bytes_for(n, chunk_tokens=512) for _ in "ab") + 64 * blocks
    )
    table = store.open()
    while table.length < n:
        table.append(min(512, n - table.length))
        table.commit()
    assert table.held_bytes() == store.usage().held_bytes
    return store.usage().held_bytes


def test_every_codec_has_its_formula_here() -> None:
    assert set(available()) <= {name.partition(":")[0] for name in FORMULAS}


@pytest.mark.parametrize("kv", sorted(FORMULAS))
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 128])
def test_measured_is_the_formula_is_the_spec(kv: str, d: int, block: int) -> None:
    if any(kv == name and wrong(d, block) for name, wrong in REFUSED.items()):
        with pytest.raises(ConfigError):
            spec_of(kv, d, block)
        return
    spec = spec_of(kv, d, block)
    body = spec.groups[0]
    size = body.block_tokens
    arrays = [a for formula in FORMULAS[kv] for a in formula(size, d)]
    assert all(float(a).is_integer() for a in arrays)
    tile = sum(math.ceil(a / LINE) * LINE for a in arrays)
    assert body.tile_bytes == tile == sum(aligned(f.bytes_in(size)) for f in body.fields)
    n = 5 * size + 3 + load_codec(kv).residual_tokens
    raw = 0
    if body.raw is not None:
        first = max(0, n // size * size - load_codec(kv).residual_tokens) // size
        raw = (-(-n // size) - first) * size * 2 * d * 2
    sealed = n // size if body.raw is not None else -(-n // size)
    assert held_bytes(spec, n) == 4 * (sealed * tile + raw)


REFUSED: dict[str, Callable[[int, int], bool]] = {
    "int4:group=32": lambda d, b: d % 32 != 0,
    "int4:group=64": lambda d, b: d % 64 != 0,
    **{
        f"kivi:bits={bits},residual=40,group={g}": lambda d, b, g=g: (
            d % g != 0 or (b % g != 0 and b != 32)
        )
        for bits in (2, 4)
        for g in (16, 32, 64)
    },
    "kvarn": lambda d, b: b not in (32, 128),
    "kvquant:bits=4,sink=0,tile=64": lambda d, b: b not in (32, 64, 128),
    "kvquant:bits=2,sink=0,tile=128": lambda d, b: b not in (32, 128),
    "kvquant:sink=0,outliers=matrix,keys=token,sparse=0.02": lambda d, b: b not in (32, 64, 128),
    "kvquant:sink=0,sparse=0": lambda d, b: b not in (32, 64, 128),
    "kvarn:key_bits=2,value_bits=4,tile=32": lambda d, b: b % 32 != 0,
}
"""Shapes (D, B) that a recipe says no to."""


@pytest.mark.parametrize(
    ("kv", "most"),
    [
        ("int8", 0.51),
        ("fp8", 0.51),
        ("int4", 0.27),
        ("int4:group=32", 0.32),
        ("kivi", 0.20),
        ("kivi:bits=4", 0.33),
        ("kvarn", 0.22),
        ("kvarn:key_bits=2", 0.16),
        ("cq:form=2c8b", 0.26),
        ("cq:form=8c8b", 0.07),
        ("kvquant", 0.28),
        ("kvquant:bits=2", 0.16),
    ],
)
def test_share_of_bf16_at_32k_tokens(kv: str, most: float) -> None:
    """H_kv D = 1024, D = 128; scales, alignment, the residual window and the tail included."""
    plain, coded = (held_bytes(spec_of(x, 128, 32, heads=8, layers=1), 32768) for x in ("bf16", kv))
    assert plain == 32768 * 2 * 1024 * 2
    assert most - 0.02 < coded / plain <= most


@pytest.mark.parametrize(
    ("bits", "ours", "paper"), [(4, 4.41, 4.32), (3, 3.41, 3.32), (2, 2.41, 2.32)]
)
@pytest.mark.parametrize(("d", "more"), [(128, 0.0), (64, 0.215)])
def test_kvquant_counts_its_pointers_and_scales(
    bits: int, ours: float, paper: float, d: int, more: float
) -> None:
    """Bits a number at the paper's shapes (32 heads of 128), and what narrower heads pay beside."""
    heads = 4096 // d
    body, _ = spec_of(f"kvquant:bits={bits}", d, 64, heads, 1).groups
    counted = 8 * body.bytes_per_token / (2 * heads * d)
    assert counted == pytest.approx(ours + more, rel=0.01)
    assert counted - paper < 0.1 + more
