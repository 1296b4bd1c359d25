"""Compactions published as a whole: what one request leaves of a context, others go on from, to the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

import zoo
from quire.engine import Engine, SamplingParams
from quire.engine.schedule import SchedulerConfig
from quire.engine.sharing import sharing_report
from quire.errors import RequestError
from quire.models.open import open_runner
from quire.retention import available, parse_keep
from quire.retention.contract import Scored
from quire.retention.recipe import policy_class
from quire.store.namespace import Hints, Namespace, Tenants
from retention.kept import drain, prompts, small

DOC, Q1, Q2, Q3 = prompts((90, 17, 11, 5), zoo.VOCAB, seed=4)
AGNOSTIC = tuple(
    n for n in available() if issubclass(policy_class(n), Scored) and policy_class(n).agnostic
)
KIVI = "kivi:bits=2,group=16,residual=16"
CASES = [
    ("llama", "auto", "keydiff"),
    ("llama", "auto", "kvzip"),
    ("llama", "auto", "pyramid(ada(expected))"),
    ("llama", "int4", "ada(keydiff)"),
    ("llama", KIVI, "keydiff"),
    ("gemma2", "auto", "ada(keydiff)"),
    ("deepseek_v3", "auto", "pyramid(keydiff)"),
    ("falcon_h1", "auto", "ada(keydiff)"),  # the state at the context's end stays, too
]
MORE = [
    ("qwen3_next", "auto", "keydiff"),
    ("lfm2", "auto", "keydiff"),
    ("llama", "auto", "lagkv"),
    ("llama", "auto", "random"),
    ("llama", "int8", "expected"),
    ("llama", "int4;sinks=2", "kvzip"),
    ("llama", KIVI, "ada(kvzip)"),
    ("gemma3", KIVI, "kvzip"),
    ("gpt_oss", "auto", "expected"),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@cache
def model(name: str = "llama") -> Any:
    return zoo.build(name)


@pytest.fixture
def opened() -> Iterator[Any]:
    runners: list[Any] = []

    def make(name: str = "llama", **options: Any) -> Any:
        for runner in runners:
            runner.close()
        given = {"memory": "32MiB", "block_tokens": 8, "attention": "reference", "share": "prefix"}
        runners.append(open_runner(model(name), **{**given, **options}))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def ask(runner: Any, prompt: list[int], keep: Any, **wishes: Any) -> Any:
    """One request from beginning to end."""
    params = wishes.pop("params", PARAMS)
    with Engine(runner, config=SchedulerConfig(step_tokens=48)) as engine:
        name = engine.add_request(list(prompt), params, keep=keep, **wishes)
        out = drain(engine)[name]
        assert engine.stats().checks["violations"] == {}
    assert runner.usage().held_bytes == 0
    return out


def test_who_declares_it() -> None:
    assert AGNOSTIC == ("expected", "keydiff", "kvzap", "kvzip", "lagkv", "random")


@pytest.mark.parametrize(("name", "kv", "policy"), CASES + SLOW)
def test_a_later_question_goes_on_from_what_stayed(
    opened: Any, name: str, kv: str, policy: str
) -> None:
    keep, size = small(policy), 8 if kv == "auto" else 16
    cold = opened(name, kv=kv, share="off", block_tokens=size)
    want = [ask(cold, DOC + q, keep, context=90).token_ids for q in (Q1, Q2)]
    runner = opened(name, kv=kv, block_tokens=size)
    first, second = (ask(runner, DOC + q, keep, context=90) for q in (Q1, Q2))
    assert [first.token_ids, second.token_ids] == want
    assert first.figures.cached_tokens == 0
    assert second.figures.cached_tokens == 90
    assert second.figures.computed_tokens == len(Q2) + PARAMS.max_tokens - 1
    stats = runner.sharing.stats
    assert (stats.stored_wholes, stats.hit_wholes, stats.evicted_wholes) == (1, 1, 0)
    index, [whole] = runner.sharing.index, runner.sharing.wholes
    columns = zip(index.pools, index._blocks, strict=True)
    chunks = {(id(pool), b) for pool, blocks in columns for b in blocks if b >= 0}
    assert not chunks & {(id(pool), b) for pool, b in whole.blocks}, "a block has one name"


def test_a_model_that_takes_prompts_whole_has_no_context(opened: Any) -> None:
    runner = opened("jamba", share="off")
    with pytest.raises(RequestError, match="takes prompts whole"):
        ask(runner, DOC + Q1, small("keydiff"), context=90)
    assert len(ask(runner, DOC, small("keydiff"), context=90).token_ids) == 12


def test_what_was_there_before_is_found_as_always(opened: Any) -> None:
    runner = opened()
    ask(runner, DOC + Q1, small("keydiff"), context=90)
    assert ask(runner, DOC + Q1, "full").figures.cached_tokens >= 88
    ask(runner, DOC + Q1, small("keydiff", "0.5"), context=90)
    stats = runner.sharing.stats
    assert (stats.stored_wholes, stats.hit_wholes) == (2, 0), "another policy's was taken"


def test_what_is_held_beside_it_is_its_last_block(opened: Any) -> None:
    keep = small("keydiff")
    runner = opened()
    ask(runner, DOC + Q1, keep, context=90)
    [whole] = runner.sharing.wholes
    kept = parse_keep(keep).policy.budget.tokens_of(90, 1)
    block = runner.bridge.layout.spec.groups[0].block_bytes
    assert whole.block_bytes == -(-kept // 8) * block
    assert whole.state_bytes == 0, "keydiff remembers nothing"
    with Engine(runner) as engine:
        for q in (Q2, Q3):
            engine.add_request(DOC + q, PARAMS, keep=keep, context=90)
        engine.step()
        both = [s.table for s in engine.scheduler.running]
        assert len(both) == 2
        mine, other = (set(t.chains[0].live().tolist()) for t in both)
        assert len(mine & other) == kept // 8, "full blocks are one value"
        drain(engine)
    assert runner.usage().held_bytes == 0
    assert all(pool.named(b) and not pool.refs(b) for pool, b in whole.blocks)


def test_books_beside_the_arena_are_counted(opened: Any) -> None:
    runner = opened()
    with Engine(runner, config=SchedulerConfig(step_tokens=48)) as engine:
        engine.add_request(DOC + Q1, PARAMS, keep=small("kvzip"), context=90)
        drain(engine)
        report = sharing_report(engine)
    assert report is not None
    [whole] = runner.sharing.wholes
    lines = [x for line in whole.state.lines.values() for x in (line.mass, line.notes)]
    books = sum(4 * x.numel() for x in lines if x is not None)
    assert books > 0
    assert report["wholes"] == {
        "count": 1,
        "block_bytes": whole.block_bytes,
        "state_bytes": books,
    }


def test_what_has_a_name_is_never_written_to(opened: Any) -> None:
    runner = opened()
    with Engine(runner, config=SchedulerConfig(step_tokens=48)) as engine:
        engine.add_request(DOC + Q1, PARAMS, keep=small("keydiff"), context=90)
        while not len(runner.sharing.wholes):
            engine.step()
        [sample], [whole] = engine.scheduler.running, runner.sharing.wholes
        mine, named = sample.table.chains[0].live().tolist(), [b for _, b in whole.blocks]
        assert mine[:4] == named[:4]
        assert mine[4] != named[4], "the sequence goes on in its own last block"
        drain(engine)


def test_it_goes_as_a_whole_and_is_computed_anew(opened: Any) -> None:
    keep = small("ada(keydiff)")
    runner = opened()
    want = ask(runner, DOC + Q1, keep, context=90).token_ids
    [whole] = runner.sharing.wholes
    assert len({id(pool) for pool, _ in whole.blocks}) > 1, "heads' blocks are of several sizes"
    pool, block = whole.blocks[0]
    before = runner.usage().cached_bytes
    pool.evict(block)
    assert before - runner.usage().cached_bytes == whole.block_bytes
    assert not len(runner.sharing.wholes)
    again = ask(runner, DOC + Q1, keep, context=90)
    assert again.token_ids == want
    assert again.figures.cached_tokens < 90
    assert runner.sharing.stats.evicted_wholes == 1
    runner.sharing.clear()
    assert runner.usage().cached_bytes == 0


@pytest.mark.parametrize("policy", ["keydiff", "ada(keydiff)"])
def test_under_pressure_all_is_given_up_in_turn(opened: Any, policy: str) -> None:
    """Many contexts in little memory: every answer is the one that it has alone, and nothing is lost or left."""
    keep = small(policy)
    docs = prompts([70] * 6, zoo.VOCAB, seed=9)
    cold = opened(share="off")
    want = [ask(cold, d + Q3, keep, context=70).token_ids for d in docs]
    runner = opened(memory="1MiB")
    with Engine(runner, config=SchedulerConfig(step_tokens=64)) as engine:
        for _ in range(2):
            names = [engine.add_request(d + Q3, PARAMS, keep=keep, context=70) for d in docs]
            found = drain(engine)
            assert [found[n].token_ids for n in names] == want
        assert engine.stats().checks["violations"] == {}
    stats = runner.sharing.stats
    assert stats.evicted_wholes
    usage = runner.usage()
    assert usage.held_bytes == 0
    assert len(runner.sharing.wholes) == stats.stored_wholes - stats.evicted_wholes
    there = sum(w.block_bytes for w in runner.sharing.wholes)
    assert 0 < there <= usage.cached_bytes


def test_who_comes_at_the_same_time_waits(opened: Any) -> None:
    keep = small("kvzip")
    runner = opened()
    with Engine(runner, config=SchedulerConfig(step_tokens=88)) as engine:  # 2 short of it
        names = [engine.add_request(DOC + q, PARAMS, keep=keep, context=90) for q in (Q1, Q2, Q3)]
        found = drain(engine)
    assert [found[n].figures.cached_tokens for n in names] == [0, 90, 90]
    assert (runner.sharing.stats.stored_wholes, runner.sharing.stats.hit_wholes) == (1, 2)
    assert not runner.sharing.promised
    with Engine(runner, config=SchedulerConfig(step_tokens=16)) as engine:
        doc = DOC[::-1]
        first = engine.add_request(doc + Q1, PARAMS, keep=keep, context=90)
        engine.add_request(doc + Q2, PARAMS, keep=keep, context=90)
        engine.step()
        engine.cancel(first)
        assert not runner.sharing.promised, "nobody waits for one that has left"
        assert len(drain(engine)) == 2


def test_nobody_else_finds_it(opened: Any) -> None:
    keep, runner = small("keydiff"), opened()
    tenants = Tenants(b"0123456789abcdef")
    a, b = tenants.of("a"), tenants.of("b")
    ask(runner, DOC + Q1, keep, context=90, namespace=a)
    for wishes in ({"namespace": b}, {}, {"namespace": a, "share": "off"}):
        assert ask(runner, DOC + Q2, keep, context=90, **wishes).figures.cached_tokens == 0
    shorter = ask(runner, DOC + Q2, keep, context=89, namespace=a)
    assert shorter.figures.cached_tokens == 88
    changed = [DOC[0] + 1, *DOC[1:]]
    assert ask(runner, changed + Q2, keep, context=90, namespace=a).figures.cached_tokens == 0
    assert ask(runner, DOC + Q3, keep, context=90, namespace=a).figures.cached_tokens == 90
    group = [Namespace(s, (tuple(DOC),), "team") for s in (b"a", b"b")]
    ask(runner, DOC + Q1, keep, context=90, namespace=group[0])
    found = ask(runner, DOC + Q2, keep, context=90, namespace=group[1])
    assert found.figures.cached_tokens == 90, "declared to be shared within the group"


def test_a_prompt_leaves_it_as_well(opened: Any) -> None:
    """At the prompt's end, or when a request for it ends there; and who was preempted finds its own."""
    keep, runner = small("keydiff"), opened()
    ask(runner, DOC, keep)
    assert ask(runner, DOC + Q1, keep, context=90).figures.cached_tokens == 90
    other = DOC[::-1]
    ask(runner, other, keep, context=90, params=SamplingParams(max_tokens=1), hints=Hints(1))
    assert ask(runner, other + Q1, keep, context=90).figures.cached_tokens == 90
    asks = small("snapkv")
    ask(runner, DOC + Q1, asks, context=90)
    assert ask(runner, DOC + Q1, asks, context=90).figures.cached_tokens == 90 - 64
    stats = runner.sharing.stats
    assert (stats.stored_wholes, stats.hit_wholes) == (2, 2), (
        "what asked a question is nobody else's"
    )


