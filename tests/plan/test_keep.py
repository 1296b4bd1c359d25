"""What a plan says of a policy is what the engine's pools hand out when tokens go, and before."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import zoo
from quire.engine.runner import Item
from quire.errors import ConfigError
from quire.models.open import open_runner
from quire.models.runner import ModelRunner
from quire.plan.answer import answer
from quire.plan.catalogue import find_device
from quire.plan.demand import Demand, Setup
from quire.plan.kept import Kept, part_sizes
from quire.plan.layout import build_layout
from quire.plan.shape import read_shape
from quire.plan.speed import Speed
from quire.plan.weights import count_parameters
from quire.retention import available, parse_keep
from quire.retention.contract import Wrapper
from quire.retention.recipe import policy_class
from quire.spec import KVConfig
from retention.kept import OWN_TESTS, PLAIN, prompts
from retention.test_duo import mapped
from retention.test_kvzap import fitted

PROMPT, EVERY, BLOCK = 960, 48, 16
PROTECTS = f"sinks=4,window=32,boundary=16,every={EVERY}"
"""As much as the policies do by themselves."""
SHARED = [*(n for n in PLAIN if n != "fastgen"), "kvzip"]
WRAPPED = ("ada(keydiff)", "pyramid(keydiff)", "ada(pyramid(keydiff))", "pyramid(ada(keydiff))")


def with_budget(policy: str, budget: str) -> str:
    inner = policy.rpartition("(")[2].rstrip(")")
    return policy.replace(inner, f"{inner}:budget={budget},{PROTECTS}", 1)


@cache
def model(name: str = "llama") -> Any:
    return zoo.build(name)


def demand(name: str, keep: str, kv: str = "auto") -> Demand:
    shape = read_shape(model(name).config.to_dict(), name, dtype="float32")
    return Demand(Setup(shape, KVConfig(kv, keep, BLOCK), given_weight_bytes=0))


def measured(of: Any, keep: str, n_tokens: int, **options: Any) -> tuple[dict[int, int], int]:
    """Length to bytes of the pool when the next token has its place, and the most that was ever taken meanwhile."""
    runner = open_runner(of, keep=keep, memory="64MiB", block_tokens=BLOCK, **options)
    assert isinstance(runner, ModelRunner)
    store, most, found = runner.bridge.store, 0, {}
    take = type(store.pool_for(store.spec.groups[0])).take

    def noting(pool: Any, *args: Any) -> int:
        nonlocal most
        got = take(pool, *args)
        most = max(most, runner.usage().held_bytes)
        return got

    [prompt] = prompts([n_tokens], zoo.VOCAB)
    table = runner.open(prompt_tokens=PROMPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store.pool_for(store.spec.groups[0])), "take", noting)
        at = 0
        while at < n_tokens:
            stop = runner.cut(table, at, min(n_tokens, PROMPT if at < PROMPT else at + 1))
            table.append(stop - at)
            found[at] = runner.usage().held_bytes
            runner.forward([Item(table, prompt, at, stop, 0)])
            table.commit()
            at = stop
    table.release()
    runner.close()
    return found, most


def check(name: str, policy: str, kv: str = "auto", of: Any = None) -> None:
    """At the prompt's end, at the next time that tokens go, just before that, and on the way."""
    plan = demand(name, policy, kv)
    assert plan.kept is not None
    found, most = measured(of or model(name), policy, PROMPT + EVERY + 2, kv=kv)
    second = PROMPT + EVERY
    for length, want in (
        (PROMPT, plan.kept.held_bytes(PROMPT, PROMPT)),
        (second, plan.kept.held_bytes(second, PROMPT)),
        (second - 1, plan.kept.most_bytes(PROMPT, PROMPT)),
    ):
        slack = 0.01 * want
        if plan.kept.policy.by_head and kv.startswith(
            "kivi"
        ):  # heads keep whole blocks, a few dozen in all
            slack = 0.03 * want
        assert abs(found[length] - want) <= slack, (length, found[length], want)
    assert plan.sequence_bytes(PROMPT) == plan.kept.most_bytes(PROMPT, PROMPT)
    assert most == pytest.approx(plan.peak_bytes(PROMPT), rel=0.01)
    assert plan.sequence_bytes(PROMPT) < 0.75 * demand(name, "full", kv).sequence_bytes(PROMPT)


