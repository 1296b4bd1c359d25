"""A scored query reads what a decoding one reads, and nothing can be scored without the cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import zoo
from models.driving import runner_for
from quire.engine.runner import Item
from quire.errors import ConfigError, InvariantError, RequestError
from quire.evaluate.decode import Scorer, twin
from quire.models.open import open_runner

LOSSY = "lossy:residual_tokens=8"


def scored(runner: Any, text: list[int], **options: Any) -> tuple[torch.Tensor, Scorer]:
    first = options.pop("first", 0)
    scorer = Scorer(runner, **options)
    chunks = list(scorer.score(text, first=first))
    assert [c.start for c in chunks] == [first, *(c.stop for c in chunks[:-1])]
    return torch.cat([c.logprobs for c in chunks]), scorer


def own_logprobs(model: Any, text: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([text]), use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("name", ["llama", "mistral", "falcon", "bloom", "mamba", "llama_dynamic"])
def test_under_an_exact_cache_the_scores_are_the_model_s_own(name: str) -> None:
    """Packed, with a window, patched, dense, recurrent, and one whose frequencies change with the length."""
    text = zoo.prompts()[3]
    want = own_logprobs(zoo.build(name), text) if name != "llama_dynamic" else None
    got, scorer = scored(runner_for(zoo.build(name)), text, chunk_tokens=7)
    assert len(got) == len(text) - 1
    if want is not None:
        assert torch.allclose(got, want, atol=2e-4)
    assert scorer.reading.tokens == len(text)
    assert scorer.reading.decoded == 0


def test_chunks_change_nothing_under_a_lossy_codec(text: list[int]) -> None:
    """In float64: in float32 a key on the edge between two codes falls to either side as the matrix shapes round."""
    model = zoo.build("llama").double()
    runner = runner_for(twin(model), kv=LOSSY)
    text = text[:120]
    want, first = scored(runner, text, chunk_tokens=1)
    for chunk in (5, 32, 200):
        got, scorer = scored(runner, text, chunk_tokens=chunk)
        assert (got - want).abs().max() < 1e-5
        assert scorer.reading.decoded == first.reading.decoded, "what is read is the same, too"
        assert scorer.reading.raw == first.reading.raw
    exact, _ = scored(runner_for(twin(model)), text)
    assert (exact - want).abs().max() > 1e-4, "a codec that loses nothing could not show it"


def test_what_was_read_is_what_the_law_says(llama: Any, text: list[int]) -> None:
    """Blocks of 8, residual 8: query i reads decoded positions below s(i) = max(0, 8 (i // 8) - 8), in 3 layers."""
    n = 50
    _, scorer = scored(runner_for(twin(llama), kv=LOSSY), text[:n])
    starts = [max(0, i // 8 * 8 - 8) for i in range(n)]
    reading = scorer.reading
    assert reading.decoded == 3 * sum(starts)
    assert reading.raw == 3 * sum(i + 1 - s for i, s in enumerate(starts))
    assert reading.decoded_queries == sum(s > 0 for s in starts[:-1])
    assert reading.queries == n - 1


def test_dense_models_are_counted_too(text: list[int]) -> None:
    runner = runner_for(zoo.build("bloom"), kv=LOSSY)
    n = 40
    _, scorer = scored(runner, text[:n])
    assert scorer.reading.decoded == 3 * sum(max(0, i // 8 * 8 - 8) for i in range(n))


def test_bytes_are_all_live_blocks(llama: Any, text: list[int]) -> None:
    """43 tokens in blocks of 8, per layer and head 64 + 64 channels; aligned to 64 bytes."""
    _, exact = scored(runner_for(twin(llama)), text[:43])
    assert exact.reading.held_bytes == 6 * (8 * 128 * 4) * 3 * 2, (
        "six blocks, the last partly filled"
    )
    assert exact.reading.bytes_per_token == exact.reading.held_bytes / 43
    _, lossy = scored(runner_for(twin(llama), kv=LOSSY), text[:43])
    tile = 2 * (8 * 64 * 2 + 64 * 4 + 64)  # codes in int16, a base in float32, a scale; k and v
    raw = 2 * (8 * 128 * 4)  # positions 32 to 43: s(43) = 40 - 8
    assert lossy.reading.held_bytes == (5 * tile + raw) * 3 * 2


def test_figures_add_up_over_texts_and_exist_for_finished_ones_only(
    llama: Any, text: list[int]
) -> None:
    scorer = Scorer(runner_for(twin(llama)), chunk_tokens=8)
    with pytest.raises(InvariantError, match="no figures"):
        _ = scorer.reading.bytes_per_token
    broken_off = scorer.score(text[:30])
    next(broken_off)
    broken_off.close()
    assert scorer.reading.passes == 0
    assert scorer.runner.usage().held_bytes == 0
    list(scorer.score(text[:16]))
    list(scorer.score(text[:24]))
    assert (scorer.reading.passes, scorer.reading.tokens) == (2, 40)


def test_a_lossy_cache_that_is_never_read_decoded_is_an_error(llama: Any, text: list[int]) -> None:
    """Shorter than one block and the residual window: everything is read raw, and the figures would say 'lossless'."""
    runner = runner_for(twin(llama), kv="lossy:residual_tokens=24")
    for n in (20, 33):  # query 32 is the first with s > 0, and it has a next token from 34 on
        with pytest.raises(InvariantError, match="no scored query"):
            scored(runner, text[:n])
    scored(runner, text[:34])


def _forgetful(runner: Any) -> Scorer:
    """An evaluation gone wrong: it recomputes the whole text instead of reading what is cached."""

    def forward(items: list[Item], adapter: str | None = None) -> torch.Tensor:
        (item,) = items
        with torch.inference_mode():
            ids = torch.tensor([item.tokens[: item.stop]])
            return runner.model(ids, use_cache=False).logits[0, -item.logits :].float()

    scorer = Scorer(runner, chunk_tokens=16)
    runner.forward = forward
    return scorer


@pytest.mark.parametrize("kv", ["auto", LOSSY])
def test_an_evaluation_without_the_cache_cannot_be_written(
    llama: Any, text: list[int], kv: str
) -> None:
    with pytest.raises(InvariantError, match="never read the cache"):
        list(_forgetful(runner_for(twin(llama), kv=kv)).score(text[:40]))


def test_only_scored_queries_count(llama: Any, text: list[int]) -> None:
    runner = runner_for(twin(llama), kv=LOSSY)
    got, scorer = scored(runner, text[:60], first=50, chunk_tokens=16)
    whole, _ = scored(runner, text[:60])
    assert torch.allclose(got, whole[50:], atol=1e-3)
    assert scorer.reading.queries == scorer.reading.decoded_queries == 9
    assert scorer.reading.decoded == 3 * sum(i // 8 * 8 - 8 for i in range(50, 60))


def test_refusals(llama: Any, text: list[int]) -> None:
    with pytest.raises(ConfigError, match="keeps no cache"):
        Scorer(open_runner(twin(llama), kv="none"))
    runner = runner_for(twin(llama))
    with pytest.raises(ConfigError, match="chunk_tokens"):
        Scorer(runner, chunk_tokens=0)
    scorer = Scorer(runner)
    for tokens, first, says in (
        (text[:1], 0, "nothing to score"),
        ([], 0, "nothing to score"),
        (text[:5], 4, "nothing to score"),
        (text[:5], -1, "nothing to score"),
        (text * 2, 0, "longer than the context of 512"),
    ):
        with pytest.raises(RequestError, match=says):
            list(scorer.score(tokens, first=first))


def test_chunks_bound_the_logits(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.evaluate.decode.LOGITS_ELEMENTS", 10 * zoo.VOCAB)
    assert Scorer(runner_for(twin(llama))).chunk_tokens == 10


def test_a_twin_shares_the_weights_and_nothing_else(llama: Any) -> None:
    other = twin(llama)
    assert all(a is b for a, b in zip(llama.parameters(), other.parameters(), strict=True))
    runner_for(other)
    assert llama.config._attn_implementation != other.config._attn_implementation
    assert math.isfinite(float(own_logprobs(llama, zoo.prompts()[0]).sum()))
