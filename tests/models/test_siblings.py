"""Layers that share an input: one call of the kernel for all, the bits of a call each, and no trace of it elsewhere."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import quire
import zoo
from models.driving import engine_texts, runner_for
from quire.kernels import native
from quire.models import prepack as packing
from quire.models.prepack import Prepacked, prepack
from quire.models.siblings import MISSES, join, siblings, watched

needs_siblings = pytest.mark.skipif(
    native.load() is None
    or (torch.ops.mkldnn._is_mkldnn_bf16_supported() and not packing._our_rows()),
    reason="our kernel multiplies no layers here",
)
IDS = torch.tensor([[5, 9, 11, 3, 77]])


class Counter:
    """Counts the kernel's calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        library = native.load()
        assert library is not None
        run = library.linear

        def counted(args: Any) -> None:
            self.n += 1
            run(args)

        monkeypatch.setattr(library, "linear", counted)


def llama() -> Any:
    return zoo.build("llama").bfloat16()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@needs_siblings
@pytest.mark.parametrize("weights", ["prepacked", "int8"])
def test_one_call_for_those_that_share_an_input(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch)
    model = llama()
    packed = prepack(model, weights)
    assert packed is not None
    layers = len(model.model.layers)
    counter.n = 0
    joined = logits(model)
    assert counter.n == 4 * layers + 1  # q, k, v together; gate, up together; the head
    packed.part()
    counter.n = 0
    assert torch.equal(logits(model), joined)
    assert counter.n == 7 * layers + 1
    packed.join()
    packed.join()  # once is enough
    counter.n = 0
    assert torch.equal(logits(model), joined)
    assert counter.n == 4 * layers + 1
    packed.restore()
    assert all("forward" not in vars(m) for m in model.modules())


@needs_siblings
def test_engine_and_generate_make_the_same_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    runner = runner_for(model)
    assert runner.weights is not None
    texts = engine_texts(runner, zoo.prompts()[:3])
    runner.weights.part()
    assert engine_texts(runner, zoo.prompts()[:3]) == texts
    runner.close()
    counter = Counter(monkeypatch)
    with quire.attach(model, memory="32MiB", weights="prepacked") as attached:
        counter.n = 0
        out = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert counter.n == 4 * (4 * len(model.model.layers) + 1)
        attached.bridge.weights.part()
        assert torch.equal(out, model.generate(IDS, max_new_tokens=4, do_sample=False))


@needs_siblings
def test_many_rows_and_gradients_are_each_layers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("there oneDNN multiplies many rows")
    counter = Counter(monkeypatch)
    model = llama()
    prepack(model, "prepacked")
    counter.n = 0
    many = torch.arange(packing.TOGETHER_ROWS.stop)[None] % 100
    logits(model, many)
    assert counter.n == 7 * len(model.model.layers) + 1
    counter.n = 0
    logits(model, many[:, :-1])
    assert counter.n == 4 * len(model.model.layers) + 1
    counter.n = 0
    assert model(input_ids=IDS, use_cache=False).logits.requires_grad
    assert counter.n == 0