@pytest.mark.parametrize("policy", [*SHARED, *WRAPPED])
def test_bytes_when_tokens_go(policy: str) -> None:
    check("llama", with_budget(policy, "0.5"))


def test_bytes_when_tokens_go_by_a_fitted_map(tmp_path: Path) -> None:
    of = zoo.build("llama")
    keep = fitted(of, tmp_path).partition(",")[0]
    check("llama", f"{keep},budget=0.5,{PROTECTS}", of=of)


@pytest.mark.parametrize(
    "kv", ["int8", "int4", "kivi:residual=16,group=16", "int4;sinks=4;window=40"]
)
@pytest.mark.parametrize("policy", ["keydiff", "ada(keydiff)", "pyramid(keydiff)"])
def test_bytes_of_codecs(policy: str, kv: str) -> None:
    check("llama", with_budget(policy, "0.5"), kv)


@pytest.mark.parametrize("budget", ["300", "1MiB"])
def test_budgets_in_tokens_and_bytes(budget: str) -> None:
    check("llama", with_budget("keydiff", budget))
    assert demand("llama", with_budget("keydiff", budget)).growing_bytes_per_token == 0


@pytest.mark.parametrize("name", ["gemma3", "deepseek_v3", "jamba", "falcon"])
def test_models_of_other_kinds(name: str) -> None:
    check(name, with_budget("pyramid(keydiff)", "0.3"))


def test_what_nothing_bounds_is_planned_whole() -> None:
    keep = with_budget("fastgen", "0.3")
    plan = demand("llama", keep)
    found, most = measured(model(), keep, PROMPT + 2)
    assert found[PROMPT] <= plan.sequence_bytes(PROMPT + 1)
    assert most <= plan.peak_bytes(PROMPT)
    assert plan.sequence_bytes(PROMPT) == demand("llama", "full").sequence_bytes(PROMPT)
    assert plan.kept_tokens(PROMPT) == PROMPT


def test_room_is_kept_for_copies_that_are_made() -> None:
    """Nothing is copied before a token follows the prompt, nor beside tokens that came after the last time."""
    runner = open_runner(model(), memory="64MiB", block_tokens=BLOCK)
    assert isinstance(runner, ModelRunner)
    try:
        for policy in ("fastgen", "h2o"):
            rules = runner.rules(parse_keep(with_budget(policy, "0.3")))
            kept = PROMPT if policy == "fastgen" else round(0.3 * PROMPT)
            assert rules.most_tokens(PROMPT, PROMPT) == PROMPT
            assert rules.most_tokens(PROMPT + EVERY, PROMPT) == PROMPT + kept
        whole = runner.rules(parse_keep(with_budget("fastgen", "0.3")))
        assert whole.most_tokens(PROMPT + EVERY + 1, PROMPT) == 2 * (PROMPT + EVERY)
    finally:
        runner.close()


@pytest.mark.parametrize("keep", ["window:400", "sinks:4+window:400", "duo"])
@pytest.mark.parametrize("kv", ["auto", "int4"])
def test_spans_hold_what_is_planned(keep: str, kv: str, tmp_path: Path) -> None:
    of = zoo.build("llama")
    if keep == "duo":
        keep = mapped(tmp_path, of).replace("window=12", "window=400")
    plan = demand("llama", keep, kv)
    found, _ = measured(of, keep, PROMPT + 40, kv=kv)
    last = max(found[n] for n in range(PROMPT + 1, PROMPT + 40))
    spare = sum(g.block_bytes for g in plan.spec if g.raw is not None)  # see CacheSpec.blocks_for
    assert last <= plan.sequence_bytes(PROMPT + 40) <= 1.01 * last + spare
    assert plan.sequence_bytes(PROMPT) < 0.8 * demand("llama", "full", kv).sequence_bytes(PROMPT)


