"""`cq` and `kvquant` by hand on small cases, the files of tables, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrations import at_work
from quire.codecs import load_codec
from quire.codecs.calibrated import Calibration, read, read_about
from quire.errors import ConfigError
from quire.plan import KVLayer, build_layout
from quire.plan.layout import check_config
from quire.spec import Field, KVConfig, Site

D, B = 64, 64


def site(name: str, width: int = D, heads: tuple[int, ...] = (0,), block: int = B) -> Site:
    return Site(Field(name, (width,), "float32"), block, 0, heads)


def with_tables(recipe: str, **tables: torch.Tensor) -> Any:
    """Names as `k_centres`; of layer 0."""
    codec: Any = load_codec(recipe)
    return codec.with_tables({f"0.{n.replace('_', '.', 1)}": t for n, t in tables.items()})


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- cq ----------------------------------------------------------------------------------------------------------


def test_a_code_is_the_index_of_the_nearest_centre() -> None:
    """Two channels a code, two bits: four centres for each pair, by hand."""
    centres = torch.tensor(
        [[[[0.0, 0], [1, 0], [0, 1], [1, 1]], [[0.0, 0], [4, 0], [0, 4], [4, 4]]]]
    )
    codec = with_tables("cq:form=2c2b", k_centres=centres)
    x = torch.tensor([[0.9, 0.2, 3.0, 1.0], [0.4, 0.8, 1.9, 2.1]])
    at = site("k", 4, block=2)
    parts = codec.encode(at, x, torch.arange(2))
    assert parts["codes"].tolist() == [[0b01_01], [0b10_10]]
    back = codec.decode(at, parts, torch.arange(2), torch.float32)
    assert back.tolist() == [[1.0, 0.0, 4.0, 0.0], [0.0, 1.0, 0.0, 4.0]]


@pytest.mark.parametrize("recipe", ["cq:form=4c3b", "kvquant:bits=3", "kvquant:outliers=matrix"])
@pytest.mark.parametrize("name", ["k", "v"])
def test_every_head_has_tables_of_its_own(recipe: str, name: str) -> None:
    """Heads side by side in dimension 1, any of the layer's, read as each one alone."""
    codec, heads = at_work(recipe, D), (3, 1)
    x, pos = drawn(1, 5, 2, 3, B, D), torch.arange(B)
    both = codec.encode(site(name, heads=heads), x, pos)
    back = codec.decode(site(name, heads=heads), both, pos, torch.float32)
    for i, head in enumerate(heads):
        alone = site(name, heads=(head,))
        parts = codec.encode(alone, x[:, i], pos)
        assert all(torch.equal(both[p][:, i], parts[p]) for p in parts)
        assert torch.equal(back[:, i], codec.decode(alone, parts, pos, torch.float32))
    swapped = codec.decode(site(name, heads=heads[::-1]), both, pos, torch.float32)
    assert not torch.equal(swapped, back) or name == "v" != recipe[:2] == "kv"


def test_centres_follow_the_weights() -> None:
    """Where the loss feels errors the centres are: half of the tokens weigh a thousand times as much."""
    x = drawn(2, 1, 4096, 2)
    heavy = x[0, :, :1] > 0
    weight = torch.where(heavy, 1000.0, 1.0).expand(1, -1, 2)
    plain, fisher = load_codec("cq:form=2c4b,fisher=false"), load_codec("cq:form=2c4b")
    at = site("v", 2)

    def loss(codec: Any, w: torch.Tensor | None) -> float:
        made = codec.with_tables({"0.v.centres": codec.fit(at, x, w, 0)["centres"]})
        back = made.decode(at, made.encode(at, x[0], None), None, torch.float32)
        return float(((back - x[0]) ** 2 * weight[0]).sum())

    assert loss(fisher, weight) < 0.8 * loss(plain, None)


