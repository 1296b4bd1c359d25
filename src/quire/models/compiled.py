"""A decode step of the model as compiled code: torch.compile over the forward, with the cache's part left opaque.

    model.forward ── traced once ──> norms, rotations, activations: fused loops
                     quire::linear   a packed layer, by its place in the list   } operators that the compiler
                     quire::attend   writes a layer's new tokens, then attends  } calls and does not look into

While the compiler traces, `KVCache.update` hands keys and values on, `quire_attention` becomes
`quire::attend`, and packed layers become `quire::linear`; both operators find their `Forward` where eager code finds
it. One graph serves one token, another any larger number of them. Prompts stay eager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.errors import ConfigError, InvariantError
from quire.kernels import build
from quire.models.forward import CURRENT, Forward
from quire.models.prepack import TOLERANCE, is_packed
from quire.models.rope import Regimes

if TYPE_CHECKING:
    from quire.models.bridge import Bridge
    from quire.models.runner import ModelRunner

LIBRARY = torch.library.Library("quire", "FRAGMENT")
LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, int layer, float scale, float? softcap, Tensor? sinks, SymInt? window)"
    " -> Tensor"
)
LIBRARY.define("linear(Tensor x, int place, int outputs) -> Tensor")


def _current() -> Forward:
    now = CURRENT.get()
    if now is None:
        raise InvariantError("compiled code ran outside a forward")
    return now


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
) -> Tensor:
    """`q: [B, H_q, T, D]`, `k, v: [B, H_kv, T, D]` to `[B, T, H_q, D_v]`, contiguous."""
    now = _current()
    first, second = now.names[layer]
    now.write(layer, (first, second), k, v)
    out = now.attend(layer, q, scale=scale, softcap=softcap, sinks=sinks, window=window)
    return out.contiguous()


def _attend_shape(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[3])


def _linear(x: Tensor, place: int, outputs: int) -> Tensor:
    return _current().linears[place](x)


def _linear_shape(x: Tensor, place: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


for _name, _run, _shape in (("attend", _attend, _attend_shape), ("linear", _linear, _linear_shape)):
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    LIBRARY._register_fake(_name, _shape)


def check_compile() -> None:
    """Raises ConfigError where torch.compile has no compiler to call."""
    try:
        build.compiler()
    except build.BuildError as error:
        raise ConfigError(f"compile: {error}; leave it out, or install one") from error


class Compiled:
    """A model's forward, compiled for decode steps. Undone by `restore`."""

    def __init__(self, bridge: Bridge) -> None:
        reason = _unserved(bridge)
        if reason is not None:
            raise ConfigError(f"compile: {reason}; leave it out")
        check_compile()
        self._undo: list[Callable[[], None]] = []
        self.linears: list[Callable[[Tensor], Tensor]] = []
        """Packed layers by their place."""
        for layer in bridge.model.modules():  # packed by this bridge, or by whose twin the model is
            if type(layer) is torch.nn.Linear and is_packed(layer.weight):
                self._open(layer)
        for module in bridge.model.modules():
            if hasattr(module, "layer_idx"):
                object.__setattr__(module, "quire_compiled", True)
                self._undo.append(partial(object.__delattr__, module, "quire_compiled"))
        self.model = torch.compile(bridge.model, fullgraph=True)
        self.mask = torch.zeros(1, 1, 1, 1)
        """Four dimensions: transformers takes it as it is and makes none. Nobody reads it."""

    def _open(self, layer: Any) -> None:
        """Makes a packed layer one operator, in compiled code."""
        eager, place, outputs = layer.forward, len(self.linears), layer.out_features
        self.linears.append(eager)

        def forward(input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name
            if torch.compiler.is_compiling():
                out: Tensor = torch.ops.quire.linear(input, place, outputs)
                return out
            made: Tensor = eager(input)
            return made

        object.__setattr__(layer, "forward", forward)
        self._undo.append(partial(object.__setattr__, layer, "forward", eager))

    def restore(self) -> None:
        """Gives packed layers their eager code back. Idempotent."""
        while self._undo:
            self._undo.pop()()


def _unserved(bridge: Bridge) -> str | None:
    """Why a model is not compiled, told before anything is tried."""
    modules = list(bridge.model.modules())
    if bridge.device.type != "cpu":
        return f"it is for CPUs, and the model is on {bridge.device}"
    if bridge.way != "packed" or bridge.has_state or bridge.shape.shared:
        return "it is for models whose every layer has attention of its own, joined the packed way"
    if any("quire_absorbed" in vars(m) for m in modules):
        return "it does not go with latent attention"
    if any(hasattr(m, "base_layer") for m in modules):
        return "it does not go with adapters"
    if any(getattr(m, "attn_temperature_tuning", False) for m in modules):
        return "this model scales queries by their positions, which compiled code does not see"
    if Regimes(bridge.model).kind != "fixed":
        return "this model's rotations change with the length of the text"
    return None


@dataclass
class _Share:
    """An item of the comparison."""

    table: Any
    tokens: Sequence[int]
    start: int
    stop: int
    logits: int


def compile_runner(runner: ModelRunner) -> None:
    """Compiles a runner's decode steps, for one sequence and for several, and compares them with the eager ones.

    Raises:
        ConfigError: there is no compiler, the model is not served, its code cannot be compiled, or results differ.

    Cost: two compilations, half a minute to minutes each; torch keeps them on disk for the next time.
    """
    want = _decode(runner)
    bridge = runner.bridge
    compiled = bridge.compiled = Compiled(bridge)
    bridge.patches.also(compiled.restore)
    try:
        got = _decode(runner)
    except Exception as error:  # whatever the compiler or a model's code raises
        text = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"compile: this model's code cannot be compiled ({type(error).__name__}: {text}); leave it out"
        ) from error
    worst = max(
        float((a - b).abs().max() / b.std().clamp_min(1e-9)) for a, b in zip(got, want, strict=True)
    )
    if not worst <= TOLERANCE.get(bridge.model.dtype, 0.2):
        raise ConfigError(
            f"compile: logits differ by {worst:.2g} standard deviations; leave it out"
        )


def _decode(runner: ModelRunner) -> list[Tensor]:
    """Logits of a decode step of one sequence, of two, and of three, after short prompts."""
    prompts = [[3, 5, 8, 2], [7, 1], [4, 4, 9]]
    tables = [runner.open() for _ in prompts]
    out = []
    try:
        for t, p in zip(tables, prompts, strict=True):
            t.append(len(p))
            runner.forward([_Share(t, p, 0, len(p), 1)])
            t.commit()
        for n in range(1, len(prompts) + 1):
            items = []
            for t, p in zip(tables[:n], prompts, strict=False):
                length = t.length
                t.append(1)
                items.append(_Share(t, [*p, *[6] * n], length, length + 1, 1))
            out.append(runner.forward(items))
            for t in tables[:n]:
                t.commit()
    finally:
        for t in tables:
            t.release()
    return out
