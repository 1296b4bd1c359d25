"""The well-known tables to the digit, what vLLM prints for well-known models, and laws of the planner's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ConfigError
from quire.plan.answer import answer
from quire.plan.catalogue import device_names, find_device, known_model, parse_bytes
from quire.plan.demand import Demand, Setup
from quire.plan.fit import MEASURED_KL, ROUNDED_KL, remedies
from quire.plan.lengths import mix, read_lengths, read_requests
from quire.plan.shape import read_shape
from quire.plan.speed import Speed
from quire.plan.weights import Parameters, count_parameters, form_of, weight_bytes
from quire.spec import KVConfig

MIB, GIB = 1 << 20, 1 << 30


def setup(name: str, kv: str = "auto", **more: Any) -> Setup:
    row = known_model(name)
    assert row is not None, name
    shape = read_shape(row["config"], name)
    published = row.get("parameters")
    counted = Parameters(*published, 0, "published") if published else count_parameters(shape)
    device = more.pop("device", None)
    return Setup(
        shape,
        KVConfig(kv),
        counted,
        more.pop("weight_form", form_of(shape)),
        device=find_device(device) if device else None,
        **more,
    )


def demand(name: str, kv: str = "auto", **more: Any) -> Demand:
    return Demand(setup(name, kv, **more))


# -- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mib_per_token", "gib_at_4096"),
    [
        ("llama-2-7b", 0.5, 2.0),
        ("llama-2-13b", 0.78125, 3.125),
        ("llama-2-70b", 0.3125, 1.25),
        ("mistral-7b-v0.2", 0.125, 0.5),
        ("gpt-3-175b", 4.5, 18.0),
    ],
)
def test_the_well_known_table(name: str, mib_per_token: float, gib_at_4096: float) -> None:
    d = demand(name)
    assert d.bytes_per_token == mib_per_token * MIB
    assert d.sequence_bytes(4096) == gib_at_4096 * GIB


@pytest.mark.parametrize(
    ("tokens", "gib"), [(4096, 1.25), (32_768, 10), (131_072, 40), (1_000_000, 305.17578125)]
)
@pytest.mark.parametrize("batch", [1, 32])
def test_a_70b_model_by_context(tokens: int, gib: float, batch: int) -> None:
    assert batch * demand("llama-2-70b").sequence_bytes(tokens) == batch * gib * GIB


def test_mistrals_window_bounds_its_cache() -> None:
    d = demand("mistral-7b-v0.1")
    assert d.setup.shape.layers[0].span.tokens == 4096  # type: ignore[union-attr]
    one_more = 32 * 32 * 8 * 128 * 4  # a window that lies across one block more
    assert d.sequence_bytes(4096) == 0.5 * GIB
    assert d.sequence_bytes(1_000_000) == 0.5 * GIB + one_more


def test_what_vllm_prints_for_llama_3_8b_on_an_a100_40() -> None:
    """vllm issue 12330: 5,691 blocks of 16 tokens in 11.12 GiB, weights 14.9595 GiB."""
    d = Demand(replace(setup("llama-3-8b"), config=KVConfig(block_tokens=16)))
    (group,) = d.spec.groups
    assert group.block_bytes == 2 * MIB
    assert 0 <= 11.12 * GIB - 5691 * group.block_bytes < 0.006 * GIB  # printed to two places
    assert d.weight_bytes / GIB == pytest.approx(14.9595, rel=2e-4)


def test_what_vllm_and_sglang_print_for_qwen3_235b_on_four_h100() -> None:
    """vllm issue 21348: 178,880 tokens in 8.11 GiB per rank; SGLang 367,404 tokens in 8.23 GiB each of K and V."""
    d = demand("qwen3-235b-a22b", ranks=4)
    token = d.sequence_bytes(32) / 32
    assert token == 94 * 1 * 128 * 2 * 2
    assert 8.11 * GIB / token == pytest.approx(178_880, rel=0.015)
    assert 367_404 * token / 2 / GIB == pytest.approx(8.23, abs=0.005)


def test_what_the_paging_paper_prints_for_opt_13b() -> None:
    """arXiv 2309.06180, section 3: 800 KB a token, 1.6 GB for 2,048 tokens (KiB and GiB)."""
    assert demand("opt-13b").bytes_per_token == 800 * 1024
    assert demand("opt-13b").sequence_bytes(2048) == 1.5625 * GIB


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.738),
        ("llama-2-70b", 68.977),
        ("llama-3.1-405b", 405.85),
        ("mixtral-8x7b-v0.1", 46.703),
        ("gpt2", 0.1244),
        ("gpt-oss-120b", 116.8),
        ("gemma-2-9b", 9.24),
        ("falcon-180b", 178.6),
    ],
)
def test_parameters_counted_from_the_config(name: str, billions: float) -> None:
    row = known_model(name)
    assert row is not None
    counted = count_parameters(read_shape(row["config"], name))
    assert counted.total / 1e9 == pytest.approx(billions, rel=0.002)
    assert counted.active <= counted.total


def test_weights_in_every_form() -> None:
    p = Parameters(1000, 1000, 200, "")
    assert weight_bytes(p, "bfloat16") == 2000
    assert weight_bytes(p, "int4") == (800 * 4.25 + 200 * 16) / 8
    with pytest.raises(ConfigError, match=r"unknown form of weights 'int3'; known: .*int4"):
        weight_bytes(p, "int3")


# -- tensor parallel ---------------------------------------------------------------------------------------------


def test_ranks_share_heads_and_then_copy_them() -> None:
    each = [demand("llama-2-70b", ranks=r).sequence_bytes(4096) for r in (1, 2, 4, 8, 16)]
    assert each == [1.25 * GIB / n for n in (1, 2, 4, 8, 8)]
    latent = [demand("deepseek-v3", ranks=r).sequence_bytes(4096) for r in (1, 8)]
    assert latent[0] == latent[1]
    warned = answer(setup("llama-2-70b", ranks=16), context=4096)["warnings"]
    assert any("16 ranks share 8 KV heads" in w for w in warned)


# -- laws --------------------------------------------------------------------------------------------------------

NAMES = [
    "llama-3.1-8b",
    "gemma-3-4b-it",
    "mistral-7b-v0.1",
    "qwen3-next-80b-a3b",
    "deepseek-v2-lite",
]
names = st.sampled_from(NAMES)
recipes = st.sampled_from(["auto", "int8", "int4", "int8;window=100", "int4;sinks=5"])


@given(names, recipes, st.integers(1, 200_000), st.integers(1, 5_000))
def test_longer_is_never_smaller(name: str, kv: str, tokens: int, more: int) -> None:
    d = demand(name, kv)
    assert d.sequence_bytes(tokens) <= d.sequence_bytes(tokens + more)


@given(names, st.integers(1, 200_000))
def test_more_bits_are_never_smaller(name: str, tokens: int) -> None:
    each = [demand(name, kv).bytes_per_token for kv in ("int4", "int8", "auto", "fp32")]
    assert each == sorted(each)
    long = tokens + 100_000
    whole = [demand(name, kv).sequence_bytes(long) for kv in ("int4", "int8", "fp32")]
    assert whole == sorted(whole) or name == "mistral-7b-v0.1"


@given(names, recipes, st.integers(1, 100_000), st.integers(12, 160), st.sampled_from([1, 2, 8]))
def test_most_users_fit_and_one_more_never_does(
    name: str, kv: str, tokens: int, gib: int, ranks: int
) -> None:
    d = demand(name, kv, device=f"{gib}GiB", ranks=ranks)
    most = d.max_users(tokens)
    assert d.fits(most, tokens) or (most == 0 and d.rank_kv_bytes < d.slack_bytes)
    assert not d.fits(most + 1, tokens)
    document = answer(d.setup, context=tokens, users=most + 1)
    assert document["fits"] is False
    assert document["kv_bytes"] == (most + 1) * document["kv_bytes_per_user"]


@given(names, recipes, st.integers(1, 64), st.integers(12, 160))
def test_the_longest_context_fits_and_one_more_token_never_does(
    name: str, kv: str, users: int, gib: int
) -> None:
    d = demand(name, kv, device=f"{gib}GiB")
    longest = d.max_context(users)
    if longest is None:
        assert d.fits(users, 1 << 31)
        return
    assert longest == 0 or d.fits(users, longest)
    assert not d.fits(users, longest + 1)


@given(st.integers(1, 200), st.lists(st.integers(1, 9000), min_size=1, max_size=40))
def test_the_hundredth_grows_with_every_user(users: int, lengths: list[int]) -> None:
    found = mix(demand("llama-3.1-8b"), lengths)
    assert found.p99_bytes(users) < found.p99_bytes(users + 1)
    assert found.p99_bytes(users) >= users * found.mean_bytes * (1 - 1e-9)
    room = int(found.p99_bytes(users))
    assert found.p99_bytes(found.max_users(room) + 1) > room


# -- floors ------------------------------------------------------------------------------------------------------


def test_floors_by_hand() -> None:
    """Llama-2 7B on an A100: 13.5 GB of weights and 2 GiB of cache at 2,039 GB/s; 2 x 6.74 G operations a token."""
    speed = Speed(demand("llama-2-7b", device="a100-80"))
    one = speed.decode(1, 4096)
    weights, cache = 2 * 6.738e9, 2 * GIB
    assert one.read_s == pytest.approx((weights + cache) / 2039e9, rel=1e-3)
    attention = 4 * 4096 * 32 * 128 * 32
    assert one.compute_s == pytest.approx((2 * 6.738e9 + attention) / 312e12, rel=1e-3)
    assert one.bound == "bandwidth"
    assert one.seconds == one.read_s > one.compute_s
    assert one.link_s == 0
    two = Speed(demand("llama-2-7b", device="a100-80", ranks=2)).decode(1, 4096)
    assert two.link_s == pytest.approx(2 * 32 * 4096 * 2 * 2 / 2 / 300e9)
    assert two.seconds == two.read_s + two.link_s
    assert one.tokens_per_s == pytest.approx(130.5, rel=0.01)
    assert speed.prefill_s(4096) == pytest.approx(
        4096 * (2 * 6.738e9 + attention / 2) / 312e12, rel=1e-3
    )


def test_decode_becomes_compute_bound_at_that_batch_and_not_before() -> None:
    speed = Speed(demand("llama-3.1-8b", device="h100"))
    batch = speed.compute_bound_batch(128)
    assert batch is not None
    assert speed.decode(batch, 128).bound == "compute"
    assert speed.decode(batch - 1, 128).bound == "bandwidth"
    assert speed.compute_bound_batch(32_768) is None


def test_a_mixture_reads_more_experts_the_larger_the_batch() -> None:
    speed = Speed(demand("mixtral-8x7b-v0.1", device="h100", ranks=2))
    one = speed.decode(1, 1).read_s * 3350e9 * 2
    many = speed.decode(512, 1).read_s * 3350e9 * 2
    assert one == pytest.approx(2 * 12.88e9, rel=0.01)
    assert many > 2 * 46.7e9


# -- help --------------------------------------------------------------------------------------------------------


def test_remedies_come_cheapest_loss_first_and_are_true() -> None:
    d = demand("llama-3-70b", device="h100", ranks=4)
    context, users = 8192, 64
    assert d.max_users(context) < users
    found = remedies(d, users, context)
    known = [r.kl for r in found if r.kl is not None]
    assert known == sorted(known)
    assert found[0].change == "--tp 8"
    assert {r.change.removeprefix("--kv ") for r in found if r.change.startswith("--kv")} == set(
        MEASURED_KL
    )
    for r in found:
        assert r.fits == (r.max_users >= users)
        if r.change.startswith("--kv "):
            other = demand("llama-3-70b", r.change[5:], device="h100", ranks=4)
            assert other.max_users(context) == r.max_users
    assert all(
        "kivi" not in r.change
        for r in remedies(demand("deepseek-v2-lite", device="48GiB"), 9999, 4096)
    )


def test_losses_are_those_of_the_ledger() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text(encoding="utf-8")
    entries = [" ".join(e.split()) for e in page.split("\n### ")]
    entries = [e for e in entries if " codecs " in e and "wikitext2-valid.txt --length 1024" in e]
    assert len(entries) == 2
    for kl in MEASURED_KL.values():
        assert any(f" {kl:.5f}".rstrip("0") in e for e in entries), kl
    (rounded,) = [
        " ".join(e.split()) for e in page.split("\n### ") if "benchmarks/rounding.py" in e
    ]
    for form, kl in ROUNDED_KL.items():
        assert f"{form} {kl:g}" in rounded


# -- files and names ---------------------------------------------------------------------------------------------


def test_lengths_of_real_requests(shared: Path) -> None:
    lengths = read_lengths(shared / "data" / "traces" / "sharegpt8k-lengths.csv")
    assert len(lengths) == 30_731
    found = answer(setup("llama-3.1-8b", device="h100"), context=8192, users=32, lengths=lengths)
    mean = sum(lengths) / len(lengths)
    assert found["lengths"]["mean_tokens"] == mean
    assert found["lengths"]["expected_bytes"] == pytest.approx(32 * (mean + 16) * 131_072, rel=0.01)
    assert found["lengths"]["expected_bytes"] < found["lengths"]["p99_bytes"] < found["kv_bytes"]
    assert found["max_users"] < found["lengths"]["max_users_p99"]
    assert found["lengths"]["max_users_p99"] < found["lengths"]["max_users_expected"]


@pytest.mark.parametrize(
    ("text", "requests"),
    [
        ("5\n7\n", [(5,), (7,)]),
        ("5,1\n7,2\n", [(5, 1), (7, 2)]),
        ("\ufefftokens\n5\n7\n", [(5,), (7,)]),
        ("prompt_tokens,output_tokens\n5,1\n7,2\n", [(5, 1), (7, 2)]),
        ("output_tokens,prompt_tokens\n1,5\n0,0\n2,7\n", [(5, 1), (7, 2)]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,4808,10\n", [(4808, 10)]),
    ],
)
def test_lengths_in_their_usual_forms(tmp_path: Path, text: str, requests: Any) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text(text, encoding="utf-8")
    assert read_requests(file) == requests
    assert read_lengths(file) == [sum(parts) for parts in requests]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "not clear from a, b"),
        ("tokens\nmany\n", "line 2 holds no counts"),
        ("tokens\n3\nnan\n", "line 3 holds no counts"),
        ("3\ninf\n", "line 2 holds no counts"),
        ("1,2,3\n", "not clear from column 1, column 2, column 3"),
        ("tokens\n0\n", "no request in it"),
        ("prompt,output\n5\n", "line 2"),
    ],
)
def test_lengths_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_lengths(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_lengths(tmp_path / "none.csv")


def test_devices_by_name_or_by_bytes() -> None:
    assert find_device("A100 80GB") == find_device("a100-80") != find_device("a100-40")
    assert find_device("8GiB").memory_bytes == 8 * GIB
    assert parse_bytes("500MB") == 500_000_000
    for bad in ("abacus", "-3GiB", "0", "8 elephants"):
        with pytest.raises(ConfigError, match=r"known: .*h100"):
            find_device(bad)
    for name in device_names():
        d = find_device(name)
        assert d.source
        assert d.memory_bytes > 8 * GIB
        assert d.bandwidth_bytes_s is not None
        assert 1e11 < d.bandwidth_bytes_s < 1e13
        assert d.bf16_flops is not None
        assert 1e13 < d.bf16_flops < 1e16


def test_the_document_is_json_and_has_the_keys_of_the_contract() -> None:
    keys = "model kv context users device bytes_per_token bytes_per_sequence kv_bytes weight_bytes device_bytes fits "
    keys += "max_users max_context"
    for device in (None, "8GiB", "h100"):
        found = answer(setup("llama-3.2-1b", device=device), context=1000, users=2)
        assert set(keys.split()) <= set(found)
        assert json.loads(json.dumps(found)) == found
        assert (found["fits"] is None) == (device is None)
    with pytest.raises(ConfigError, match="--users must be at least 1, not 0"):
        answer(setup("llama-3.2-1b"), context=10, users=0)
    with pytest.raises(ConfigError, match="does not say how many tokens an image takes"):
        answer(setup("llama-3.2-1b"), context=10, images=2)
    assert answer(setup("gpt2"), context=5000)["warnings"] == [
        "5,000 tokens are more than the 1,024 that gpt2 was made for: memory is planned, quality is not"
    ]
