"""What a policy drops goes back to the pool: bytes counted there, against the same sequence kept whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import zoo
from quire.models.open import open_runner
from quire.models.runner import ModelRunner
from quire.retention import parse_keep
from retention.kept import PLAIN, WRAPPED, prompts

POLICIES = [*PLAIN, *WRAPPED]


@pytest.fixture(scope="module")
def packaged() -> Any:
    from transformers import AutoModelForCausalLM

    import quire.packaged

    return AutoModelForCausalLM.from_pretrained(quire.packaged.path(), dtype=torch.float32).eval()


@cache
def tiny() -> Any:
    return zoo.build("llama")


@dataclass
class _Item:
    """What one sequence has computed, as an engine hands it over."""

    table: Any
    tokens: list[int]
    start: int
    stop: int
    logits: int = 1


def held(model: Any, prompt: list[int], keep: Any, **options: Any) -> tuple[int, Any]:
    """Bytes that a prompt holds in the pool when its tokens have gone and one more has come, and the rules."""
    runner = open_runner(model, memory="64MiB", **options)
    assert isinstance(runner, ModelRunner)
    try:
        rules, table = runner.rules(parse_keep(keep)), runner.open()
        rules.apply(table, len(prompt))
        for start, stop in ((0, len(prompt)), (len(prompt), len(prompt) + 1)):
            table.append(stop - start)
            runner.forward([_Item(table, [*prompt, 7], start, stop)])  # type: ignore[list-item]
            table.commit()
        found = runner.usage().held_bytes
        assert found == table.held_bytes()
        table.release()
        return found, rules
    finally:
        runner.close()


@cache
def whole(model: Any) -> int:
    return held(model, prompts([1000], 2048)[0], "full")[0]


@cache
def tiny_whole(kv: str) -> int:
    return held(tiny(), prompts([480], zoo.VOCAB)[0], "full", kv=kv)[0]


def nominal(keep: str, budget: str) -> str:
    """With its budget; of a policy that decides alone every head takes the cheapest way."""
    inner = keep.rpartition("(")[2].rstrip(")")
    extra = "" if parse_keep(keep).policy.bounded else ",recover=0.0"
    return keep.replace(inner, f"{inner}:budget={budget}{extra}", 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fifth_of_a_thousand_tokens(policy: str, packaged: Any) -> None:
    [prompt] = prompts([1000], 2048)
    full = whole(packaged)
    keep = nominal(policy, "0.2")
    some, rules = held(packaged, prompt, keep)
    chosen = parse_keep(keep).policy
    protected = (chosen.sinks + chosen.window + chosen.boundary) / 1000
    assert full - some >= 0.9 * 0.8 * 1000 * rules.bytes_per_token
    assert some <= (0.22 + protected) * full


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kv", ["bf16", "int8", "int4", "kivi:residual=32"])
def test_every_codec_frees_what_a_policy_drops(policy: str, kv: str) -> None:
    """Beside the raw tokens that a lossy codec keeps whatever goes."""
    [prompt] = prompts([480], zoo.VOCAB)
    full = tiny_whole(kv)
    some, rules = held(tiny(), prompt, nominal(policy, "0.3"), kv=kv)
    assert full - some >= 0.9 * (480 - rules.kept_tokens(480)) * rules.bytes_per_token