def spoil(runner: Any, whole: Any, what: str) -> None:
    """Bytes of a block become another's; or other tokens are said to have stayed."""
    if what == "kept":
        chain = next(c for c in whole.chains if c.own is not None)
        chain.own = chain.own // 2
        return
    chain = next(c for c in whole.chains if c.kept is not None and c.count > 1)
    with torch.inference_mode():
        buffer, n = runner.bridge.store.arena.buffer, chain.pool.block_bytes
        start, source = (chain.pool.byte_offset(int(b)) for b in chain.ids[:2])
        buffer[start : start + n] = buffer[source : source + n]


@pytest.mark.parametrize(
    ("name", "kv", "policy"),
    [
        CASES[0],
        ("llama", "int4", "ada(kvzip)"),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[4:]),
    ],
)
@pytest.mark.parametrize("what", ["bytes", "kept"])
def test_the_audit_compresses_it_again(
    opened: Any, name: str, kv: str, policy: str, what: str
) -> None:
    keep, size = small(policy), 8 if kv == "auto" else 16
    runner = opened(name, kv=kv, block_tokens=size, share="prefix:audit=1")
    with Engine(runner, config=SchedulerConfig(step_tokens=48)) as engine:

        def audit(question: list[int]) -> Any:
            asked = engine.add_request(DOC + question, PARAMS, keep=keep, context=90)
            drain(engine)
            report = sharing_report(engine)
            assert report is not None
            return asked, report["audit"]

        audit(Q1)
        _, found = audit(Q2)
        assert (found["audited"], found["diverged"], found["skipped"]) == (1, 0, 0)
        assert found["tokens"] == 90
        [whole] = runner.sharing.wholes
        spoil(runner, whole, what)
        asked, found = audit(Q3)
    assert (found["audited"], found["diverged"]) == (2, 1)
    [divergence] = found["divergences"]
    assert divergence["request_id"] == asked
    assert divergence["found_tokens"] == 90
    assert (divergence["name"] == "kept") == (what == "kept")
    assert runner.usage().held_bytes == 0


def test_kvzip_reads_once_more_after_the_longest_hit(opened: Any) -> None:
    """A prefix that ends where tokens go leaves nothing to compute there, and what was read once more is needed."""
    keep, doc = small("kvzip"), DOC[:88]
    want = ask(opened(share="off"), doc + Q1, keep, context=88).token_ids
    runner = opened()
    ask(runner, doc + Q2, "full")
    assert ask(runner, doc + Q1, keep, context=88).token_ids == want


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"keep": "full", "context": 5}, "keep by score"),
        ({"keep": "window:64", "context": 5}, "lets none go there"),
        ({"keep": "keydiff:0.5", "context": 108}, "context"),
        ({"keep": "keydiff:0.5", "context": -1}, "context"),
        ({"keep": "keydiff:0.5", "context": "text"}, "a number of tokens"),
    ],
)
def test_refused(opened: Any, wishes: dict[str, Any], says: str) -> None:
    with Engine(opened()) as engine, pytest.raises(RequestError, match=says):
        engine.add_request(DOC + Q1, PARAMS, **wishes)