def test_a_budget_that_covers_everything_changes_nothing() -> None:
    full, kept = demand("llama", "full"), demand("llama", "h2o:budget=1.0")
    for n in (1, 60, PROMPT):
        assert kept.sequence_bytes(n) == full.sequence_bytes(n)
        assert kept.peak_bytes(n) == full.sequence_bytes(n)


def llama(keep: str, ranks: int = 1) -> Demand:
    from quire.plan.catalogue import known_model

    row = known_model("llama-3.1-8b")
    assert row is not None
    shape = read_shape(dict(row["config"]), "llama-3.1-8b")
    return Demand(
        Setup(
            shape,
            KVConfig(keep=keep),
            count_parameters(shape),
            device=find_device("h100"),
            ranks=ranks,
        )
    )


def test_a_fifth_of_the_tokens_holds_five_times_the_users() -> None:
    full, fifth = llama("full"), llama("h2o:budget=0.2")
    n = 65_536
    each, peak = fifth.sequence_bytes(n), fifth.peak_bytes(n)
    assert each == pytest.approx(0.2 * full.sequence_bytes(n), rel=0.02)
    assert peak == pytest.approx(1.2 * full.sequence_bytes(n), rel=0.01)
    most = fifth.max_users(n)
    assert fifth.fits(most, n)
    assert not fifth.fits(most + 1, n)
    room = fifth.rank_kv_bytes - fifth.slack_bytes
    assert most == (room - (peak - each)) // each, "one user at a time computes a prompt"
    assert most > 3 * full.max_users(n)
    longest = fifth.max_context(4)
    assert longest is not None
    assert fifth.fits(4, longest)
    assert not fifth.fits(4, longest + 1)
    assert full.max_context(4) < longest  # type: ignore[operator]
    assert fifth.growing_bytes_per_token == pytest.approx(0.2 * full.growing_bytes_per_token)


def test_ranks_share_heads_and_budgets() -> None:
    """A budget in bytes is the whole model's, on however many ranks."""
    one, four = llama("h2o:budget=256MiB"), llama("h2o:budget=256MiB", 4)
    assert one.kept is not None
    assert four.kept is not None
    assert one.kept.tokens(60_000) == four.kept.tokens(60_000)
    assert 4 * four.sequence_bytes(60_000) == one.sequence_bytes(60_000)
    half = llama("duo", 4)
    assert 4 * half.sequence_bytes(60_000) == llama("duo").sequence_bytes(60_000)


def test_a_step_reads_and_multiplies_what_is_kept() -> None:
    full, fifth, duo = (Speed(llama(k)) for k in ("full", "h2o:budget=0.2", "duo:retrieval=0.5"))
    n = 65_536
    assert fifth._attention(n, llama("h2o:budget=0.2").kept_tokens(n)) == pytest.approx(
        0.2 * full._attention(n, n), rel=0.01
    )
    assert duo._attention(n, n) == pytest.approx(0.5025 * full._attention(n, n), rel=0.01)
    assert fifth.decode(8, n).read_s < 0.4 * full.decode(8, n).read_s
    assert fifth.prefill_s(n) == full.prefill_s(n)
    assert duo.prefill_s(n) < full.prefill_s(n)


def test_the_document_says_so() -> None:
    found = answer(llama("ada(h2o:budget=0.2)").setup, context=10_000, users=4)
    assert found["kept_tokens"] == 2000
    assert found["kv_bytes_per_user"] < found["kv_peak_bytes_per_user"]
    full = answer(llama("full").setup, context=10_000, users=4)
    assert full["kept_tokens"] is None
    assert full["kv_bytes_per_user"] == full["kv_peak_bytes_per_user"]
    assert any("a map for duo" in x for x in answer(llama("duo").setup, context=10_000)["assumed"])


