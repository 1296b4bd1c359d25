"""Answers read along: the exact cache parts from itself nowhere, and a lossy one where its own answer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire.errors import RequestError
from quire.evaluate import Scorer, evaluate
from quire.evaluate.decode import twin
from quire.evaluate.rows import bool_run
from quire.models.open import open_runner

MEMORY = 16 << 20
OPTIONS: dict[str, Any] = {"memory": MEMORY, "block_tokens": 16}


def answer(model: Any, kv: str, prompt: list[int], n: int) -> list[int]:
    runner = open_runner(twin(model), kv=kv, weights="plain", **OPTIONS)
    try:
        return Scorer(runner).answer(prompt, n)
    finally:
        runner.bridge.close()  # type: ignore[union-attr]


def test_an_answer_is_what_generate_says(llama: Any, text: list[int]) -> None:
    prompt = text[:37]
    ids = torch.tensor([prompt])
    own = llama.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    assert answer(llama, "auto", prompt, 20) == own[0, 37:].tolist()


def test_what_ends_an_answer_is_its_last_token(llama: Any, text: list[int]) -> None:
    runner = open_runner(twin(llama), weights="plain", **OPTIONS)
    scorer = Scorer(runner)
    try:
        free = scorer.answer(text[:37], 20)
        cut = scorer.answer(text[:37], 20, end=(free[5],))
        assert cut == free[: free.index(free[5]) + 1]
        assert scorer.reading.passes == 2
        with pytest.raises(RequestError, match="longer than the context"):
            scorer.answer(text[:37], 10_000)
    finally:
        runner.bridge.close()  # type: ignore[union-attr]


def test_divergence_is_where_its_own_answer_parts(llama: Any, text: list[int]) -> None:
    prompts = [text[:40], text[100:161], text[200:230], text[300:345]]
    kv = "int4"
    found = evaluate(
        llama,
        None,
        [("auto", "full"), (kv, "full")],
        (),
        prompts=prompts,
        answer_tokens=24,
        **OPTIONS,
    )
    rows = {(r.kv, r.metric): r for r in found.rows}
    assert rows["auto", "divergence"].value == 24
    assert rows["auto", "same"].value == 1
    assert rows["auto", "kl"].value == 0
    runs = []
    for prompt in prompts:
        exact, mine = (answer(llama, c, prompt, 24) for c in ("auto", kv))
        runs.append(bool_run([a == b for a, b in zip(exact, mine, strict=True)]))
    assert len(set(runs)) > 1, "some part from it and some do not, or later"
    assert rows[kv, "divergence"].value == sum(runs) / 4
    assert rows[kv, "same"].value == sum(n == 24 for n in runs) / 4
    assert rows[kv, "kl"].value > 0
    assert {r.count for r in found.rows if r.metric == "divergence"} == {4}


def test_prompts_too_short_to_be_read_decoded_show_nothing(llama: Any, text: list[int]) -> None:
    ask: dict[str, Any] = {"prompts": [text[:3]], "answer_tokens": 4, **OPTIONS}
    with pytest.raises(RequestError, match="no prompt with its answer is long enough"):
        evaluate(llama, None, [("int8", "full")], (), **ask)
    with pytest.raises(RequestError, match="prompt 1 has 0 tokens"):
        evaluate(llama, None, [("int8", "full")], (), prompts=[[]], **OPTIONS)


def test_answers_are_read_along_one_token_at_a_time(
    llama: Any, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    own = Scorer._advance

    def seen(self: Any, watch: Any, table: Any, tokens: Any, start: int, end: int, n: int) -> Any:
        steps.append((start, end))
        return own(self, watch, table, tokens, start, end, n)

    monkeypatch.setattr(Scorer, "_advance", seen)
    ask: dict[str, Any] = {"prompts": [text[:40]], "answer_tokens": 5, **OPTIONS}
    evaluate(llama, None, [("int8", "full")], (), **ask)
    assert steps.count((0, 40)) == 3, "the exact cache answers, and both read along"
    assert {end - start for start, end in steps if start >= 40} == {1}
    assert steps.count((43, 44)) == 3
