"""What each layer of a model keeps, from a config: everything, a window, a chunk, a state, another layer's, nothing.

gemma-3     w w w w w f w w w w w f ...       jamba    s s s s f s s s ...       gemma3n   w w f ... =0 =0 =1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.errors import ConfigError
from quire.plan.fields import CHUNK, WINDOW, Fields

FULL, WINDOWED, CHUNKED, INDEXED = "full", "window", "chunk", "indexed"
STATE, NOTHING = "state", "nothing"

_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("full_attention", "attention", "global", "global_attention", "full"), (FULL,)),
    **dict.fromkeys(
        ("sliding_attention", "local", "local_attention", "sliding_window_attention"), (WINDOWED,)
    ),
    "chunked_attention": (CHUNKED,),
    **dict.fromkeys(("indexed_attention", "minimax_m3_sparse"), (INDEXED,)),
    **dict.fromkeys(
        ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "gated_deltanet"), (STATE,)
    ),
    **dict.fromkeys(("moe", "mlp", "dummy", "none"), (NOTHING,)),
    "hybrid": (FULL, STATE),
    "hybrid_sliding": (WINDOWED, STATE),
}
"""Names of layer types, as configs spell them, to what such a layer keeps."""

_PATTERN = {"M": (STATE,), "*": (FULL,), "-": (NOTHING,), "E": (NOTHING,)}
"""Nemotron-H's letters."""

_EVERY = {"gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "cohere2": 4, "gpt_oss": 2, "olmo3": 4}
"""Families in which every n-th layer is full and the others have a window, where the config lists no layers."""

_WINDOW_UNUSED = frozenset({"gpt_neo", "qwen", "jamba"})
"""Families that keep everything whatever their config says of a window: transformers hands the cache all of it."""

_MIXED = {
    **dict.fromkeys(("lfm2", "lfm2_moe", "granitemoehybrid", "minimax"), "layer_types"),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), "layer_types"),
    "jamba": "attn_layer_period",
    "bamba": "attn_layer_indices",
    "nemotron_h": "hybrid_override_pattern",
    "recurrent_gemma": "block_types",
    "kimi_linear": "linear_attn_config",
    "llama4_text": "attention_chunk_size",
}
"""Families whose layers are not alike, and the field that usually says which is which."""

_UNREAD = {"deepseek_v4": "attention over compressed blocks"}
"""Families whose cache is known to be something else."""


@dataclass(frozen=True)
class Kinds:
    """Per layer what it keeps, one or two of the constants above; and which layers read another's."""

    keeps: tuple[tuple[str, ...], ...]
    shared: dict[int, int]


def read_kinds(f: Fields, n_layers: int) -> Kinds:
    """What every layer keeps.

    Raises:
        ConfigError: a list of layers of another length, or a name in it that means nothing here.
    """
    if f.kind in _UNREAD:
        raise ConfigError(f"{f.name}: {_UNREAD[f.kind]} ({f.kind}) cannot be planned yet")
    keeps = (
        _listed(f, n_layers)
        or _attention_layers(f, n_layers)
        or _recurrent(f, n_layers)
        or _by_window(f, n_layers)
    )
    crossed = f.get("cross_attention_layers") or ()
    keeps = [(NOTHING,) if i in crossed else k for i, k in enumerate(keeps)]
    return Kinds(tuple(keeps), _shared(f, keeps))


# -- lists of layers ---------------------------------------------------------------------------------------------


def _listed(f: Fields, n: int) -> list[tuple[str, ...]] | None:
    pattern = f.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return _checked(f, "hybrid_override_pattern", list(pattern), n, _PATTERN)
    for name in ("layer_types", "layers_block_type", "attention_layers"):
        found = f.get(name)
        if isinstance(found, Sequence) and not isinstance(found, str):
            if name == "attention_layers" and f.kind in _WINDOW_UNUSED:
                return [(FULL,)] * n
            return _checked(f, name, found, n, _NAMES)
        if found is not None and name == "layer_types":
            raise ConfigError(f"{f.name}: layer_types must list a name per layer, not {found!r}")
    return None


def _checked(
    f: Fields, name: str, found: Sequence[Any], n: int, names: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, ...]]:
    if len(found) != n:
        raise ConfigError(
            f"{f.name}: {name} names {len(found)} layers and the model has {n}; one of the two is wrong"
        )
    unknown = sorted({str(x) for x in found if str(x) not in names})
    if unknown:
        raise ConfigError(
            f"{f.name}: {name} holds {', '.join(unknown)}, whose cache is not known; known: {', '.join(names)}"
        )
    return [names[str(x)] for x in found]


# -- attention among recurrent layers ----------------------------------------------------------------------------


