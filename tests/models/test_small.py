"""Norms, rotations and gates of the kernels: what the model's own code computes, and only while they are asked to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from ctypes import byref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zoo
from quire.evaluate.decode import twin
from quire.kernels import native
from quire.kernels.native import Norm
from quire.models import small
from quire.models.open import open_runner
from quire.models.small import TURNS, Small

LIBRARY = native.load()
LEVELS = [
    x for x in range(1, 9) if LIBRARY is not None and (x == LIBRARY.isa or 1 < x < LIBRARY.isa)
]
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="the CPU kernels were not built here (no C++ compiler)"
)
IDS = torch.tensor([[5, 9, 11, 3, 77, 31, 2]])
levels = st.sampled_from(LEVELS or [0])


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    """Logits that a few roundings to the next number of bfloat16 move apart, and no more."""
    assert float((got - want).abs().max() / want.std()) < 0.1


def replaced(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if "forward" in vars(m)}


# -- the kernels -------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(0, 5),
    d=st.integers(1, 300),
    early=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    threads=st.sampled_from([1, 2]),
    isa=levels,
    seed=st.integers(0, 99),
)
def test_norms(
    rows: int, d: int, early: bool, offset: float, threads: int, isa: int, seed: int
) -> None:
    assert LIBRARY is not None
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, d, generator=random) * 10 ** (seed % 5 - 2)).bfloat16()
    w = torch.randn(d, generator=random).bfloat16()
    out = torch.full_like(x, 7.0)
    norm = Norm(w.data_ptr(), d, int(early), isa, 1e-5, offset)
    LIBRARY.norm(byref(norm), x.data_ptr(), out.data_ptr(), rows, threads)
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    scaled = scaled.bfloat16().float() if early else scaled
    want = (scaled * (w.float() + offset)).bfloat16()
    assert ((out.float() - want.float()).abs() <= 2**-6 * want.float().abs() + 1e-30).all()


@given(
    batch=st.integers(1, 3),
    shared=st.booleans(),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    tokens=st.integers(1, 6),
    half=st.integers(1, 40),
    isa=levels,
    seed=st.integers(0, 99),
)
def test_rotations_are_llamas_bit_for_bit(
    batch: int,
    shared: bool,
    heads: int,
    kv_heads: int,
    tokens: int,
    half: int,
    isa: int,
    seed: int,
) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    assert LIBRARY is not None
    random = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(batch, tokens, h, 2 * half, generator=random).bfloat16().transpose(1, 2)
        for h in (heads, kv_heads)
    )
    angles = torch.randn(1 if shared else batch, tokens, 2 * half, generator=random)
    given_ = q, k, angles.cos().bfloat16(), angles.sin().bfloat16()
    want = apply_rotary_pos_emb(*given_)
    for mine in (given_, (q.contiguous(), k, *given_[2:])):
        got = small._turned(LIBRARY, *mine, isa=isa)
        assert got is not None
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@given(n=st.integers(0, 300), threads=st.sampled_from([1, 2]), isa=levels, seed=st.integers(0, 99))
def test_gates(n: int, threads: int, isa: int, seed: int) -> None:
    assert LIBRARY is not None
    random = torch.Generator().manual_seed(seed)
    gate, up = (4 * torch.randn(n, generator=random).bfloat16() for _ in range(2))
    out = torch.full_like(gate, 7.0)
    LIBRARY.gated(gate.data_ptr(), up.data_ptr(), out.data_ptr(), n, threads, isa)
    want = nn.functional.silu(gate) * up
    assert ((out.float() - want.float()).abs() <= 2**-6 * want.float().abs() + 1e-30).all()


def test_many_rows_in_threads_and_numbers_that_are_none() -> None:
    assert LIBRARY is not None
    x = torch.randn(700, 130).bfloat16()
    x[3, 5], x[8, 9] = float("nan"), float("inf")
    w = torch.ones(130).bfloat16()
    outs = []
    for threads in (1, 2):
        out = torch.empty_like(x)
        norm = Norm(w.data_ptr(), 130, 1, 0, 1e-6, 0.0)
        LIBRARY.norm(byref(norm), x.data_ptr(), out.data_ptr(), 700, threads)
        outs.append(out)
    assert torch.equal(*(o.view(torch.int16) for o in outs))
    rows = set(range(700))
    assert {int(r) for r in outs[0].isnan().any(1).nonzero()} == {3, 8}
    assert outs[0][sorted(rows - {3, 8})].isfinite().all()
    for n in (5, 80):
        gate = torch.tensor([float("nan"), float("inf"), -300.0, 0.0, -0.0]).repeat(n // 5)
        gate, up = gate.bfloat16(), torch.ones(n).bfloat16()
        out = torch.empty_like(gate)
        LIBRARY.gated(gate.data_ptr(), up.data_ptr(), out.data_ptr(), n, 1)
        assert out[::5].isnan().all()
        assert (out[1::5] == float("inf")).all()
        assert all(out[i::5].abs().max() < 1e-30 for i in (2, 3, 4))


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Llama's module of code with its own rotation, as before any runner, which other tests leave open."""
    from transformers.models.llama import modeling_llama

    own = getattr(modeling_llama, TURNS)
    monkeypatch.setattr(modeling_llama, TURNS, getattr(own, "__quire_own__", own))
    monkeypatch.setattr(small._Rotary, "_users", {})
    monkeypatch.setattr(small._Rotary, "_own", {})
    return modeling_llama


