"""Measures the packaged model with its full cache, and says whether it reaches its bars.

    python tools/check_packaged_model.py [FOLDER] --texts moby.txt shakespeare.txt --json out.json

Recall is exact match of the whole answer under greedy decoding, hidden in library text that was
held out of training. Perplexity is over non-overlapping windows, each after `<s>`. Weights are the
bf16 ones of the folder, computed with in float32. The exit status is 1 where a bar is missed.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from quire import packaged
from training import corpus, figures, tasks
from training.corpus import BOS_ID, KINDS, Text
from training.probes import mean_loss, recall
from training.tasks import Example, Words

LENGTHS = (512, 1024, 2048)
BARS = {"passkey 2048": 0.98, "text_pairs 2048/32": 0.95, "token_pairs 2048/32": 0.98}
PROMPTS = (
    "def read_lines(path):\n",
    "Emma was very",
    "The Queen looked at Alice and",
    'The "for" statement is',
)


def rows(
    words: Words, fill: tasks.Filler, sequences: int
) -> dict[str, Callable[[np.random.Generator, int], Example]]:
    """The measured tasks by name; each makes the n-th of `sequences` examples."""
    made: dict[str, Callable[[np.random.Generator, int], Example]] = {}
    for length in LENGTHS:
        made[f"passkey {length}"] = lambda rng, n, t=length: tasks.passkey(  # type: ignore[misc]
            rng, words, t, fill, depth=n / max(1, sequences - 1)
        )
        counts = (8, 16, 32, 64) if length == LENGTHS[-1] else (32,) if length > 512 else (16, 32)
        for pairs in counts:
            made[f"text_pairs {length}/{pairs}"] = lambda rng, _, t=length, p=pairs: (  # type: ignore[misc]
                tasks.text_pairs(rng, words, t, fill, pairs=p, asked=10)
            )
        for pairs in (8, 16, 32) if length == LENGTHS[-1] else (32,):
            made[f"token_pairs {length}/{pairs}"] = lambda rng, _, t=length, p=pairs: (  # type: ignore[misc]
                tasks.token_pairs(rng, words, t, fill, pairs=p, asked=16)
            )
        made[f"needles {length}/4"] = lambda rng, _, t=length: tasks.needles(  # type: ignore[misc]
            rng, words, t, fill, count=4, asked=4
        )
        made[f"tracking {length}/4x2"] = lambda rng, _, t=length: tasks.tracking(  # type: ignore[misc]
            rng, words, t, fill, chains=4, hops=2, asked=6
        )
    return made


def measure_recall(
    model: LlamaForCausalLM, words: Words, fill: tasks.Filler, sequences: int
) -> dict[str, dict[str, float]]:
    """Right, asked and share per task."""
    result = {}
    for number, (name, make) in enumerate(rows(words, fill, sequences).items()):
        examples = [make(np.random.default_rng([7, number, n]), n) for n in range(sequences)]
        right, asked = recall(model, examples)
        result[name] = {"right": right, "asked": asked, "share": right / asked}
        print(f"{name:<22} {right:>5} of {asked:>5}  {right / asked:7.2%}", flush=True)
    return result


def measure_text(
    model: LlamaForCausalLM, ids: np.ndarray, bytes_per_token: float, windows: int
) -> dict[str, float]:
    """Loss, perplexity and bits per byte of one text."""
    loss = mean_loss(model, ids, LENGTHS[-1], windows, BOS_ID)
    count = min(windows, len(ids) // (LENGTHS[-1] - 1)) * (LENGTHS[-1] - 1)
    return {
        "tokens": count,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / bytes_per_token / math.log(2),
    }


def first_position_mass(model: LlamaForCausalLM, ids: torch.Tensor) -> list[list[float]]:
    """Mean attention mass at position 0 of queries from position 64 on, per layer and head."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [a[:, :, 64:, 0].mean((0, 2)).tolist() for a in attentions]