@pytest.mark.parametrize(
    ("name", "keep", "says"),
    [
        ("deepseek_v3", "ada(h2o)", "one latent for all heads"),
        ("deepseek_v3", "duo", "one latent for all heads"),
        ("mistral", "h2o", "no layer of this model keeps every token"),
        ("mamba2", "window:20", "no layer of this model keeps every token"),
    ],
)
def test_what_the_engine_refuses_is_not_planned(name: str, keep: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as planned:
        demand(name, keep)
    if keep != "duo":
        with pytest.raises(ConfigError) as run:
            open_runner(model(name), keep=keep, memory="8MiB")
        assert str(run.value) == str(planned.value)


def test_every_policy_says_what_it_expects() -> None:
    """As `allocate` would decide where all heads have equal scores, and never more than there is."""
    import torch

    free = {(layer, h): 100 + 10 * h for layer in range(4) for h in range(2)}
    scores = {c: torch.ones(n) for c, n in free.items()}
    wrappers = [n for n in available() if issubclass(policy_class(n), Wrapper)]
    for name in (*PLAIN, *OWN_TESTS, *wrappers):
        if name == "press":
            continue  # which scores by a class of another package, and allocates as all do
        policy = parse_keep(f"{name}(random)" if name in wrappers else name).policy
        found = policy.expect(free, 40, 1000)
        assert set(found) == set(free)
        assert all(0 <= n <= free[c] for c, n in found.items())
        if policy.bounded:
            want = policy.allocate(scores, 40, 1000)
            assert sum(found.values()) == pytest.approx(sum(want.values()), abs=8)
            if not policy.by_head:
                assert found == want


def test_sizes_are_few() -> None:
    counts = {(0, h): 100 + 3 * h for h in range(40)}
    have, sure = dict.fromkeys(counts, 400), dict.fromkeys(counts, 10)
    found = part_sizes(counts, have, sure, 1, 4)
    assert len(set(found.values())) <= 16
    assert all(abs(found[c] - n) <= 8 for c, n in counts.items())
    same = part_sizes(dict.fromkeys(counts, 101), have, sure, 1, 4)
    assert set(same.values()) == {101}, "rounded only where numbers differ"


def test_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from quire.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    for keep in ("ada(pyramid(h2o:budget=0.2))", "duo", "kvzip:0.25"):
        asked = ("--device", "l4", "--context", "32768", "--users", "8", "--price", "2")
        done = subprocess.run(  # remedies try every codec
            [sys.executable, "-c", code, "plan", "llama-3.1-8b", "--keep", keep, *asked, "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert '"kept_tokens"' in done.stdout


def test_a_layout_of_its_own_is_enough() -> None:
    """`Kept` by hand: 2 layers of 2 heads, 8 bytes a token and head, blocks of 16, a fifth of 100 tokens."""
    from quire.plan.layout import KVLayer
    from quire.spec import Field

    fields = (Field("k", (16,), "float16"), Field("v", (16,), "float16"))
    layout = build_layout(
        [KVLayer(i, 2, fields) for i in range(2)],
        KVConfig(block_tokens=16),
        dtype="float16",
        keep=parse_keep("full"),
    )
    policy = parse_keep("keydiff:budget=0.2,sinks=1,window=4,boundary=2,every=8").policy
    kept = Kept(layout, policy)
    tile = 16 * 2 * 16 * 2
    assert kept.tokens(100) == 20
    assert kept.held_bytes(100, 100) == 4 * 2 * tile  # 20 + 1 tokens in 2 blocks
    assert kept.most_bytes(100, 100) == 4 * 2 * tile  # 20 + 8
    assert kept.peak_bytes(100) == 4 * (7 + 2) * tile
    assert kept.peak_bytes(5) == 4 * tile, "nothing goes"
