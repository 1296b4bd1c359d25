"""`kvzip`: its scores are what a repetition of the prompt pays, whatever way the prompt took; and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

import zoo
from models.driving import engine_texts, runner_for
from quire import attach
from quire.engine.runner import Item
from quire.errors import CapacityError, ConfigError, RequestError
from quire.models.repeat import LEAD_TOKENS
from quire.retention.kvzip import Policy
from quire.spec import Coord

KEEP = "kvzip:budget=0.5,repeats=16,sinks=2,window=4,boundary=3,every=8"
TEXT = zoo.prompts(lengths=(60,))[0]


@contextmanager
def noting() -> Iterator[list[dict[Coord, torch.Tensor]]]:
    """What the policy is shown, once per length at which tokens go: each head's mass."""
    shown: list[dict[Coord, torch.Tensor]] = []
    plain, length = Policy.score, [0]

    def score(self: Policy, seen: Any) -> torch.Tensor:
        if seen.length != length[0]:
            length[0] = seen.length
            shown.append({})
        shown[-1] |= dict(zip(seen.coords, seen.mass.clone(), strict=True))
        return plain(self, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "score", score)
        yield shown


def fed(runner: Any, keep: str, chunks: Sequence[int], more: int = 1) -> dict[Coord, torch.Tensor]:
    """The scores of a prompt that comes in such chunks, and one token after it."""
    from quire.retention import parse_keep

    table = runner.open(parse_keep(keep), sum(chunks))
    tokens, at = [*TEXT, 1], 0
    with noting() as shown:
        for n in [*chunks, 1]:
            table.append(n)
            runner.forward([Item(table, tokens, at, at + n, 1)])
            table.commit()
            assert table.length == at + n
            at += n
            for line in table.keeper.lines.values():
                assert not line.mass[:, at:].any(), "drafts left something behind"
    table.release()
    assert len(shown) == 1
    return shown[0]


def by_hand(model: Any, text: Sequence[int], size: int) -> dict[Coord, torch.Tensor]:
    """transformers' own attention over the text and a piece of it, piece after piece."""
    model.set_attn_implementation("eager")
    n, best = len(text), {}
    for at in range(0, n, size):
        piece = text[max(0, at - LEAD_TOKENS) : at + size]
        with torch.no_grad():
            out = model(torch.tensor([[*text, *piece]]), output_attentions=True)
        for layer, p in enumerate(out.attentions):
            paid = p[0, :, n:, :n].amax(1).unflatten(0, (model.config.num_key_value_heads, -1))
            for head, mass in enumerate(paid.amax(1)):
                old = best.get((layer, head), torch.zeros(n))
                best[layer, head] = torch.maximum(old, mass)
    return best


