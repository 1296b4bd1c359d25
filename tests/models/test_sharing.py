"""`generate()` with prefixes found: the same text, and less computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import quire
import zoo
from quire.errors import ConfigError
from quire.models.sharing import AdapterDigests, shorten

G = torch.Generator().manual_seed(11)
LONG = torch.randint(3, 90, (1, 70), generator=G)


class Watched:
    """A model with `share`, counting the columns that its embedding sees."""

    def __init__(self, name: str, share: str, kv: str, block_tokens: int = 16) -> None:
        self.model = zoo.build(name)
        self.model.generation_config.pad_token_id = 0
        self.columns: list[int] = []
        self.attached = quire.attach(
            self.model,
            kv=kv,
            share=share,
            memory="32MiB",
            block_tokens=block_tokens,
            attention="reference",
        )
        embedding = self.model.get_input_embeddings()
        embedding.register_forward_hook(lambda m, a, o: self.columns.append(a[0].shape[1]))

    def text(self, ids: torch.Tensor, **options: Any) -> list[list[int]]:
        torch.manual_seed(2)
        self.columns.clear()
        given = {"max_new_tokens": 12, "do_sample": False, **options}
        out: list[list[int]] = self.model.generate(ids, **given).tolist()
        return out


@pytest.fixture(params=["fp32", "int8"])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Watched, Watched]]:
    pair = Watched("llama", "off", request.param), Watched("llama", "prefix", request.param)
    yield pair
    for side in pair:
        side.attached.detach()


def test_a_second_call_computes_what_is_new(both: tuple[Watched, Watched]) -> None:
    off, on = both
    assert on.text(LONG) == off.text(LONG)
    assert on.columns[0] == 70
    again = on.text(LONG)
    assert again == off.text(LONG)
    assert on.columns[0] <= 6  # 64 in whole blocks; with a plain codec all but the last
    assert off.columns[0] == 70
    turn = torch.cat([torch.tensor(again), LONG[:, :9]], 1)
    assert on.text(turn) == off.text(turn)
    assert on.columns[0] <= 9 + 12 + 4  # generated text is found, too
    assert on.attached.bridge.store.usage().held_bytes == 0


def test_batches_padded_on_the_left(both: tuple[Watched, Watched]) -> None:
    off, on = both
    on.text(LONG)
    short = torch.cat([torch.zeros(1, 20, dtype=torch.int64), LONG[:, :50]], 1)
    ids = torch.cat([LONG, short])
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    for _ in range(2):
        assert on.text(ids, attention_mask=mask) == off.text(ids, attention_mask=mask)
    assert on.columns[0] < 70
    swapped, turned = ids.flip(0), mask.flip(0)
    assert on.text(swapped, attention_mask=turned) == off.text(swapped, attention_mask=turned)


def test_beams_and_samples(both: tuple[Watched, Watched]) -> None:
    off, on = both
    for _ in range(2):
        assert on.text(LONG, num_beams=3) == off.text(LONG, num_beams=3)
        options = {"do_sample": True, "num_return_sequences": 3, "temperature": 1.2}
        assert on.text(LONG, **options) == off.text(LONG, **options)
    assert on.columns[0] < 70
    assert on.attached.bridge.store.usage().held_bytes == 0


def test_what_shares_nothing(both: tuple[Watched, Watched]) -> None:
    """A cache that is handed in is private; so is assisted decoding, and a prompt padded on the right is whole."""
    off, on = both
    assert on.text(LONG, past_key_values=on.attached.cache()) == off.text(LONG)
    assert on.attached.bridge.store.usage().cached_bytes == 0
    on.text(LONG)
    assert on.text(LONG, prompt_lookup_num_tokens=3) == off.text(LONG, prompt_lookup_num_tokens=3)
    mask = torch.ones_like(LONG)
    mask[0, 40:45] = 0
    assert on.text(LONG, attention_mask=mask) == off.text(LONG, attention_mask=mask)
    assert on.columns[0] == 70


HYBRID = torch.randint(3, 90, (1, 300), generator=G)


@pytest.mark.parametrize(
    "name",
    [n if n == "lfm2" else pytest.param(n, marks=pytest.mark.slow) for n in zoo.names("rows")],
)
def test_recurrent_models_go_on_from_a_state(name: str) -> None:
    """Chunked ones from the last whole chunk, Mamba-1 kinds token by token behind it; batches, beams, samples."""
    off, on = Watched(name, "off", "auto"), Watched(name, "prefix", "auto")
    chunked = zoo.ZOO[name].chunked
    text = on.text(HYBRID)
    assert text == off.text(HYBRID)
    assert sum(on.columns) == 300 + 11
    assert on.columns[:2] == ([288, 12] if chunked else [288, 1])
    assert on.text(HYBRID) == text
    assert sum(on.columns) == 12 + 11
    turn = torch.cat([torch.tensor(text), HYBRID[:, :5]], 1)
    assert on.text(turn) == off.text(turn)
    assert sum(on.columns) == 317 - 304 + 11  # generated tokens are found, too
    for pad in (16,) if name == "lfm2" else (16, 20):
        row = torch.cat([torch.zeros(1, pad, dtype=torch.int64), HYBRID[:, : 300 - pad]], 1)
        mask = torch.ones(2, 300, dtype=torch.int64)
        mask[1, :pad] = 0
        both = torch.cat([HYBRID, row])
        for _ in range(2):
            assert on.text(both, attention_mask=mask) == off.text(both, attention_mask=mask)
    assert on.text(HYBRID, num_beams=3) == off.text(HYBRID, num_beams=3)
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 1.2}
    assert on.text(HYBRID, **options) == off.text(HYBRID, **options)
    assert on.columns[0] == (12 if chunked else 1)
    assert on.attached.bridge.store.usage().held_bytes == 0
    for side in (off, on):
        side.attached.detach()


def test_longrope_shares_within_a_regime() -> None:
    off, on = (
        Watched("phi3_longrope", share, "auto", block_tokens=4) for share in ("off", "prefix")
    )
    for ids in (LONG[:, :13], LONG[:, :14], LONG[:, :16], LONG[:, :17]):  # they all grow past 16
        assert on.text(ids, max_new_tokens=5) == off.text(ids, max_new_tokens=5)
    assert on.columns[0] == 17
    on.text(LONG[:, :14], max_new_tokens=1)
    assert on.columns[0] == 1
    assert on.attached.bridge.store.usage().held_bytes == 0
    for side in (off, on):
        side.attached.detach()


def test_a_batch_of_both_regimes_shares_nothing_and_one_that_changes_stops() -> None:
    """The longest row's factors turn the keys of all; transformers itself leaves keys of both kinds in one cache."""
    model = zoo.build("phi3_longrope")
    with quire.attach(model, share="prefix", memory="32MiB", block_tokens=4) as attached:
        cache, mask = attached.cache(), torch.ones(2, 30, dtype=torch.int64)
        cache.shares, mask[1, :17] = True, 0
        shorten(cache, {"input_ids": LONG[:, :30].expand(2, -1), "attention_mask": mask})
        assert (cache.shares, cache.tables) == (False, [])
        cache.shares = True
        shorten(cache, {"input_ids": LONG[:, :13]})
        shorten(cache, {"input_ids": LONG[:, 13:16]})
        assert cache.tables[0].path is not None
        shorten(cache, {"input_ids": LONG[:, 16:17]})
        assert cache.tables[0].path is None


@pytest.mark.parametrize("name", ["llama_dynamic"])
def test_models_that_cannot_share_say_so(name: str) -> None:
    model = zoo.build(name)
    with pytest.raises(ConfigError, match="share='off'"):
        quire.attach(model, share="prefix", memory="32MiB")
    quire.attach(model, memory="32MiB").detach()


def test_an_adapter_of_other_weights_has_another_digest() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = torch.nn.ModuleDict(
                {"one": torch.nn.Linear(3, 2), "two": torch.nn.Linear(3, 2)}
            )

    digests = AdapterDigests(layer := Layer())
    first = digests("one")
    assert first == digests("one")
    assert first != digests("two")
    with torch.no_grad():
        layer.lora_A["one"].weight.add_(1)
    assert digests("one") != first