# -- in a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("llama", {"model.norm", "model.layers.0.mlp", "model.layers.1.input_layernorm"}),
        ("qwen3", {"model.layers.0.self_attn.q_norm", "model.layers.0.mlp"}),
        ("gemma2", {"model.norm", "model.layers.0.post_feedforward_layernorm"}),
        ("olmo2", {"model.layers.0.self_attn.k_norm"}),
        ("gpt_oss", {"model.norm"}),
        ("gpt2", set()),
    ],
)
def test_a_model_computes_what_it_did(name: str, some: set[str]) -> None:
    model = zoo.build(name).bfloat16()
    want = model(IDS).logits
    lent = Small(model)
    lent.replace()
    assert some <= replaced(model)
    assert bool(lent.n_replaced) == bool(some)
    near(model(IDS).logits, want)
    lent.undo()
    assert not replaced(model)
    assert torch.equal(model(IDS).logits, want)
    lent.undo()  # again: nothing happens


def test_the_kernels_are_really_asked(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("norm", "rotary", "gated"):
        run = getattr(native.Library, name)

        def counted(*args: Any, name: str = name, run: Any = run) -> None:
            asked.append(name)
            run(*args)

        monkeypatch.setattr(native.Library, name, counted)
    model = zoo.build("llama").bfloat16()
    lent = Small(model)
    lent.replace()
    asked.clear()
    model(IDS)
    layers = model.config.num_hidden_layers
    assert asked.count("norm") == 2 * layers + 1
    assert (asked.count("rotary"), asked.count("gated")) == (layers, layers)
    asked.clear()
    lent.undo()
    model(IDS)
    assert not asked


def test_other_dtypes_gradients_and_a_changed_weight_go_to_the_models_own_code() -> None:
    model = zoo.build("llama")
    lent = Small(model)
    lent.replace()
    assert not replaced(model), "float32 is its own"
    lent.undo()
    model = zoo.build("llama").bfloat16()
    own = zoo.build("llama").bfloat16()
    lent = Small(model)
    lent.replace()
    with torch.enable_grad():
        for m in (model, own):
            m(input_ids=IDS, labels=IDS).loss.backward()
    a, b = (m.model.layers[0].input_layernorm.weight.grad for m in (model, own))
    assert torch.equal(a, b)
    for m in (model, own):
        m.model.norm.weight = nn.Parameter(torch.full_like(m.model.norm.weight, 2.0))
    near(model(IDS).logits, own(IDS).logits)
    model.model.layers[0].mlp.act_fn = own.model.layers[0].mlp.act_fn = nn.ReLU()
    lent.undo()
    assert torch.equal(model(IDS).logits, own(IDS).logits)


class Odd(nn.Module):
    """Calls itself a norm, and is another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24).bfloat16())
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().mean(-1, keepdim=True) * self.weight


class OddRMSNorm(Odd):
    pass


class OddMLP(nn.Module):
    """Has a gate's parts, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(24, 40).bfloat16() for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(40, 24).bfloat16(), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def test_what_only_looks_like_it_stays() -> None:
    odd = nn.ModuleList([OddRMSNorm(), OddMLP()])
    lent = Small(odd)
    lent.replace()
    assert not replaced(odd)
    assert lent.n_replaced == 0


def test_a_rotation_is_lent_as_long_as_anybody_needs_it(code: Any) -> None:
    models = [zoo.build("llama").bfloat16() for _ in range(2)]
    own = getattr(code, TURNS)
    lent = [Small(m) for m in models]
    for x in lent:
        x.replace()
    assert getattr(code, TURNS) is not own
    lent[0].undo()
    assert getattr(code, TURNS) is not own
    lent[1].undo()
    assert getattr(code, TURNS) is own


def test_runners_lend_and_take_back(code: Any) -> None:
    model = zoo.build("llama").bfloat16()
    own = getattr(code, TURNS)
    plain = open_runner(model, memory="32MiB", weights="plain")
    assert not replaced(model)
    plain.close()
    runner = open_runner(model, memory="32MiB")
    assert "model.norm" in replaced(model)
    assert getattr(code, TURNS) is not own
    runner.close()
    assert not replaced(model)
    assert getattr(code, TURNS) is own


def test_a_copy_calls_its_own_parts() -> None:
    """A twin over the same weights, and a copy with weights of its own."""
    model = zoo.build("llama").bfloat16()
    want = model(IDS).logits
    lent = Small(model)
    lent.replace()
    other, own = twin(model), copy.deepcopy(model)
    for m in (other, own):
        assert replaced(m) == replaced(model)
        seen: list[Any] = []
        m.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *a, seen=seen: seen.append(a))
        near(m(IDS).logits, want)
        assert len(seen) == 1
    assert own.model.norm.forward.weight is own.model.norm.weight
    assert other.model.norm.forward.weight is model.model.norm.weight
    assert own.float()(IDS).logits.dtype == torch.float32
    lent.undo()
    assert torch.equal(model(IDS).logits, want)
