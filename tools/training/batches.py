"""Which task, at which size, with which filler: the batch of a step is a function of seed and step."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from training import tasks
from training.corpus import Text
from training.tasks import Example, Words

# Token-level look-up and copying teach a model to look back; they lead while sequences are short.
EARLY = {
    "text": 0.36,
    "text_pairs": 0.18,
    "token_pairs": 0.22,
    "copy": 0.10,
    "needles": 0.05,
    "passkey": 0.05,
    "tracking": 0.04,
}
LATE = {
    "text": 0.44,
    "text_pairs": 0.20,
    "token_pairs": 0.12,
    "copy": 0.04,
    "needles": 0.07,
    "passkey": 0.08,
    "tracking": 0.05,
}
EARLY_LENGTH_TOKENS = 256
PAIR_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Where a few answers stand among hundreds of tokens of filler, they count for more.
RARE_ANSWER_WEIGHT = 5.0


@dataclass(frozen=True)
class Sampler:
    """Draws training examples.

    Args:
        seed: fixes every batch together with the step
        text: the real text, which is the filler too
    """

    seed: int
    words: Words
    text: Text

    def example(
        self, rng: np.random.Generator, length_tokens: int, mix: Mapping[str, float]
    ) -> Example:
        """One example of `length_tokens`."""
        task = str(rng.choice(list(mix), p=list(mix.values())))
        fill = self.text.window
        # Filler is real text: mostly it is learnt from too.
        filler_weight = float(rng.random() < 0.75)
        # Half the look-ups are dense (questions to the end), half are hidden in filler.
        dense = bool(rng.integers(0, 2))
        answer_weight = 1.0 if dense else RARE_ANSWER_WEIGHT

        def count(tokens_each: int, most: int) -> int:
            fits = [p for p in PAIR_COUNTS if p <= most and p * tokens_each <= 0.6 * length_tokens]
            return int(rng.choice(fits))

        def asked(tokens_each: int) -> int:
            return length_tokens // tokens_each if dense else int(rng.integers(4, 25))

        match task:
            case "text":
                return tasks.text(rng, self.words, length_tokens, fill)
            case "text_pairs":
                pairs = count(9, 64)
                return tasks.text_pairs(
                    rng,
                    self.words,
                    length_tokens,
                    fill,
                    pairs=pairs,
                    asked=asked(6),
                    filler_weight=filler_weight,
                    answer_weight=answer_weight,
                )
            case "token_pairs":
                pairs = count(4, 64)
                return tasks.token_pairs(
                    rng,
                    self.words,
                    length_tokens,
                    fill,
                    pairs=pairs,
                    asked=asked(3),
                    filler_weight=filler_weight,
                    answer_weight=answer_weight,
                )
            case "copy":
                span = int(rng.integers(8, (length_tokens - 1) // 2))
                return tasks.copy(
                    rng,
                    self.words,
                    length_tokens,
                    fill if dense else None,
                    span_tokens=span,
                )
            case "needles":
                needles = count(24, 8)
                return tasks.needles(
                    rng,
                    self.words,
                    length_tokens,
                    fill,
                    count=needles,
                    asked=needles,
                    filler_weight=filler_weight,
                    answer_weight=RARE_ANSWER_WEIGHT,
                )
            case "passkey":
                return tasks.passkey(
                    rng,
                    self.words,
                    length_tokens,
                    fill,
                    filler_weight=filler_weight,
                    answer_weight=RARE_ANSWER_WEIGHT,
                )
            case "tracking":
                hops = int(rng.integers(1, 4))
                return tasks.tracking(
                    rng,
                    self.words,
                    length_tokens,
                    fill,
                    chains=count(10 * (hops + 1), 16),
                    hops=hops,
                    asked=asked(12),
                    filler_weight=filler_weight,
                    answer_weight=answer_weight,
                )
        raise ValueError(f"no task is named {task}")

    def batch(self, step: int, rows: int, length_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step.

        Returns: ids [rows, length_tokens] int64; weights [rows, length_tokens] float32
        """
        rng = np.random.default_rng([self.seed, step])
        mix = EARLY if length_tokens <= EARLY_LENGTH_TOKENS else LATE
        examples = [self.example(rng, length_tokens, mix) for _ in range(rows)]
        ids = torch.from_numpy(np.stack([e.ids for e in examples]))
        return ids, torch.from_numpy(np.stack([e.weights for e in examples]))