def key_channels(model: LlamaForCausalLM, ids: torch.Tensor) -> list[dict[str, float]]:
    """Per layer, how the mean magnitudes of the cached channels are spread.

    Keys are the rotated ones, as cached. `largest over median` is of the channel means of one
    head, the worst head of the layer; 1.0 would be no outlier channel at all.
    """
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    table = []
    for layer in layers:
        entry = {}
        for name, states in (("key", layer.keys), ("value", layer.values)):
            # [B, H_kv, T, D] -> [H_kv, D]
            means = states.float().abs().mean((0, 2))
            entry[f"{name}_median"] = float(means.median())
            spread = means.max(-1).values / means.median(-1).values
            entry[f"{name}_largest_over_median"] = float(spread.max())
        table.append(entry)
    return table


def continuations(model: LlamaForCausalLM, tokenizer: Tokenizer) -> dict[str, str]:
    """What the model writes after each prompt: 40 tokens, temperature 0.7, seed 0."""
    result = {}
    for prompt in PROMPTS:
        torch.manual_seed(0)
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=True,
            temperature=0.7, top_k=50,
        )  # fmt: skip
        result[prompt] = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    return result


def held_out(tokenizer: Tokenizer) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The library text that training held out, by kind, and its bytes per token."""
    documents = [d for d in corpus.gather([]) if d.held_out]
    streams = corpus.encode(tokenizer, documents)
    sizes = {
        kind: sum(len(d.text.encode()) for d in documents if d.kind == kind) / max(1, len(ids))
        for kind, ids in streams.items()
    }
    return streams, sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description="Check the packaged model against its bars.")
    parser.add_argument("folder", type=Path, nargs="?", default=packaged.path())
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="held-out plain texts")
    parser.add_argument("--sequences", type=int, default=50, help="examples per task")
    parser.add_argument("--windows", type=int, default=24, help="2,048-token windows per text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--document", type=Path, help="renew the tables of this document")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    model = LlamaForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    record = json.loads((args.folder / "digest.json").read_text())
    print(f"weights {record['sha256']}\n{model.num_parameters()} parameters", flush=True)
    streams, sizes = held_out(tokenizer)
    fill = Text(streams, {"code": 0.8, "topics": 0.2, "books": 0.0}).window
    report: dict[str, Any] = {
        "digest": record,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "recall": measure_recall(model, Words(tokenizer), fill, args.sequences),
    }

    held = {f"held-out {k}": (streams[k], sizes[k]) for k in KINDS if len(streams[k]) > LENGTHS[-1]}
    for path in args.texts:
        text = path.read_text(encoding="utf-8", errors="ignore")
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
        held[path.name] = (ids, len(text.encode()) / len(ids))
    report["text"] = {}
    for name, (ids, size) in held.items():
        row = report["text"][name] = measure_text(model, ids, size, args.windows)
        print(
            f"{name:<32} {row['tokens']:>6} tokens  perplexity {row['perplexity']:8.2f}  "
            f"{row['bits_per_byte']:.3f} bits per byte",
            flush=True,
        )

    code = torch.from_numpy(np.concatenate([[BOS_ID], streams["code"][:1023]]))[None]
    report["first_position_mass"] = first_position_mass(model, code)
    report["channels"] = key_channels(model, code)
    for layer, (mass, spread) in enumerate(
        zip(report["first_position_mass"], report["channels"], strict=True)
    ):
        print(
            f"layer {layer}: mass at position 0 {' '.join(f'{m:.2f}' for m in mass)}; largest "
            f"over median channel: keys {spread['key_largest_over_median']:.2f}, "
            f"values {spread['value_largest_over_median']:.2f}"
        )
    report["continuations"] = continuations(model, tokenizer)
    for prompt, text in report["continuations"].items():
        print(f"{prompt!r} -> {text!r}")

    missed = [n for n, bar in BARS.items() if report["recall"][n]["share"] < bar]
    report["missed"] = missed
    print("bars reached" if not missed else f"bars missed: {', '.join(missed)}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.document:
        figures.write(report, args.document)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
