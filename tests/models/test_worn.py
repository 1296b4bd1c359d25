"""`generate()` with adapters and prefixes found: whatever is on, the text is the one that it gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import quire
import zoo
from quire.errors import ConfigError
from quire.models.sharing import shorten

peft = pytest.importorskip("peft", reason="adapters need the peft package")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*merge:UserWarning"),
]

IDS = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj", "down_proj"]


def carrying() -> Any:
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(4)
    model = peft.get_peft_model(zoo.build("llama"), config, adapter_name="ada")
    model.add_adapter("bob", config)
    return model.eval()


class Both:
    """The same model twice, one of them shares."""

    def __init__(self) -> None:
        self.off, self.on = carrying(), carrying()
        self.columns: list[int] = []
        options: dict[str, Any] = {"memory": "16MiB", "block_tokens": 8, "attention": "reference"}
        self.attached = [
            quire.attach(self.off, **options),
            quire.attach(self.on, share="prefix", **options),
        ]
        self.on.get_input_embeddings().register_forward_hook(
            lambda m, a, o: self.columns.append(a[0].shape[1])
        )

    def each(self, act: Any) -> None:
        for model in (self.off, self.on):
            act(model)

    def text(self, ids: torch.Tensor = IDS, **options: Any) -> list[list[int]]:
        """What both say; they must agree. `first` columns were computed by the one that shares."""
        self.columns.clear()
        given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
        want, got = (m.generate(input_ids=ids, **given).tolist() for m in (self.off, self.on))
        assert want == got
        return got  # type: ignore[no-any-return]

    @property
    def first(self) -> int:
        return self.columns[0]


@pytest.fixture
def both() -> Iterator[Both]:
    made = Both()
    yield made
    for attached in made.attached:
        attached.detach()


def test_what_is_active_is_found_and_nothing_else(both: Both) -> None:
    said = {}
    for who in ("ada", "bob", ["ada", "bob"], None):
        off = who is None
        if not off:
            both.each(lambda m, who=who: m.base_model.set_adapter(who))
        with (
            both.off.disable_adapter() if off else nullcontext(),
            both.on.disable_adapter() if off else nullcontext(),
        ):
            said[str(who)] = both.text()
            assert both.first == 40
            both.text()
            assert both.first == 1
    assert len({str(x) for x in said.values()}) == 4
    both.each(lambda m: m.set_adapter("ada"))
    assert both.text() == said["ada"]
    assert both.first == 1


@pytest.mark.parametrize("through", ["version", "data"])
def test_other_weights_have_other_names(both: Both, through: str) -> None:
    before = both.text()

    def touch(model: Any) -> None:
        p = next(p for n, p in model.named_parameters() if "lora_B.ada" in n)
        with torch.no_grad():
            (p.data if through == "data" else p).mul_(-2.0)

    both.each(touch)
    assert both.text() != before
    assert both.first == 40
    both.text()
    assert both.first == 1


def test_scale_and_merges_have_other_names(both: Both) -> None:
    both.text()

    def scale(model: Any) -> None:
        for m in model.modules():
            if isinstance(getattr(m, "scaling", None), dict):
                m.scaling["ada"] *= 3.0

    both.each(scale)
    both.text()
    assert both.first == 40
    both.each(lambda m: m.merge_adapter(["ada"]))
    both.text()
    assert both.first == 40
    both.text()
    assert both.first == 1
    both.each(lambda m: m.unmerge_adapter())
    both.text()


def test_rows_with_adapters_of_their_own_share_nothing(both: Both) -> None:
    both.text()
    cached = both.attached[1].bridge.store.usage().cached_bytes
    for _ in range(2):
        both.text(IDS.expand(2, -1), adapter_names=["bob", "ada"])
        assert both.first == 40
    assert both.attached[1].bridge.store.usage().cached_bytes == cached
    both.text()
    assert both.first == 1


def test_a_switch_within_a_text_ends_the_sharing() -> None:
    model = carrying()
    with quire.attach(model, share="prefix", memory="16MiB", block_tokens=8) as attached:
        cache = attached.cache()
        cache.wear(attached.bridge.worn)
        shorten(cache, {"input_ids": IDS})
        shorten(cache, {"input_ids": IDS[:, :1]})
        assert cache.shares
        assert cache.tables[0].path is not None
        model.base_model.set_adapter("bob")
        shorten(cache, {"input_ids": IDS[:, :1]})
        assert not cache.shares
        assert cache.tables[0].path is None


def test_adapters_that_add_prompts_are_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(zoo.build("llama"), config).eval()
    with pytest.raises(ConfigError, match="PROMPT_TUNING"):
        quire.attach(model, share="prefix", memory="16MiB")
    quire.attach(model, memory="16MiB").detach()


def test_a_text_that_began_as_embeddings_shares_nothing() -> None:
    model = zoo.build("llama")
    with quire.attach(model, share="prefix", memory="16MiB", block_tokens=8) as attached:
        embedded = model.get_input_embeddings()(IDS)
        model.generate(inputs_embeds=embedded, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert attached.bridge.store.usage().cached_bytes == 0
