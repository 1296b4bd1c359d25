"""The state of recurrent layers, from a config: what one sequence keeps, however long it is.

State and convolution have the shapes that transformers hands to its cache; the state is float32 whatever the model
computes in, the convolution's inputs are the model's dtype.
"""

from __future__ import annotations

from quire.errors import ConfigError
from quire.plan.fields import HIDDEN, Fields
from quire.spec import Field

STATE_DTYPE = "float32"


def state_fields(f: Fields, dtype: str) -> tuple[Field, ...]:
    """What a recurrent layer stores per sequence.

    Raises:
        ConfigError: no known recurrence can be read from the config.
    """
    for read in (_gated_delta, _kimi_delta, _short_conv, _rg_lru, _mamba2, _mamba1, _rwkv):
        found = read(f)
        if found is not None:
            conv, state = found
            fields = [Field("conv0", conv, dtype, "block")] if conv else []
            if state:
                fields.append(Field("rec0", state, STATE_DTYPE, "block"))
            return tuple(fields)
    raise ConfigError(
        f"{f.name}: the size of the recurrent state of this {f.kind} cannot be read from its config; known are the "
        "fields of Mamba, Mamba-2, gated delta rules, RG-LRU, short convolutions and RWKV-5"
    )


_Shapes = tuple[tuple[int, ...], tuple[int, ...]] | None


def _gated_delta(f: Fields) -> _Shapes:
    """Qwen3-Next and its kin: a matrix per value head."""
    if f.get("linear_num_value_heads") is None:
        return None
    v_heads, v_dim = f.need("value heads", "linear_num_value_heads"), _v_dim(f)
    k_heads = f.need("key heads of linear layers", "linear_num_key_heads")
    k_dim = f.need("their width", "linear_key_head_dim")
    kernel = f.need("the convolution's length", "linear_conv_kernel_dim")
    return (2 * k_heads * k_dim + v_heads * v_dim, kernel), (v_heads, k_dim, v_dim)


def _v_dim(f: Fields) -> int:
    return f.need("the width of value heads", "linear_value_head_dim")


def _kimi_delta(f: Fields) -> _Shapes:
    """Kimi Linear: as many key heads as value heads, sometimes in a section of its own."""
    section = f.get("linear_attn_config")
    flat = f.get("linear_num_heads") is not None
    if not isinstance(section, dict) and not flat:
        return None
    part = f if flat else Fields({"model_type": f.kind, **section}, f.name)
    heads = part.need("its linear heads", "linear_num_heads", "num_heads")
    dim = part.need("their width", "linear_head_dim", "head_dim")
    kernel = part.need(
        "the convolution's length", "linear_conv_kernel_dim", "short_conv_kernel_size"
    )
    return (3 * heads * dim, kernel), (heads, dim, dim)


def _short_conv(f: Fields) -> _Shapes:
    """LFM2: the last inputs of a short convolution and nothing else."""
    kernel = f.count("conv_L_cache")
    return None if kernel is None else ((f.need("hidden size", *HIDDEN), kernel), ())


def _rg_lru(f: Fields) -> _Shapes:
    """Griffin and RecurrentGemma: a vector, and the inputs of a convolution that its newest one need not join."""
    if "conv1d_width" not in f.text:
        return None
    width = f.count("lru_width") or f.need("hidden size", *HIDDEN)
    kernel = f.need("the convolution's length", "conv1d_width")
    return (width, kernel - 1), (width,)


def _mamba2(f: Fields) -> _Shapes:
    """Mamba-2: a matrix per head; B and C pass the convolution, too."""
    heads = f.count("mamba_n_heads", "n_mamba_heads", "mamba_num_heads")
    own = f.kind == "mamba2"
    heads = heads or (f.count("num_heads") if own else None)
    if f.kind == "zamba" or (heads is None and f.kind != "zamba2"):
        return None
    state = f.need("state size", "mamba_d_state", "ssm_state_size", "state_size")
    kernel = f.need("the convolution's length", "mamba_d_conv", "conv_kernel")
    groups = f.count("mamba_n_groups", "mamba_ngroups", "n_groups") or 1
    names = ("mamba_d_head", "mamba_headdim", "mamba_head_dim", *(("head_dim",) if own else ()))
    dim = f.get(*names)
    if heads is None or not isinstance(dim, int):
        inner = _inner(f)
        heads = heads or 1
        if inner % heads:
            raise ConfigError(f"{f.name}: {heads} heads do not divide Mamba's {inner} channels")
        dim = inner // heads
    return (heads * dim + 2 * groups * state, kernel), (heads, dim, state)


def _mamba1(f: Fields) -> _Shapes:
    """Mamba: a vector of states per channel; Zamba stores it by head."""
    state = f.count("mamba_d_state", "state_size")
    if state is None:
        return None
    kernel = f.need("the convolution's length", "mamba_d_conv", "conv_kernel")
    own = f.count("intermediate_size") if f.kind in ("mamba", "falcon_mamba") else None
    inner = own or _inner(f)
    heads = f.count("n_mamba_heads") if f.kind == "zamba" else None
    return (inner, kernel), ((heads, inner // heads, state) if heads else (inner, state))


def _rwkv(f: Fields) -> _Shapes:
    """RWKV-5: a square per head, and the last input of both halves of a layer."""
    size = f.count("head_size") if f.kind.startswith("rwkv5") else None
    if size is None:
        return None
    hidden = f.need("hidden size", *HIDDEN)
    heads = (f.count("attention_hidden_size") or hidden) // size
    return (hidden, 2), (heads, size, size)


def _inner(f: Fields) -> int:
    """Channels inside a Mamba mixer: `expand` times the hidden size."""
    expand = f.get("mamba_expand", "expand")
    if expand is None:
        f.assume("mamba_expand is missing: 2, the usual value, is assumed")
        expand = 2
    return int(expand * f.need("hidden size", *HIDDEN))
