"""What the bridge must refuse, with a reason, instead of answering wrongly."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch

import quire
import zoo
from models.driving import engine_texts, reference, runner_for
from quire.engine import Engine, SamplingParams
from quire.engine.runner import Item
from quire.errors import ConfigError, InvariantError, RequestError
from quire.models.forward import quire_attention, quire_mask
from quire.models.open import open_runner

REFUSED = [n for n, e in zoo.ZOO.items() if e.way == "refused"]
IDS = torch.tensor([zoo.prompts()[1]])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    model = zoo.build(name)
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match=r"\w{4,} \w+"):
        quire.attach(model, memory="32MiB")
    assert model.config._attn_implementation == before
    assert "_prepare_cache_for_generation" not in model.__dict__


def test_self_test_catches_a_model_that_changes_its_keys_after_the_cache() -> None:
    """DiffLlama and JetMoe rearrange K/V after `update`: packed is refused, dense serves them."""
    for name in ("diffllama", "jetmoe"):
        model = zoo.build(name)
        with pytest.raises(ConfigError, match="packed"):
            open_runner(model, memory="32MiB", way="packed")
        assert runner_for(model).bridge.way == "dense"


def test_self_test_catches_wrong_attention() -> None:
    """A model whose attention does something that its config does not say is not served packed."""
    model = zoo.build("llama")
    for layer in model.model.layers:
        original = layer.self_attn.forward

        def double(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            if self.config._attn_implementation in ("sdpa", "eager"):
                out, weights = _original(*args, **kwargs)
                return out * 1.5, weights
            assert ALL_ATTENTION_FUNCTIONS is not None
            return _original(*args, **kwargs)

        layer.self_attn.forward = MethodType(double, layer.self_attn)
    with pytest.raises(ConfigError, match="differs from the model's own attention"):
        open_runner(model, memory="32MiB", way="packed")


def test_unknown_tensor_argument_raises() -> None:
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ConfigError, match="position_bias"):
        quire_attention(torch.nn.Identity(), q, q, q, None, position_bias=torch.zeros(1))


def test_overlay_mask_raises() -> None:
    """Image blocks that see ahead of themselves (Gemma-3 multimodal) are refused inside a cached forward."""
    with quire.attach(zoo.build("gemma3_mm"), memory="32MiB") as attached:
        cache = attached.cache()
        types = torch.zeros_like(IDS)
        types[:, 3:9] = 1
        with pytest.raises(RequestError, match="see ahead"):
            attached.bridge.model(IDS, past_key_values=cache, token_type_ids=types)
        assert cache.tables[0].length == 0
    assert quire_mask is not None


def test_chunked_mamba1_raises() -> None:
    runner = runner_for(zoo.build("jamba"))
    assert not runner.chunked_prefill
    table = runner.open()
    table.append(8)
    tokens = IDS[0].tolist()
    runner.forward([Item(table, tokens, 0, 8, 0)])
    table.commit()
    table.append(4)
    with pytest.raises(InvariantError, match="Mamba-1"):
        runner.forward([Item(table, tokens, 8, 12, 1)])
    with (
        quire.attach(zoo.build("jamba"), memory="32MiB") as attached,
        pytest.raises(RequestError, match="Mamba-1"),
    ):
        attached.bridge.model.generate(IDS, prefill_chunk_size=5, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic"])
def test_rope_regimes_do_not_mix(name: str) -> None:
    """One long request must not turn short ones beside it."""
    texts = list(zoo.prompts(lengths=(5, 14, 7)))
    want = reference(name, texts, 20)
    assert engine_texts(runner_for(zoo.build(name)), texts, 20, budget=64) == want


def test_the_baseline_forgets_how_long_others_were() -> None:
    """Dynamic NTK keeps the longest forward in the module; without a cache each text is a function of itself, too."""
    texts = list(zoo.prompts(lengths=(40, 18)))
    alone = [
        engine_texts(open_runner(zoo.build("llama_dynamic"), kv="none"), [t], 8) for t in texts
    ]
    baseline = open_runner(zoo.build("llama_dynamic"), kv="none")
    assert [engine_texts(baseline, [t], 8) for t in texts] == alone


def test_a_rope_turn_without_room_preempts_and_nobody_is_lost() -> None:
    """Forked samples share their prompt until its RoPE turns; then each wants all of its own, more than there is."""
    params = SamplingParams(max_tokens=12, n=4, temperature=1.0, seed=3, ignore_eos=True)
    prompt, other = ([*t] for t in zoo.prompts(lengths=(14, 5)))
    want, short = None, reference("phi3_longrope", [tuple(other)], 12)
    for memory in ("32MiB", "300KiB"):
        engine = Engine(runner_for(zoo.build("phi3_longrope"), memory=memory, kv="fp32"))
        turned, beside = engine.generate(
            [prompt, other], [params, SamplingParams(max_tokens=12, ignore_eos=True)]
        )
        texts = [o.token_ids for o in turned.outputs]
        assert texts == (want or texts)
        want = texts
        assert beside.token_ids == list(short[0])
    assert engine.stats().scheduler.preemptions > 0


def test_restarted_ids_on_a_used_cache_raise() -> None:
    """transformers feeds all ids again when assisted decoding continues on a used cache; ours says so."""
    with quire.attach(zoo.build("llama"), memory="32MiB") as attached:
        model, cache = attached.bridge.model, attached.cache()
        model.generate(
            IDS, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        with pytest.raises(RequestError, match="already holds"):
            model.generate(
                IDS,
                past_key_values=cache,
                prompt_lookup_num_tokens=3,
                max_new_tokens=4,
                do_sample=False,
                pad_token_id=0,
            )


def test_attached_twice_is_refused() -> None:
    model = zoo.build("llama")
    with quire.attach(model, memory="32MiB"), pytest.raises(ConfigError, match="detach"):
        quire.attach(model, memory="32MiB")
    quire.attach(model, memory="32MiB").detach()


def test_wrong_batch_is_refused() -> None:
    with quire.attach(zoo.build("llama"), memory="32MiB") as attached:
        cache = attached.cache()
        attached.bridge.model(IDS, past_key_values=cache)
        with pytest.raises(RequestError, match="holds 1 sequences, the batch has 2"):
            attached.bridge.model(IDS.repeat(2, 1), past_key_values=cache)


def test_static_cache_is_refused() -> None:
    with (
        quire.attach(zoo.build("llama"), memory="32MiB") as attached,
        pytest.raises(ConfigError, match="cache_implementation"),
    ):
        attached.bridge.model.generate(
            IDS, cache_implementation="static", max_new_tokens=2, pad_token_id=0
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv": "int3"}, "unknown codec 'int3'; known: auto"),
        ({"kv": "bf16;skip_layers=99"}, "skip_layers must lie within"),
        ({"keep": "h3o"}, "unknown policy 'h3o'"),
        ({"memory": "8 parsec"}, "unknown unit"),
        ({"memory": 1.5}, "share must lie in"),
        ({"memory": 4096}, "too small for one request"),
        ({"attention": "magic"}, "unknown attention backend"),
        ({"way": "sideways"}, "unknown way"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], says: str) -> None:
    model = zoo.build("llama")
    with pytest.raises(quire.QuireError, match=says) as caught:
        quire.attach(model, **{"memory": "32MiB", **options})
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation != "quire"
