"""A zoo of tiny random models: one per family the bridge must serve, with transformers' answers.

Every entry is built from its configuration class alone (no download), in float32, seeded, with
weights scaled so that greedy text wanders over many tokens: a model that repeats one token cannot
show an error. Where the class allows it the head dimension is 64, the size kernels care about.

A *control* is a feature (window, softcap, sinks, chunk) whose removal must change the text;
`build(name, without=feature)` removes it from transformers' own model, same weights otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    import transformers

Way = Literal["packed", "rows", "patched", "dense", "refused"]
Tokens = list[int]

VOCAB = 199
WINDOW = 9
CHUNK = 8
NO_LIMIT = 4096
"""A window or chunk longer than any text here: the feature is there and does nothing."""


@dataclass(frozen=True)
class Entry:
    """One family of the zoo.

    Attributes:
        name: key in `ZOO`, the model type where there is one.
        builder: makes the model; keyword arguments override the configuration.
        way: how the bridge is expected to run it; "refused" means attach must refuse it.
        chunked: whether a prompt may be prefilled in chunks (False for Mamba-1 kinds, whose
            multi-token forward ignores the state before it).
        controls: features whose removal must change the text, with the override that removes each.
        regime_tokens: prompt length beyond which the rotary frequencies change for the whole
            forward; None for every model whose frequencies are fixed.
        notes: what is special about it, in a few words.
    """

    name: str
    builder: Callable[..., transformers.PreTrainedModel]
    way: Way = "packed"
    chunked: bool = True
    controls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    regime_tokens: int | None = None
    notes: str = ""


ZOO: dict[str, Entry] = {}


def names(*ways: Way) -> list[str]:
    """Names of the entries that go one of these ways (all runnable ones when none is given)."""
    wanted = ways or ("packed", "rows", "patched", "dense")
    return [name for name, entry in ZOO.items() if entry.way in wanted]


def build(name: str, *, without: str | None = None) -> transformers.PreTrainedModel:
    """A fresh model: eval, float32, the same weights at every call.

    Args:
        name: key in `ZOO`.
        without: one of the entry's `controls`, to be taken out of the model.
    """
    entry = ZOO[name]
    return entry.builder(**(entry.controls[without] if without else {}))


def prompts(vocab: int = VOCAB, *, lengths: Sequence[int] = (5, 23, 12, 31)) -> list[Tokens]:
    """Random prompts: shorter and longer than a window, no two of one length."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def reference(
    model: transformers.PreTrainedModel, texts: Sequence[Tokens], n_tokens: int
) -> tuple[list[Tokens], list[torch.Tensor]]:
    """What transformers itself says, one prompt at a time, greedy, with its own cache.

    Returns:
        The new tokens of each prompt, and their logits, `[n_tokens, vocab]` float32 each.
    """
    tokens: list[Tokens] = []
    logits: list[torch.Tensor] = []
    for text in texts:
        if _rotary_remembers(model):
            model(torch.tensor([text[:1]]), use_cache=False)
        out = model.generate(
            torch.tensor([text]),
            do_sample=False,
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(out.sequences[0, len(text) :].tolist())
        logits.append(torch.cat(out.logits).float())
    return tokens, logits


def _rotary_remembers(model: transformers.PreTrainedModel) -> bool:
    """Whether the rotary module keeps the longest length it saw until a short forward resets it."""
    config = model.config.get_text_config(decoder=True)
    return "dynamic" in str((getattr(config, "rope_parameters", None) or {}).get("rope_type"))


def smallest_margin(logits: Sequence[torch.Tensor]) -> float:
    """Smallest gap between first and second choice, in sigmas of that step's logits."""
    rows = torch.cat(list(logits))
    best = rows.topk(2, dim=-1).values
    return float(((best[:, 0] - best[:, 1]) / rows.std(dim=-1)).min())


def no_near_ties(logits: Sequence[torch.Tensor], margin: float = 1e-3) -> bool:
    """Whether every greedy choice was clear: no rounding below `margin` sigma can flip a token."""
    return smallest_margin(logits) >= margin


def wanders(tokens: Sequence[Tokens], *, share: float = 0.25) -> bool:
    """Whether these texts hold enough distinct tokens for a comparison to be able to fail."""
    return len({t for text in tokens for t in text}) >= share * max(map(len, tokens)) * len(tokens)


# --- Weights ------------------------------------------------------------------------------------


@torch.no_grad()
def scatter_weights(
    model: torch.nn.Module, *, seed: int, gain: float = 1.6, embed: float = 0.3
) -> None:
    """Redraw every matrix at a scale that makes attention matter, whatever the class's own init.

    Vectors keep the class's values, except biases and sinks, which would be zero, and the decay
    rates of recurrences, which would forget within a few tokens.

    Args:
        gain: scale of the matrices over Glorot's.
        embed: standard deviation of the embeddings; small, so that layers outweigh the last token.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if id(p) in tables:
            p.normal_(0.0, embed, generator=generator)
        elif leaf == "A_log":  # slow decay: a state lost twenty tokens ago must show
            p.uniform_(-4.0, -1.0, generator=generator)
        elif p.dim() >= 2:
            depthwise = p.dim() == 3 and p.shape[1] == 1
            glorot = p.shape[-1] ** -0.5 if depthwise else math.sqrt(2 / sum(p.shape[-2:]))
            p.normal_(0.0, gain * glorot, generator=generator)
        elif leaf == "sinks":
            p.normal_(2.0, 1.0, generator=generator)
        elif leaf == "bias" or leaf.endswith("_bias"):
            p.normal_(0.0, 0.05, generator=generator)
