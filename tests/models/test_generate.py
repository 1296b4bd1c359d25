"""An attached model's own `generate()`: every decoding mode says what it said before, and gives everything back."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

import quire
import zoo
from quire.models.attach import Attachment

FAMILIES = [
    "llama",
    "mistral",
    "gpt_oss",
    "deepseek_v3",
    "gemma4",
    "falcon",
    "gpt_neo",
    "qwen3_next",
    "bloom",
]
NEW = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
TEXTS = zoo.prompts()[:3]
ONE = torch.tensor([TEXTS[1]])


def padded() -> dict[str, torch.Tensor]:
    """The prompts as a left-padded batch."""
    width = max(map(len, TEXTS))
    return {
        "input_ids": torch.tensor([[0] * (width - len(t)) + t for t in TEXTS]),
        "attention_mask": torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in TEXTS]),
    }


def continued(model: Any) -> torch.Tensor:
    """A second turn on the cache that the first one returned."""
    first = model.generate(ONE, do_sample=False, return_dict_in_generate=True, **NEW)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
    return model.generate(ids, past_key_values=first.past_key_values, do_sample=False, **NEW)


MODES: dict[str, Callable[[Any], torch.Tensor]] = {
    "greedy": lambda m: m.generate(ONE, do_sample=False, **NEW),
    "left_padded": lambda m: m.generate(**padded(), do_sample=False, **NEW),
    "sampled": lambda m: m.generate(ONE, do_sample=True, num_return_sequences=3, **NEW),
    "beams": lambda m: m.generate(
        **padded(), num_beams=3, num_return_sequences=2, do_sample=False, **NEW
    ),
    "prompt_lookup": lambda m: m.generate(
        ONE.repeat(1, 2), prompt_lookup_num_tokens=3, do_sample=False, **NEW
    ),
    "chunked": lambda m: m.generate(ONE, prefill_chunk_size=5, do_sample=False, **NEW),
    "continued": continued,
    "no_cache": lambda m: m.generate(ONE, use_cache=False, do_sample=False, **NEW),
    "guided": lambda m: m.generate(ONE, guidance_scale=1.5, do_sample=False, **NEW),
    "plain_forward": lambda m: m(ONE).logits.argmax(-1),
}
STATEFUL_REFUSES = {"prompt_lookup"}
"""What transformers itself refuses for models with recurrent state."""


def attach(model: Any, **options: Any) -> Attachment:
    return quire.attach(model, **{"memory": "32MiB", "block_tokens": 8, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_say_the_same(family: str) -> None:
    model = zoo.build(family)
    modes = {k: f for k, f in MODES.items() if not (model._is_stateful and k in STATEFUL_REFUSES)}
    want = {}
    for name, mode in modes.items():
        torch.manual_seed(3)
        want[name] = mode(model).tolist()
    with attach(model) as attached:
        for name, mode in modes.items():
            torch.manual_seed(3)
            assert mode(model).tolist() == want[name], name
        gc.collect()
        assert attached.bridge.store.usage().held_bytes == 0
    assert modes["greedy"](model).tolist() == want["greedy"]
    assert "_prepare_cache_for_generation" not in model.__dict__


def test_assistant_model() -> None:
    """Assisted decoding: drafts are cropped away; the assistant may be attached as well."""
    model, helper = zoo.build("llama"), zoo.build("qwen2")
    want = model.generate(ONE, do_sample=False, **NEW).tolist()
    with attach(model), attach(helper) as second:
        got = model.generate(ONE, assistant_model=helper, do_sample=False, **NEW).tolist()
        assert second.bridge.store.pools
    assert got == want


def test_cache_really_is_ours_and_grows_by_tokens_not_padding() -> None:
    with attach(zoo.build("llama")) as attached:
        out = attached.bridge.model.generate(
            **padded(), do_sample=False, return_dict_in_generate=True, **NEW
        )
        cache = out.past_key_values
        assert isinstance(cache, quire.KVCache)
        assert [t.length for t in cache.tables] == [len(t) + 11 for t in TEXTS]
        group = attached.bridge.layout.spec.groups[0]
        blocks = sum(-(-(len(t) + 11) // 8) for t in TEXTS)
        assert cache.held_bytes() == blocks * group.block_bytes


@torch.no_grad()
def test_attention_reads_the_blocks() -> None:
    """Spoil one cached key: the next token's logits change. A cache that is written and never read would not notice."""
    with attach(zoo.build("llama")) as attached:
        model, cache = attached.bridge.model, attached.cache()
        model(ONE[:, :-1], past_key_values=cache)
        twin = copy.deepcopy(cache)
        right = model(ONE[:, -1:], past_key_values=cache).logits
        group = attached.bridge.layout.spec.groups[0]
        first = torch.from_numpy(
            attached.bridge.store.units(group, twin.tables[0].chains[0].ids[:1])
        )
        view = attached.bridge.store.view(group, 0, "k")
        view[first, :, 3] = view[first, :, 3] + 1.0
        wrong = model(ONE[:, -1:], past_key_values=twin).logits
        assert float((right - wrong).abs().max()) > 1e-3