def agree(got: dict[Coord, torch.Tensor], want: dict[Coord, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for coord, mass in want.items():
        torch.testing.assert_close(got[coord], mass, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("attention", ["reference", "auto"])
def test_scores_are_the_most_that_a_repetition_pays(attention: str) -> None:
    model = zoo.build("llama")
    runner = runner_for(model, attention=attention)
    got = fed(runner, KEEP, (60,))
    runner.close()
    agree(got, by_hand(model, TEXT, 16))


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_scores_do_not_depend_on_the_chunks(kv: str) -> None:
    runner = runner_for(zoo.build("llama"), kv=kv, attention="reference", block_tokens=16)
    whole = fed(runner, KEEP, (60,))
    agree(fed(runner, KEEP, (23, 30, 7)), whole)
    assert runner.usage().held_bytes == 0
    runner.close()


def test_what_is_generated_is_repeated_before_tokens_go_again() -> None:
    runner = runner_for(zoo.build("llama"), keep=KEEP)
    with noting() as shown:
        engine_texts(runner, [TEXT], 24, budget=64)
    runner.close()
    assert len(shown) == 3  # at 60, 68 and 76 tokens
    for before, after in pairwise(shown):
        for coord in before:
            fresh = after[coord][-8:]
            assert (fresh > 0).all(), "new tokens were not read once more"


def test_generate_keeps_what_the_engine_keeps() -> None:
    texts = [TEXT, TEXT[:41]]
    model = zoo.build("llama")
    runner = runner_for(model, keep=KEEP, attention="reference")
    with noting() as engine:
        want = engine_texts(runner, texts, 12, budget=200)
    runner.close()
    ids = torch.zeros(2, 60, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, 60 - len(text) :] = torch.tensor(text)
        mask[row, 60 - len(text) :] = 1
    options = {"keep": KEEP, "block_tokens": 8, "attention": "reference", "memory": "32MiB"}
    with attach(model, **options), noting() as own:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    assert out[:, 60:].tolist() == want
    assert [sorted(x) for x in own] == [sorted(x) for x in engine]
    full = runner_for(model, attention="reference")
    assert engine_texts(full, texts, 12, budget=200) != want, "the control: nothing was dropped"
    full.close()


def test_heads_share_all_layers_budget_or_keep_equally_many() -> None:
    scores = {(0, 0): torch.tensor([9.0, 8, 7, 6]), (1, 0): torch.tensor([5.0, 4, 3, 2])}
    assert Policy(budget="0.5").allocate(scores, 2, 8) == {(0, 0): 4, (1, 0): 0}
    assert Policy(budget="0.5", uniform=True).allocate(scores, 2, 8) == {(0, 0): 2, (1, 0): 2}


def test_room_for_the_repetition_is_taken_with_the_last_chunk() -> None:
    """Where there is none, the chunk is refused, and the table is as it was."""
    from quire.retention import parse_keep

    runner = runner_for(zoo.build("llama"))
    bytes_of = runner.bridge.layout.spec.bytes_for
    runner.close()
    runner = runner_for(zoo.build("llama"), memory=int(bytes_of(64) * 1.05) + 4096)
    table = runner.open(parse_keep(KEEP), 60)
    table.append(50)
    table.commit()
    held = table.held_bytes()
    with pytest.raises(CapacityError):
        table.append(10)
    assert (table.length, table.held_bytes()) == (50, held)
    table.append(9)  # not the prompt's end yet
    table.release()
    runner.close()


def test_a_repetition_beyond_the_context_is_refused_at_the_door() -> None:
    runner = runner_for(zoo.build("gpt2"), keep="kvzip:repeats=64,budget=0.5")
    context = runner.max_context_tokens
    text = [1 + i % (zoo.VOCAB - 1) for i in range(context - 40)]
    with pytest.raises(RequestError, match="repeats=32 or less would fit"):
        engine_texts(runner, [text], 4)
    runner.close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("deepseek_v2", "use uniform=true"),
        ("mamba2", "use keydiff|nothing to drop"),
        ("llama_dynamic", "turns keys by the length"),
    ],
)
def test_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        runner_for(zoo.build(name), keep=KEEP)


def test_latents_keep_equally_many() -> None:
    runner = runner_for(
        zoo.build("deepseek_v2"), keep=KEEP + ",uniform=true", attention="reference"
    )
    [text] = engine_texts(runner, [TEXT], 12)
    assert len(text) == 12
    runner.close()


def test_embeddings_cannot_be_repeated() -> None:
    model = zoo.build("llama")
    with attach(model, keep=KEEP, memory="32MiB") as attached, torch.no_grad():
        embeds = model.get_input_embeddings()(torch.tensor([TEXT]))
        with pytest.raises(RequestError, match="embeddings"):
            model(inputs_embeds=embeds, past_key_values=attached.cache())


def test_generate_tells_policies_what_was_paid() -> None:
    """Any that asks for the attention of the prompt's own queries."""
    from quire.retention.h2o import Policy as Paid

    model, shown = zoo.build("llama"), []

    def score(self: Paid, seen: Any) -> torch.Tensor:
        shown.append(seen.mass.clone())
        return seen.mass

    keep = KEEP.replace("kvzip", "h2o").replace("repeats=16,", "")
    with (
        pytest.MonkeyPatch.context() as patch,
        attach(model, keep=keep, block_tokens=8, memory="32MiB"),
    ):
        patch.setattr(Paid, "score", score)
        model.generate(torch.tensor([TEXT]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert shown
    for mass in shown:  # every query pays 1 in all
        torch.testing.assert_close(mass.sum(1), torch.full((2,), 60.0), atol=1e-3, rtol=1e-4)