def test_more_channels_a_code_lose_less_where_channels_speak_of_each_other() -> None:
    base = drawn(3, 1, 8192, 2)
    x = base.repeat_interleave(4, -1) + 0.1 * drawn(4, 1, 8192, 8)
    at, errors = site("k", 8), []
    for form in ("1c1b", "2c2b", "4c4b", "8c8b"):
        codec: Any = load_codec(f"cq:form={form},fisher=false")
        made = codec.with_tables({"0.k.centres": codec.fit(at, x, None, 0)["centres"]})
        assert made.stored(at)[0].shape == (1,)
        back = made.decode(at, made.encode(at, x[0], None), None, torch.float32)
        errors.append(float((back - x[0]).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


# -- kvquant -----------------------------------------------------------------------------------------------------

GRID = torch.tensor([-0.9, -0.3, 0.2, 1.0])


def test_keys_by_channel_with_the_farthest_apart() -> None:
    """Tiles of 16 tokens of 16 channels have room for 16 outliers; all else is the nearest of four levels."""
    mid, reach = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    codec = with_tables(
        "kvquant:bits=2,tile=16,qnorm=false",
        k_grid=GRID,
        k_channels=torch.stack([mid, reach])[None],
    )
    at, x = site("k", 16, block=32), 2 * drawn(5, 32, 16)
    pos = torch.arange(100, 132)
    z = ((x - mid) / reach).numpy()
    want = GRID.numpy()[np.abs(z.clip(-1, 1)[..., None] - GRID.numpy()).argmin(-1)] * reach.numpy()
    want = want + mid.numpy()
    for tile in (slice(0, 16), slice(16, 32)):
        far = np.argsort(-np.abs(z[tile]).ravel())[:16]
        for i in far:
            want[tile].reshape(-1)[i] = np.float16(x[tile].numpy().ravel()[i])
    parts = codec.encode(at, x, pos)
    assert parts["sparse"].shape == (2, 2, 16)
    back = codec.decode(at, parts, pos, torch.float32)
    np.testing.assert_allclose(back.numpy(), want, rtol=1e-6, atol=1e-6)
    assert np.abs(back.numpy() - x.numpy())[np.abs(z) > 1].max() > 0.1, "some are clipped"


def test_a_first_token_that_is_read_raw_takes_no_outliers_room() -> None:
    tables = {"k_grid": GRID, "k_channels": torch.stack([torch.zeros(16), torch.ones(16)])[None]}
    x = drawn(6, 16, 16)
    x[0] *= 100
    at, errors = site("k", 16, block=16), {}
    for sink in (0, 1):
        codec = with_tables(f"kvquant:bits=2,tile=16,qnorm=false,sink={sink}", **tables)
        for first in (0, 7):
            pos = torch.arange(first, first + 16)
            back = codec.decode(at, codec.encode(at, x, pos), pos, torch.float32)
            errors[sink, first] = float((back - x)[1:].norm())
    assert errors[1, 0] < 0.8 * errors[0, 0]
    assert errors[1, 7] == errors[0, 0] == errors[0, 7]


def test_places_count_beyond_fifteen_bits() -> None:
    """128 tokens of 320 channels: the last place of a tile is 40,959."""
    tables = {"k_grid": GRID, "k_channels": torch.stack([torch.zeros(320), torch.ones(320)])[None]}
    codec = with_tables("kvquant:bits=2,tile=128,qnorm=false", **tables)
    at, x, pos = site("k", 320, block=128), torch.zeros(128, 320), torch.arange(128)
    x[127, 319] = 100.0
    back = codec.decode(at, codec.encode(at, x, pos), pos, torch.float32)
    assert (back == 100).nonzero().tolist() == [[127, 319]]


def test_values_by_token_without_their_farthest() -> None:
    """One value of 64 is kept apart; the range is that of the others; float16 mid and reach."""
    codec = with_tables("kvquant:bits=2,qnorm=false", v_grid=GRID)
    x = drawn(7, B, D)
    x[:, 5] += 40
    parts = codec.encode(site("v"), x, torch.arange(B))
    assert parts["at"].flatten().tolist() == [5] * B
    y = np.delete(x.numpy(), 5, 1)
    low, high = y.min(1), y.max(1)
    np.testing.assert_allclose(parts["mid"].float(), (low + high) / 2, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(parts["reach"].float(), (high - low) / 2, rtol=1e-3)
    back = codec.decode(site("v"), parts, torch.arange(B), torch.float32)
    assert torch.equal(back[:, 5], x[:, 5].half().float())
    z = (y - (low + high)[:, None] / 2) / ((high - low)[:, None] / 2)
    want = GRID.numpy()[np.abs(z[..., None] - GRID.numpy()).argmin(-1)]
    got = (np.delete(back.numpy(), 5, 1) - parts["mid"].float().numpy()[:, None]) / parts[
        "reach"
    ].float().numpy()[:, None]
    assert np.mean(np.abs(got - want) < 1e-3) > 0.99


def test_q_norm_keeps_mean_and_spread() -> None:
    """What four levels read as has the numbers' own mean and deviation, on what they were learned from."""
    x = drawn(8, 1, 4096, D) ** 3
    codec: Any = load_codec("kvquant:bits=2,fisher=false,sparse=0")
    tables = codec.fit(site("k"), x, None, 0)
    mid, reach = tables["channels"][0].float()
    z = ((x[0] - mid) / reach).clamp(-1, 1)
    for part, close in (("moved", True), ("grid", False)):
        levels = tables[part]
        read = levels[torch.bucketize(z, (tables["grid"][1:] + tables["grid"][:-1]) / 2)]
        near = abs(float(read.std() / z.std()) - 1) < 0.01
        assert near is close, part


@pytest.mark.parametrize("outliers", ["vector", "matrix"])
def test_ranges_of_channels_leave_the_outliers_out(outliers: str) -> None:
    """One number of 200 lies far out; one wide channel has no outliers of its own, and most of a matrix's."""
    x = drawn(9, 1, 4000, 16).clamp(-3, 3)
    x[0, ::400] = 50.0
    x[0, 200::400] = -50.0
    x[..., 3] = drawn(10, 1, 4000).clamp(-3, 3) * 10
    codec: Any = load_codec(f"kvquant:outliers={outliers},fisher=false")
    mid, reach = codec.fit(site("k", 16), x, None, 0)["channels"][0].float()
    assert float(reach[:3].max()) < 3.2
    assert (float(reach[3]) < 25) is (outliers == "matrix")
    assert float(mid.abs().max()) < 3


@pytest.mark.parametrize(
    "recipe",
    [
        "cq:form=2c3b",
        "cq:form=4c2b",
        "kvquant:bits=3",
        "kvquant:outliers=matrix",
        "kvquant:sparse=0,keys=token",
    ],
)
def test_a_plan_counts_the_tables(recipe: str) -> None:
    """What `fit` makes, in float32, over layers and heads."""
    codec: Any = load_codec(recipe)
    fields = tuple(Field(n, (D,), "float32") for n in ("k", "v"))
    layout = build_layout(
        [KVLayer(i, 3, fields) for i in range(2)], KVConfig(recipe), dtype="float32"
    )
    x = drawn(11, 3, 512, D)
    made = [
        codec.fit(site(name, heads=(0, 1, 2)), x, x**2 if codec.weighted else None, 0)
        for name in ("k", "v")
    ]
    assert layout.table_bytes == 2 * 4 * sum(t.numel() for m in made for t in m.values())


# -- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A calibration of one layer with two heads of four channels."""
    about = {"codec": "cq:form=2c2b", "model": "a1b2c3d4e5"}
    tables = {f"0.{n}.centres": drawn(0, 2, 2, 4, 2).half() for n in ("k", "v")}
    path = tmp_path / "cq.safetensors"
    Calibration(about, tables).save(path)
    return path


def test_a_calibration_comes_back(file: Path) -> None:
    found = read(file, "codec cq")
    assert found.about["model"] == "a1b2c3d4e5"
    assert found.table_bytes == 2 * 2 * 2 * 4 * 2 * 2
    assert [p.name for p in file.parent.iterdir()] == ["cq.safetensors"]
    codec: Any = load_codec(f"cq:form=2c2b,file={file}")
    codec.check_file()
    bound = codec.bound("a1b2c3d4e5")
    assert bound == codec
    assert set(bound._tables) == {"0.k.centres", "0.v.centres"}


def line(call: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_codec_that_has_not_learned_says_how() -> None:
    says = line(lambda: check_config(KVConfig("k=cq:form=8c8b,v=int4")))
    assert "quire calibrate MODEL --codec cq:form=8c8b --text FILE --out NEW.safetensors" in says
    assert "kv='cq:form=8c8b,file=NEW.safetensors'" in says
    check_config(KVConfig("cq"), runs=False)  # its bytes are known all the same


def test_a_calibration_of_another_model_codec_or_setting_is_refused(file: Path) -> None:
    codec: Any = load_codec(f"cq:form=2c2b,file={file}")
    assert "was calibrated on another model (a1b2c3d4, this one is ffff0000)" in line(
        lambda: codec.bound("ffff0000")
    )
    other = f"cq:form=4c4b,file={file}"
    for call in (
        lambda: check_config(KVConfig(other)),
        lambda: load_codec(other).bound("a1b2c3d4e5"),  # type: ignore[attr-defined]
    ):
        assert "was calibrated for cq:form=2c2b, not for cq:form=4c4b" in line(call)
    says = line(lambda: check_config(KVConfig(f"kvquant:file={file}")))
    assert "was calibrated for cq:form=2c2b, not for kvquant" in says


def test_a_file_that_is_cut_spoilt_or_no_calibration_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for n in (len(whole) - 1, 200, 20):
        file.write_bytes(whole[:n])
        assert "is cut short" in line(lambda: read_about(file, "codec cq"))
    for data in (
        b"",
        b"{}",
        b"\x00" * 50,
        b"\x05\0\0\0\0\0\0\0hello",
        whole.replace(b"quire-cal", b"quare-cal"),
    ):
        file.write_bytes(data)
        assert "is no calibration that quire calibrate wrote" in line(lambda: read_about(file, "x"))
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    read_about(file, "codec cq")
    assert "is damaged" in line(lambda: read(file, "codec cq"))
    gone = tmp_path / "none.safetensors"
    assert "cannot be read (No such file or directory)" in line(
        lambda: read_about(gone, "codec cq")
    )


def test_a_layer_that_was_not_calibrated_is_refused(file: Path) -> None:
    fields = tuple(Field(n, (4,), "float32") for n in ("k", "v"))
    layers = [KVLayer(i, 2, fields) for i in range(2)]
    kv = f"cq:form=2c2b,file={file}"
    layout = build_layout(layers, KVConfig(kv), dtype="float32")
    says = line(lambda: layout.bound(lambda: "a1b2c3d4e5"))
    assert "knows nothing of k in layer 1" in says
    build_layout(layers, KVConfig(f"{kv};skip_layers=1"), dtype="float32").bound(
        lambda: "a1b2c3d4e5"
    )


def test_blocks_of_other_tables_have_other_names(file: Path) -> None:
    """A group says which tables its bytes were made with, so that neither tiers nor sessions take them for others'."""
    fields = tuple(Field(n, (4,), "float32") for n in ("k", "v"))
    kv = KVConfig(f"cq:form=2c2b,file={file}")

    def said() -> str:
        return build_layout([KVLayer(0, 2, fields)], kv, dtype="float32").spec.groups[0].codec

    first = said()
    assert first == said()
    found = read(file, "codec cq")
    tables: Mapping[str, torch.Tensor] = {n: t + 1 for n, t in found.tables.items()}
    Calibration(found.about, tables).save(file)
    assert said() != first


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cq:form=3c8b", "form=3c8b is not served; it is channels and bits of a code: 2c8b"),
        ("cq:form=8", "form=8 is not served"),
        ("cq:rope=off", "rope=off is not served; known: before, after"),
        ("cq:fisher=1", "fisher=1 is not served; known: true, false"),
        ("kvquant:bits=5", "bits=5 is not served; known: 2, 3, 4"),
        ("kvquant:sparse=0.5", "it is a share from 0 to 0.1, as 0.01"),
        ("kvquant:sink=-1", "it is a number of first tokens, 0 to 64"),
        ("kvquant:outliers=row", "known: vector, matrix"),
        ("kvquant:keys=head", "known: channel, token"),
        ("kvquant:qnorm=yes", "known: true, false, auto"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(text: str, says: str) -> None:
    assert says in line(lambda: load_codec(text))


@pytest.mark.parametrize(
    ("text", "name", "width", "says"),
    [
        ("cq:form=8c8b", "k", 68, "do not divide k's 68; use form=4c8b"),
        ("cq", "latent", 64, "use int8, fp8 or int4"),
        ("kvquant", "k_rope", 64, "use int8, fp8 or int4"),
        ("kvquant:tile=128", "k", 1024, "use a smaller tile"),
    ],
)
def test_what_cannot_be_served_is_refused(text: str, name: str, width: int, says: str) -> None:
    assert says in line(lambda: load_codec(text).stored(site(name, width, block=128)))


def test_too_few_tokens_are_refused() -> None:
    codec: Any = load_codec("cq:form=4c8b")
    says = line(lambda: codec.fit(site("k"), drawn(0, 1, 8191, D), None, 0))
    assert "256 centres want 8,192 tokens to learn from, and there are 8,191" in says
