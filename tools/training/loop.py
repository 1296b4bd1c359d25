"""The training loop: a schedule in tokens, Muon and AdamW, checkpoints that continue exactly.

    tokens   0 .. 1.5 M .... 42 % ..... 62 % ..... 82 % .... 100 %
    length    128  |   256   |   512    |  1,024   |  2,048 ...................
    rate     constant ................|60 %  linear down to 2 % | 30 % down to 2 %
                                                                  an extension, if any

The opening of 128-token sequences does not depend on the budget, so a run whose budget is changed
before 42 % of either is the run that began with it.

Nothing random is carried from step to step: a batch is a function of seed and step. A checkpoint
is therefore weights, optimizer states and two counters, and a run that is killed and continued
gives the same bits as one that was not (on the same machine with the same threads).
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from training import attention
from training.batches import Sampler
from training.corpus import BOS_ID, EOS_ID

OPENING = (1_500_000, 128)
PHASES = ((0.42, 256), (0.62, 512), (0.82, 1024), (1.0, 2048))
DECAY_FROM = 0.60
LAST_RATE = 0.02
EXTENSION_RATE = 0.3
WARM_UP_STEPS = 100
PADDING = 512
ADAMW_RATE = 3e-3
MUON_RATE = 2e-2


@dataclass(frozen=True)
class Plan:
    """What fixes a run.

    Args:
        tokens: budget the schedule spans, in tokens trained on
        seed: of the weights and of every batch
        batch_tokens: tokens of one step, whatever the sequences' length
        opening: (end in tokens, sequence length in tokens), before the phases
        phases: (end as a fraction of the budget, sequence length in tokens)
        extension_tokens: trained on after the budget, at the last length, with rates that start anew and lower
    """

    tokens: int
    seed: int = 0
    batch_tokens: int = 4096
    opening: tuple[int, int] = OPENING
    phases: tuple[tuple[float, int], ...] = PHASES
    extension_tokens: int = 0

    def __post_init__(self) -> None:
        longest = max(length for _, length in self.phases)
        if self.tokens <= 0 or self.batch_tokens % longest:
            raise ValueError(
                f"the budget must be positive and a batch a multiple of {longest} tokens"
            )

    def length_tokens(self, done_tokens: int) -> int:
        """The sequence length of the step after `done_tokens`."""
        if done_tokens < self.opening[0]:
            return self.opening[1]
        part = done_tokens / self.tokens
        return next((length for end, length in self.phases if part < end), self.phases[-1][1])

    def rate(self, step: int, done_tokens: int) -> float:
        """The learning rates' common factor, 0 to 1."""
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        part = done_tokens / self.tokens
        if part < DECAY_FROM:
            return warm
        if self.extension_tokens and done_tokens >= self.tokens:
            left = 1 - (done_tokens - self.tokens) / self.extension_tokens
            return max(LAST_RATE, EXTENSION_RATE * left)
        return warm * max(LAST_RATE, (1 - part) / (1 - DECAY_FROM))


def new_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A model whose weights the seed fixes."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    model.set_attn_implementation(attention.NAME)
    return model


def packaged_config(vocabulary: int) -> LlamaConfig:
    """The packaged model's architecture."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def weighted_positions(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the loss looks: logits are needed nowhere else, and most of a look-up has no weight.

    Padded with position 0 at weight 0 to whole steps of `PADDING`, because a matrix library keeps
    a prepared kernel for every shape it meets.

    Args:
        weights: [B, T] float32
    Returns: positions in the flattened batch [N] int64, and their weights [N] float32
    """
    flat = weights.flatten()
    at = flat.nonzero().flatten()
    padded = torch.zeros(-(-len(at) // PADDING) * PADDING, dtype=torch.int64)
    padded[: len(at)] = at
    weight = torch.zeros(len(padded))
    weight[: len(at)] = flat[at]
    return padded, weight


@dataclass
class Run:
    """A model in training.

    Args:
        plan: the schedule
        model: trained in place, float32 weights under bf16 autocast
        sampler: the batches
        budgets: (token at which it took effect, budget), one entry unless the budget was changed
    """

    plan: Plan
    model: LlamaForCausalLM
    sampler: Sampler
    fingerprint: str
    step: int = 0
    done_tokens: int = 0
    budgets: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
        others = [p for n, p in named if p.dim() != 2 or "embed" in n]
        self.muon: Optimizer = Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.05)
        self.adamw: Optimizer = AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.budgets = self.budgets or [(0, self.plan.tokens)]

    @property
    def finished(self) -> bool:
        """Whether the budget, and its extension, are spent."""
        return self.done_tokens >= self.plan.tokens + self.plan.extension_tokens

    def train_step(self) -> float:
        """One step; returns its weighted mean loss in nats."""
        plan = self.plan
        length = plan.length_tokens(self.done_tokens)
        factor = plan.rate(self.step, self.done_tokens)
        for optimizer, rate in ((self.muon, MUON_RATE), (self.adamw, ADAMW_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        ids, weights = self.sampler.batch(self.step, plan.batch_tokens // length, length)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.model.model(ids, use_cache=False).last_hidden_state[:, :-1]
            at, weight = weighted_positions(weights[:, 1:])
            logits = self.model.lm_head(hidden.flatten(0, 1)[at])
        losses = cross_entropy(logits.float(), ids[:, 1:].flatten()[at], reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step()
        self.adamw.step()
        self.step += 1
        self.done_tokens += plan.batch_tokens
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Writes the checkpoint; a kill while writing leaves the one before."""
        state = {
            "plan": asdict(self.plan),
            "budgets": self.budgets,
            "fingerprint": self.fingerprint,
            "step": self.step,
            "done_tokens": self.done_tokens,
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }
        beside = path.with_suffix(".writing")
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint; `plan.tokens` is the budget from here on.

        Raises:
            ValueError: the checkpoint is of another plan or text, or its budget would change
                after its rates began to fall
        """
        state: dict[str, Any] = torch.load(path, weights_only=True)
        mine, its = asdict(self.plan), state["plan"]
        its.setdefault("extension_tokens", 0)
        same = all(mine[k] == its[k] for k in mine if k not in ("tokens", "extension_tokens"))
        if not same or state["fingerprint"] != self.fingerprint:
            raise ValueError("the checkpoint was made with another seed, schedule or text")
        self.budgets = [tuple(b) for b in state["budgets"]]
        if mine["tokens"] != its["tokens"]:
            decay = DECAY_FROM * min(mine["tokens"], its["tokens"])
            if state["done_tokens"] >= decay:
                raise ValueError(
                    f"the budget cannot change from {its['tokens']} to {mine['tokens']} tokens: "
                    "the learning rate is already falling (or would be)"
                )
            self.budgets.append((state["done_tokens"], mine["tokens"]))
        begun = state["done_tokens"] > its["tokens"] and its["extension_tokens"]
        if begun and mine["extension_tokens"] != its["extension_tokens"]:
            raise ValueError(
                f"an extension of {its['extension_tokens']} tokens has begun and keeps its length"
            )
        self.step, self.done_tokens = state["step"], state["done_tokens"]
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        torch.set_rng_state(state["torch_rng"])


def losses(run: Run, stopped: Callable[[], bool] = lambda: False) -> Iterable[tuple[float, float]]:
    """Trains to the end of the budget or until `stopped`; yields loss and seconds per step."""
    run.model.train()
    while not run.finished and not stopped():
        began = time.perf_counter()
        loss = run.train_step()
        yield loss, time.perf_counter() - began