def test_deepcopy_is_a_fork() -> None:
    with attach(zoo.build("llama")) as attached:
        model, cache = attached.bridge.model, attached.cache()
        model(ONE, past_key_values=cache)
        before = cache.held_bytes()
        twins = [copy.deepcopy(cache) for _ in range(2)]
        nexts = [
            model(torch.tensor([[5 + i]]), past_key_values=c).logits for i, c in enumerate(twins)
        ]
        again = model(torch.tensor([[5]]), past_key_values=cache).logits
        assert torch.equal(again, nexts[0])
        assert not torch.equal(nexts[0], nexts[1])
        pool = next(iter(attached.bridge.store.pools.values()))
        assert pool.held * pool.block_bytes == before + 2 * pool.block_bytes
        del twins, cache
        gc.collect()
        assert pool.held == 0


def test_saved_cache_continues(tmp_path: Path) -> None:
    """A batch of unlike rows to files and back, in another attachment: the next tokens are the same."""
    with attach(zoo.build("mistral")) as attached:
        cache = attached.cache()
        attached.bridge.model.generate(**padded(), past_key_values=cache, do_sample=False, **NEW)
        cache.save(tmp_path / "saved")
        want = attached.bridge.model(torch.tensor([[3]] * 3), past_key_values=cache).logits
    with attach(zoo.build("mistral")) as again:
        loaded = again.load(tmp_path / "saved")
        assert [t.length for t in loaded.tables] == [len(t) + 11 for t in TEXTS]
        got = again.bridge.model(torch.tensor([[3]] * 3), past_key_values=loaded).logits
        assert torch.equal(got, want)
    with (
        attach(zoo.build("mistral"), kv="bf16") as other,
        pytest.raises(quire.QuireError) as caught,
    ):
        other.load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


def test_memory_first_touched_in_inference_mode_can_be_written_outside() -> None:
    with attach(zoo.build("llama")) as attached:
        cache = attached.cache()
        with torch.inference_mode():
            attached.bridge.model(ONE, past_key_values=cache)
        with torch.no_grad():
            twin = copy.deepcopy(cache)
            a = attached.bridge.model(torch.tensor([[4]]), past_key_values=twin).logits
            b = attached.bridge.model(torch.tensor([[4]]), past_key_values=cache).logits
        assert torch.equal(a, b)


def test_streaming() -> None:
    """A streamer gets the tokens one after the other."""

    class Words:
        """A tokenizer as far as the streamer needs one."""

        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    model = zoo.build("llama")
    want = model.generate(ONE, do_sample=False, **NEW)[0, ONE.shape[1] :].tolist()
    with attach(model):
        streamer = TextIteratorStreamer(Words(), skip_prompt=True)  # type: ignore[arg-type]
        thread = threading.Thread(
            target=model.generate,
            args=(ONE,),
            kwargs={"streamer": streamer, "do_sample": False, **NEW},
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert [int(w) for w in text.split()] == want


def test_failed_forward_leaves_the_cache_as_it_was() -> None:
    with attach(zoo.build("llama")) as attached:
        model, cache = attached.bridge.model, attached.cache()
        model(ONE, past_key_values=cache)
        held = cache.held_bytes()

        def fail(*_: object) -> None:
            raise RuntimeError("out of luck")

        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            model(torch.tensor([[1] * 20]), past_key_values=cache)
        hook.remove()
        assert cache.tables[0].length == len(TEXTS[1])
        assert cache.held_bytes() == held
        fresh = attached.cache()
        model(ONE, past_key_values=fresh)
        a = model(torch.tensor([[9]]), past_key_values=cache).logits
        b = model(torch.tensor([[9]]), past_key_values=fresh).logits
        assert torch.equal(a, b)


def test_full_arena_is_one_clear_error() -> None:
    with attach(zoo.build("llama"), memory="300KiB") as attached:
        model = attached.bridge.model
        with pytest.raises(quire.CapacityError, match="no block of"):
            model.generate(ONE.repeat(1, 30), do_sample=False, **NEW)
        gc.collect()
        assert attached.bridge.store.usage().held_bytes == 0
        assert model.generate(ONE, do_sample=False, **NEW).shape[1] == ONE.shape[1] + 12