class Two(nn.Module):
    """Two layers, and what is done with their input between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(48, n, bias=n == 40).bfloat16() for n in (40, 24, 8))
        self.requires_grad_(requires_grad=False)
        self.dtype = torch.bfloat16
        self.between = lambda x: x
        self.twice = False

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        first = self.a(x)
        found = [first, self.b(self.between(x)), self.c(x)]
        return [*found, self.c(x)] if self.twice else found


def found_in(model: Two, x: torch.Tensor) -> list[list[nn.Linear]]:
    with watched([model.a, model.b, model.c]) as calls:
        model(x)
    return siblings(model, calls)


def test_siblings_are_seen_not_guessed() -> None:
    x = torch.randn(2, 48).bfloat16()
    model = Two()
    assert found_in(model, x) == [[model.a, model.b, model.c]]
    model.between = lambda x: x.clone()
    assert found_in(model, x) == [[model.a, model.c]]
    model.between = lambda x: x.mul_(2)
    assert found_in(model, x) == []
    model.between, model.twice = (lambda x: x), True
    assert found_in(model, x) == [[model.a, model.b]]
    deeper = nn.ModuleList([model, nn.Linear(48, 3).bfloat16()])
    with watched([model.a, deeper[1]]) as calls:
        model.a(x), deeper[1](x)
    assert siblings(deeper, calls) == []  # of different modules
    assert not any(m._forward_pre_hooks for m in deeper.modules())


def joined_two() -> tuple[Two, list[Any]]:
    """Two, with products that count what they were asked for."""
    model, asked = Two(), []

    def multiply(x: torch.Tensor) -> list[torch.Tensor]:
        asked.append(x)
        return [nn.functional.linear(x, m.weight, m.bias) for m in (model.a, model.b, model.c)]

    join([model.a, model.b, model.c], multiply, range(1, 5))
    return model, asked


@torch.no_grad()
def test_what_was_kept_is_for_the_very_tensor_as_it_was() -> None:
    model, asked = joined_two()
    x = torch.randn(2, 48).bfloat16()
    plain = Two()
    assert all(torch.equal(a, b) for a, b in zip(model(x), plain(x), strict=True))
    assert len(asked) == 1
    for between in (lambda x: x * 2, lambda x: x.mul_(2)):
        model.between = plain.between = between
        got, want = model(x.clone()), plain(x.clone())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@torch.no_grad()
def test_siblings_that_do_not_come_are_not_waited_for() -> None:
    model, asked = joined_two()
    plain = Two()
    for _ in range(MISSES + 3):
        x = torch.randn(2, 48).bfloat16()
        assert torch.equal(model.a(x), plain.a(x))
    assert len(asked) == MISSES + 1
    assert all(torch.equal(a, b) for a, b in zip(model(x), plain(x), strict=True))


@torch.no_grad()
def test_one_that_failed_once_goes_on() -> None:
    model, asked = joined_two()
    for _ in range(2 * MISSES):
        model.a(torch.randn(2, 48).bfloat16())  # a forward that ended here
        model(torch.randn(2, 48).bfloat16())
    assert len(asked) == 4 * MISSES


@needs_siblings
@torch.no_grad()
def test_a_layer_that_its_owner_replaced_is_not_missed() -> None:
    model = llama()
    prepack(model, "prepacked")
    want = logits(model)
    attention = model.model.layers[0].self_attn
    old = attention.k_proj
    attention.k_proj = nn.Linear(old.in_features, old.out_features, bias=False).bfloat16()
    packed = old.weight
    attention.k_proj.weight.copy_(packed.to_dense() if packed.is_mkldnn else packed.plain())
    del old
    for _ in range(MISSES + 2):
        assert float((logits(model) - want).abs().max() / want.std()) < 0.1


@needs_siblings
def test_threads_do_not_take_each_others_products() -> None:
    model = llama()
    prepack(model, "prepacked")
    ids = [IDS + i for i in range(4)]
    want = [logits(model, x) for x in ids]
    wrong: list[int] = []

    def run(i: int) -> None:
        torch.set_num_threads(1)
        wrong.extend(i for _ in range(20) if not torch.equal(logits(model, ids[i]), want[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@needs_siblings
def test_adapters_over_packed_siblings() -> None:
    """Put on after packing, and taken off: the layers below go on as they were."""
    peft = pytest.importorskip("peft", reason="adapters need the peft package")
    plain, model = llama(), llama()
    bare = logits(plain)
    packed = Prepacked(model)
    assert packed.pack() is None
    found = []
    for m in (plain, model):
        torch.manual_seed(1)
        targets = ["q_proj", "v_proj", "up_proj"]
        m.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        with_it = logits(m.eval())
        m.disable_adapters()
        found.append((with_it, logits(m)))
    (want, _), (got, without) = found
    room = 0.1 * bare.std()
    assert (got - want).abs().max() < room < (want - bare).abs().max()
    assert (without - bare).abs().max() < room