def _attention_layers(f: Fields, n: int) -> list[tuple[str, ...]] | None:
    """Hybrids that say which layers attend."""
    picked = f.get("attn_layer_indices", "full_attn_idxs")
    section = f.get("linear_attn_config")
    if isinstance(section, dict) and section.get("full_attn_layers"):
        picked = [i - 1 for i in section["full_attn_layers"]]  # counted from one
    hybrid = f.get("hybrid_layer_ids")
    if hybrid is not None:
        return [(FULL, STATE) if i in hybrid else (STATE,) for i in range(n)]
    kinds = f.get("attn_type_list")
    if kinds is not None:
        return [(FULL,) if kind else (STATE,) for kind in kinds]
    if picked is not None:
        return [(FULL,) if i in picked else (STATE,) for i in range(n)]
    period = f.count("attn_layer_period")
    if period is not None:
        offset = f.get("attn_layer_offset")
        if offset is None:
            raise ConfigError(
                f"{f.name}: attn_layer_period is there and attn_layer_offset is missing"
            )
        return [(FULL,) if i % period == offset else (STATE,) for i in range(n)]
    every = f.count("full_attention_interval")
    if every is None and f.get("linear_num_value_heads") is not None:
        every = 4
        f.assume("layer_types is missing: every fourth layer attends, the others are recurrent")
    if every is None:
        return None
    return [(STATE,) if (i + 1) % every else (FULL,) for i in range(n)]


def _recurrent(f: Fields, n: int) -> list[tuple[str, ...]] | None:
    """Models that are recurrent throughout, and those that repeat a short list of blocks."""
    blocks = f.get("block_types")
    if blocks:
        names = {"recurrent": (STATE,), "attention": (WINDOWED,)}
        return [names[blocks[i % len(blocks)]] for i in range(n)]
    if f.kind in ("mamba", "mamba2", "falcon_mamba") or f.kind.startswith("rwkv"):
        return [(STATE,)] * n
    if f.kind == "falcon_h1":
        return [(FULL, STATE)] * n
    if f.kind in ("zamba", "zamba2"):
        raise ConfigError(
            f"{f.name}: which of its {n} layers attend is missing; add layers_block_type or hybrid_layer_ids"
        )
    return None


# -- windows and chunks ------------------------------------------------------------------------------------------


def _by_window(f: Fields, n: int) -> list[tuple[str, ...]]:
    """Attention throughout; windows and chunks by the rules of the families."""
    if f.count(*CHUNK) is not None:
        return _chunked(f, n)
    said = _MIXED.get(f.kind)
    if said is not None and said not in f.text:
        raise ConfigError(
            f"{f.name}: the layers of a {f.kind} are not alike, and {said}, which tells them apart, is missing; add it"
        )
    window = f.get(*WINDOW)
    if window is None or f.kind in _WINDOW_UNUSED:
        if f.kind in _EVERY and window is None:
            raise ConfigError(
                f"{f.name}: a {f.kind} has layers with a window, and sliding_window is missing"
            )
        return [(FULL,)] * n
    listed = f.get("sliding_window_indices")
    if listed is not None:
        return [(WINDOWED,) if x else (FULL,) for x in listed]
    pattern = f.get("sliding_window_pattern", "_sliding_window_pattern")
    if isinstance(pattern, str):  # EXAONE: "LLLG", repeated
        return [(WINDOWED,) if pattern[i % len(pattern)] == "L" else (FULL,) for i in range(n)]
    if pattern is None and f.kind in _EVERY:
        pattern = _EVERY[f.kind]
        f.assume(
            f"layer_types is missing: every {pattern}. layer is full, as is usual for {f.kind}"
        )
    if pattern is not None:
        return [(WINDOWED,) if (i + 1) % int(pattern) else (FULL,) for i in range(n)]
    if f.kind.startswith("qwen") or "use_sliding_window" in f.text:
        if not f.get("use_sliding_window"):
            return [(FULL,)] * n
        below = f.get("max_window_layers")
        if below is not None and not f.kind.startswith("qwen3_moe"):
            return [(WINDOWED,) if i >= below else (FULL,) for i in range(n)]
    return [(WINDOWED,)] * n


def _chunked(f: Fields, n: int) -> list[tuple[str, ...]]:
    """Llama 4: layers with rotary positions are chunked, those without see everything."""
    rope = f.get("no_rope_layers")  # 1: the layer has rotary positions
    if not rope:
        every = f.count("no_rope_layer_interval") or 4
        if f.kind == "llama4_text" and not rope and f.get("no_rope_layer_interval") is None:
            f.assume("no_rope_layers is missing: every fourth layer is full, the others chunked")
        elif f.kind != "llama4_text":
            return [(CHUNKED,)] * n
        rope = [(i + 1) % every for i in range(n)]
    return [(CHUNKED,) if x else (FULL,) for x in rope]


def _shared(f: Fields, keeps: Sequence[tuple[str, ...]]) -> dict[int, int]:
    """Layers that read the keys and values of an earlier one."""
    factor = f.count("cla_share_factor") if f.get("use_cla") else None
    if factor is not None:
        return {i: i // factor * factor for i in range(len(keeps)) if i % factor}
    last = f.get("num_kv_shared_layers") or 0
    if not last:
        return {}
    first = len(keeps) - last
    if first < 1:
        raise ConfigError(
            f"{f.name}: num_kv_shared_layers is {last} and the model has {len(keeps)}"
        )
    owners = {k: i for i, k in enumerate(keeps[:first])}
    missing = sorted({k[0] for k in keeps[first:] if k not in owners})
    if missing:
        raise ConfigError(
            f"{f.name}: num_kv_shared_layers leaves no {missing[0]} layer whose keys the last {last} could read"
        )
    return {i: owners[keeps[i]] for i in range(first, len(keeps))}
