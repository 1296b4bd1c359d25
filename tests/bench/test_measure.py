"""Cases run what they say, nothing wrong is timed, and the floor is arithmetic. Nothing here looks at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from quire.bench import measure as measuring
from quire.bench.cases import CASES, Case, check_fits, run, step_bytes
from quire.bench.machine import Spread
from quire.bench.measure import Side, measure
from quire.bench.models import SIZES, check_size, random_llama
from quire.engine.schedule import SchedulerConfig
from quire.errors import CapacityError, ConfigError, InvariantError
from quire.evaluate.decode import twin
from quire.models.open import open_runner


@pytest.fixture(scope="module")
def model() -> Any:
    return random_llama("tiny", context=128, dtype="float32").model


def opened(model: Any, **options: Any) -> Any:
    return open_runner(twin(model), **{"memory": "8MiB", "block_tokens": 8, **options})


def quick(case: Case, sides: list[Side], said: list[str], repeats: int = 1) -> list[dict[str, Any]]:
    return measure(
        case,
        sides,
        keep="full",
        attention="torch",
        dtype="float32",
        repeats=repeats,
        say=said.append,
        stream_bytes=1 << 16,
    )


@pytest.mark.parametrize(
    ("name", "texts", "tokens"),
    [
        ("decode", [5] * 3, 12),  # the first token of each is not counted
        ("prefill", [1] * 3, 60),
        ("concurrent", [5] * 3, 15),
        ("shared-prefix", [5] * 3, 15),
    ],
)
def test_a_case_counts_its_tokens(model: Any, name: str, texts: list[int], tokens: int) -> None:
    runner = opened(model)
    own = 6 if name == "shared-prefix" else 0
    done = run(Case(name, ctx=20, batch=3, out=5, own=own), runner)
    assert [len(t) for t in done.texts] == texts
    assert done.tokens == tokens
    assert done.seconds > 0
    assert runner.usage().held_bytes == 0
    distinct = {tuple(t) for t in done.texts}
    assert len(distinct) > 1
    again = run(Case(name, ctx=20, batch=3, out=5, own=own), runner)
    assert again.texts == done.texts
    runner.close()


def test_a_shared_prefix_is_computed_once(model: Any) -> None:
    lengths: list[int] = []
    runner = opened(model, share="prefix")
    forward = runner.forward

    def watched(items: Any, adapter: str | None = None) -> torch.Tensor:
        lengths.append(sum(x.stop - x.start for x in items))
        return forward(items, adapter)

    runner.forward = watched
    done = run(Case("shared-prefix", ctx=32, batch=3, out=4, own=5), runner)
    assert lengths[0] == 37  # the others wait for it
    assert sum(lengths) == done.computed == 32 + 3 * (5 + 3)
    runner.close()


def test_with_and_without_sharing_side_by_side(model: Any) -> None:
    case = Case("shared-prefix", ctx=32, batch=3, out=4, own=5)

    def side(share: str, without: Side | None = None) -> Side:
        return Side("auto", lambda a: opened(model, attention=a, share=share), without)

    (found,) = quick(case, [side("prefix", side("off"))], [])
    assert found["computed_tokens"] == found["least_computed_tokens"] == 32 + 3 * 8
    assert found["without_sharing"]["computed_tokens"] == 3 * (32 + 8)
    assert found["times_faster"]["median"] > 0


def test_a_prefix_that_is_computed_again_is_not_reported(model: Any) -> None:
    def open_one(share: str, attention: str) -> Any:
        runner = opened(model, attention=attention, share=share)
        if runner.sharing is not None:
            runner.sharing.awaited = lambda *_: None  # nobody waits for anybody
        return runner

    side = Side("auto", partial(open_one, "prefix"), Side("auto", partial(open_one, "off")))
    with pytest.raises(InvariantError, match="120 positions were computed and 56 suffice"):
        quick(Case("shared-prefix", ctx=32, batch=3, out=4, own=5), [side], [])


def test_sides_are_verified_then_take_turns(model: Any) -> None:
    said: list[str] = []
    order: list[str] = []
    made: list[Any] = []

    def make(name: str) -> Side:
        def open_one(attention: str) -> Any:
            order.append(f"{name} {attention}")
            made.append(opened(model, attention=attention))
            return made[-1]

        return Side(name, open_one)

    one = make("auto")
    found = quick(Case("decode", 20, 2, 4), [one], said, repeats=3)
    assert order == ["auto torch", "auto reference"]
    assert len(one.runs) == 3
    assert not any(runner.bridge.patches._undo for runner in made)  # closed
    assert found[0]["verified"] == 1.0
    assert said[0].startswith("verifying")
    assert sum(line.startswith("turn") for line in said) == 3


def test_what_is_wrong_is_not_timed(model: Any) -> None:
    def open_one(attention: str) -> Any:
        runner = opened(model, attention=attention)
        if attention != "reference":
            forward = runner.forward
            runner.forward = lambda items, adapter=None: -forward(items, adapter)
        return runner

    side = Side("auto", open_one)
    with pytest.raises(InvariantError, match="nothing was timed"):
        quick(Case("decode", 20, 2, 4), [side], [])
    assert not side.runs


def test_the_floor_is_bytes_over_the_stream(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Steady:
        def __init__(self, n_bytes: int) -> None:
            pass

        def gb_per_s(self) -> float:
            return 10.0

    monkeypatch.setattr(measuring, "Stream", Steady)
    case = Case("concurrent", ctx=20, batch=2, out=4)
    (found,) = quick(case, [Side("auto", lambda a: opened(model, attention=a))], [])
    s = SIZES["tiny"]
    per_layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128
    weights = 4 * (s["layers"] * per_layer + 128 + 512 * 128)  # norms and the head; no embedding
    cache = 2 * 22 * (2 * 2 * 64 * 4)
    assert found["weight_bytes_per_step"] == weights
    assert found["kv_bytes_per_token"] == 2 * 2 * 64 * 4
    assert found["stream_gb_per_s"] == 10.0
    assert found["floor_tokens_per_s"] == pytest.approx(2 * 10e9 / (weights + cache))
    (prefill,) = quick(
        Case("prefill", 20, 2, 4), [Side("auto", lambda a: opened(model, attention=a))], []
    )
    assert prefill["floor_tokens_per_s"] is None
    assert prefill["out"] == 1


def test_a_shared_head_is_read(model: Any) -> None:
    runner = opened(model)
    apart, _ = step_bytes(Case("decode", 4, 1, 2), runner)
    runner.model.lm_head.weight = runner.model.model.embed_tokens.weight
    assert step_bytes(Case("decode", 4, 1, 2), runner)[0] == apart
    runner.close()


def test_a_decode_counts_the_steps_that_all_texts_take_part_in(model: Any) -> None:
    """Prompts that take two steps: some texts begin, and end, one step before the others."""
    runner = opened(model)
    batch = SchedulerConfig().step_tokens // 100 + 2
    done = run(Case("decode", ctx=100, batch=batch, out=6), runner)
    assert done.tokens % batch == 0
    assert 0 < done.tokens < batch * 5
    with pytest.raises(ConfigError, match="give more than --out 2"):
        run(Case("decode", ctx=100, batch=batch, out=2), runner)
    assert runner.usage().held_bytes == 0
    runner.close()


def test_what_warms_up_need_not_have_such_a_step(model: Any) -> None:
    case = Case("decode", ctx=100, batch=SchedulerConfig().step_tokens // 100 + 2, out=6)
    (found,) = quick(case, [Side("auto", lambda a: opened(model, attention=a))], [])
    assert found["tokens_per_s"] > 0


def test_too_much_is_refused(model: Any) -> None:
    runner = opened(model, memory="256KiB")
    check_fits(Case("decode", 60, 2, 4), runner)
    with pytest.raises(CapacityError, match="lower --batch or --ctx"):
        check_fits(Case("decode", 60, 8, 4), runner)
    with pytest.raises(ConfigError, match="context ends at 128"):
        check_fits(Case("decode", 126, 1, 4), runner)
    runner.close()


def test_cases_and_sizes_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown case 'x'; known: decode, prefill"):
        Case("x", 1, 1, 2)
    with pytest.raises(ConfigError, match="--ctx must be at least 1"):
        Case("prefill", 0, 1, 1)
    with pytest.raises(ConfigError, match="--out must be at least 2"):
        Case("decode", 1, 1, 1)
    with pytest.raises(ConfigError, match=r"unknown size --random '7b'; known: tiny, 55m, 1\.1b"):
        check_size("7b")
    assert set(CASES) == {"decode", "prefill", "concurrent", "shared-prefix"}


def test_random_models_are_the_size_they_say() -> None:
    s = SIZES["1.1b"]
    layer = 2 * s["hidden"] ** 2 + 2 * s["hidden"] * 256 + 3 * s["hidden"] * s["intermediate"]
    assert s["layers"] * layer + 2 * s["vocab"] * s["hidden"] == pytest.approx(1.1e9, rel=0.01)
    one = random_llama("tiny", context=64, seed=1).model
    two = random_llama("tiny", context=64, seed=1).model
    assert one.dtype == torch.bfloat16
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert torch.get_default_dtype() == torch.float32


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
