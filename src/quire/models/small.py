"""Small operations between a model's linear layers, each as one call of the kernels instead of two to twelve of torch.

    norm(x)                                 to float, square, mean, add, rsqrt, multiply, round, multiply
    apply_rotary_pos_emb(q, k, cos, sin)    twice: slice, slice, negate, join, multiply, multiply, add
    down(act(gate(x)) * up(x))              activate, multiply

At few rows what counts of them is the number of calls; at many, that each reads and writes all rows. Nothing is known
of a family: what a model's own code computes is compared on random numbers first, and stays where the kernel's differs.
Only bfloat16 on CPUs, where both round operation by operation; everything else goes to the model's own code, as do
gradients and whatever torch.compile traces.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from ctypes import byref
from itertools import product
from threading import Lock
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from quire.kernels import native
from quire.kernels.native import TURN, Library, Norm

__all__ = ["Small"]

TURNS = "apply_rotary_pos_emb"
"""What transformers' models call it, a function of the module that defines their attention."""

_BF16, _grad, _threads = torch.bfloat16, torch.is_grad_enabled, torch.get_num_threads
_SHARE = 0.995
"""Of numbers that must be equal bit for bit; the rest may be the next one in bfloat16. Sums add up in another order."""

Forward = Callable[..., Any]


class Small:
    """A model's norms, gates and rotations while the kernels compute them. Empty where none can be."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._undo: list[Callable[[], None]] = []

    @property
    def n_replaced(self) -> int:
        """Modules and functions that are replaced now."""
        return len(self._undo)

    @torch.no_grad()
    def replace(self) -> None:
        """Replaces what the kernels compute alike. Cost: a few small tensors for each kind of module."""
        library = native.load()
        if library is None:
            return
        for module in self._model.modules():
            if "forward" in vars(module):
                continue  # by its owner, or packed
            made = _norm(module, library) or _gate(module, library)
            if made is not None:
                object.__setattr__(module, "forward", made)
                self._undo.append(lambda m=module: object.__delattr__(m, "forward"))  # type: ignore[misc]
        for code in _codes(self._model):
            if _Rotary.served(code, library):
                self._undo.append(_Rotary.on(code, library))

    def undo(self) -> None:
        """Gives the model its own code back. Idempotent."""
        while self._undo:
            self._undo.pop()()


def _plain(*tensors: Tensor) -> bool:
    """Whether the kernels take these as they lie, and nobody wants gradients or a trace."""
    if is_compiling() or _grad():
        return False
    for x in tensors:  # noqa: SIM110 - a generator takes longer, and every layer asks some four times
        if x.dtype is not _BF16 or not x.is_cpu or not x.is_contiguous():
            return False
    return True


def _alike(got: Any, want: Any) -> bool:
    """Bit for bit, but for a few numbers that are next to each other."""
    if not isinstance(want, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        return False
    near = (got.float() - want.float()).abs() <= 2**-7 * want.float().abs() + 1e-30
    return bool(near.all()) and float((got == want).float().mean()) >= _SHARE


# -- norms ---------------------------------------------------------------------------------------------------------


def _norm(module: nn.Module, library: Library) -> Forward | None:
    """A forward of the kernel for a norm over its last dimension; None where the module is none that it serves."""
    if "RMSNorm" not in type(module).__name__ or [n for n, _ in module.named_parameters()] != [
        "weight"
    ]:
        return None
    weight = module.weight
    eps = next(
        (e for n in ("variance_epsilon", "eps", "epsilon") if (e := getattr(module, n, None))), None
    )
    if not (isinstance(weight, Tensor) and isinstance(eps, float) and weight.dim() == 1):
        return None
    if not _plain(weight):
        return None
    x = _numbers(16, len(weight)) * torch.logspace(-2, 2, 16)[:, None].bfloat16()
    own = module.forward
    want = _tried(own, x)
    for early, offset in product((True, False), (0.0, 1.0)):
        made = _Norm(module, weight, (eps, early, offset), own, library.norm)
        if want is not None and _alike(made(x), want):
            return made
    return None


class _Norm:
    """A norm's forward by the kernel. An object, for a copy of the model must call the copy's own parts."""

    __slots__ = ("at", "d", "module", "norm", "own", "run", "spec", "weight")

    def __init__(
        self,
        module: Any,
        weight: Tensor,
        spec: tuple[float, bool, float],
        own: Forward,
        run: Forward,
    ) -> None:
        eps, early, offset = spec
        self.module, self.weight, self.spec, self.own, self.run = module, weight, spec, own, run
        self.d, self.at = len(weight), weight.data_ptr()
        self.norm = byref(Norm(self.at, self.d, int(early), 0, eps, offset))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Norm:
        module, weight = deepcopy(self.module, memo), deepcopy(self.weight, memo)
        return _Norm(module, weight, self.spec, deepcopy(self.own, memo), self.run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or args[0].shape[-1] != self.d or not _plain(args[0]):
            return self.own(*args, **kwargs)
        x, weight = args[0], self.weight
        if self.module._parameters["weight"] is not weight or weight.data_ptr() != self.at:
            return self.own(x)  # somebody gave it another weight
        out = torch.empty_like(x)
        self.run(self.norm, x.data_ptr(), out.data_ptr(), x.numel() // self.d, _threads())
        return out


# -- gates ---------------------------------------------------------------------------------------------------------


def _gate(module: nn.Module, library: Library) -> Forward | None:
    """A forward for down(silu(gate(x)) * up(x)); None where the module is something else."""
    parts = dict(module.named_children())
    act = parts.pop("act_fn", None)
    if set(parts) != {"gate_proj", "up_proj", "down_proj"} or "SiLU" not in type(act).__name__:
        return None
    width = getattr(parts["gate_proj"], "in_features", None)
    if width is None or list(inspect.signature(module.forward).parameters) != ["x"]:
        return None
    own = module.forward
    made = _Gate(module, own, library.gated)
    x = _numbers(3, width)
    want = _tried(own, x)
    return made if want is not None and _alike(made(x), want) else None


class _Gate:
    """A gated feed-forward's forward; an object as `_Norm` is."""

    __slots__ = ("module", "own", "run")

    def __init__(self, module: Any, own: Forward, run: Forward) -> None:
        self.module, self.own, self.run = module, own, run

    def __deepcopy__(self, memo: dict[int, Any]) -> _Gate:
        return _Gate(deepcopy(self.module, memo), deepcopy(self.own, memo), self.run)

    def __call__(self, x: Tensor) -> Any:
        if not _plain(x):
            return self.own(x)
        module = self.module
        gate, up = module.gate_proj(x), module.up_proj(x)
        if not _plain(gate, up) or gate.shape != up.shape:
            return module.down_proj(module.act_fn(gate) * up)
        out = torch.empty_like(gate)
        self.run(gate.data_ptr(), up.data_ptr(), out.data_ptr(), out.numel(), _threads())
        return module.down_proj(out)


# -- rotations -----------------------------------------------------------------------------------------------------


class _Rotary:
    """The rotation of one module of code, which all its models call: replaced while any of them is."""

    _users: ClassVar[dict[ModuleType, int]] = {}
    _own: ClassVar[dict[ModuleType, Forward]] = {}
    _lock: ClassVar[Lock] = Lock()

    @classmethod
    def served(cls, code: ModuleType, library: Library) -> bool:
        """Whether the kernel turns what this code turns, to the same bits."""
        if code in cls._users:
            return True
        own = getattr(code, TURNS)
        names = list(inspect.signature(own).parameters)
        if names[:4] != ["q", "k", "cos", "sin"]:
            return False
        q, k = (_numbers(2, n, 5, 32) for n in (3, 2))
        angle = _numbers(2, 5, 32).float()
        given = q, k, angle.cos().bfloat16(), angle.sin().bfloat16()
        want = _tried(own, *given)
        got = _turned(library, *given)
        return (
            isinstance(want, tuple)
            and got is not None
            and all(_alike(a, b) and torch.equal(a, b) for a, b in zip(got, want, strict=True))
        )

    @classmethod
    def on(cls, code: ModuleType, library: Library) -> Callable[[], None]:
        """Replaces it, or counts one more user; returns what takes that back."""
        with cls._lock:
            users = cls._users.get(code, 0)
            cls._users[code] = users + 1
            if not users:
                own = cls._own[code] = getattr(code, TURNS)

                def rotary(*args: Any, **kwargs: Any) -> Any:
                    found = _turned(library, *args) if len(args) == 4 and not kwargs else None
                    return own(*args, **kwargs) if found is None else found

                rotary.__quire_own__ = own  # type: ignore[attr-defined]
                setattr(code, TURNS, rotary)
        return lambda: cls._off(code)

    @classmethod
    def _off(cls, code: ModuleType) -> None:
        with cls._lock:
            cls._users[code] -= 1
            if not cls._users[code]:
                del cls._users[code]
                own = cls._own.pop(code)
                if getattr(getattr(code, TURNS), "__quire_own__", None) is own:
                    setattr(code, TURNS, own)


def _turned(
    library: Library, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, isa: int = 0
) -> tuple[Tensor, Tensor] | None:
    """`q: [B, H_q, T, D]`, `k: [B, H_k, T, D]`, `cos, sin: [B or 1, T, D]`; None where these are not the kernel's.

    The results lie as `[B, T, H, D]`, as what a model makes of its projections does.
    """
    if not (_plain(cos, sin) and q.dim() == k.dim() == 4 and cos.dim() == 3):
        return None
    b, heads, t, d = q.shape
    some, others = cos.shape, k.shape
    if some[1:] != (t, d) or some[0] not in (1, b) or sin.shape != some:
        return None
    if others != (b, others[1], t, d) or d % 2 or not (b and t):
        return None
    if q.dtype is not _BF16 or k.dtype is not _BF16 or not (q.is_cpu and k.is_cpu):
        return None
    (qb, qh, qt, q1), (kb, kh, kt, k1) = q.stride(), k.stride()
    if q1 != 1 or k1 != 1:
        return None
    turned, too = q.new_empty(b, t, heads, d), k.new_empty(b, t, others[1], d)
    at = (
        q.data_ptr(),
        k.data_ptr(),
        turned.data_ptr(),
        too.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
    )
    strides = qb, kb, qt, kt, qh, kh
    sizes = heads, others[1], b, t, d, 0 if some[0] == 1 else t, torch.get_num_threads(), isa
    library.rotary(TURN.pack(*at, *strides, *sizes))
    return turned.transpose(1, 2), too.transpose(1, 2)


def _codes(model: nn.Module) -> Iterator[ModuleType]:
    """Modules of code that the model's own modules are defined in and that rotate."""
    seen = dict.fromkeys(type(m).__module__ for m in model.modules())
    for name in seen:
        code = sys.modules.get(name)
        if code is not None and callable(getattr(code, TURNS, None)):
            yield code


# -- trying --------------------------------------------------------------------------------------------------------


def _numbers(*shape: int) -> Tensor:
    """Random numbers, the same every time, that leave torch's own generator alone."""
    made = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=made).bfloat16()


def _tried(call: Forward, *given: Tensor) -> Any:
    """What a model's own code makes of it; None where it does not take it."""
    try:
        return call(*given)
    except Exception:  # noqa: BLE001 - anybody's code, asked what it may not be made for
        return None
