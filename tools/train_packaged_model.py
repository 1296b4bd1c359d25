"""Trains the model that the package carries.

    python tools/train_packaged_model.py --work DIR --tokens 16M --books emma.txt alice.txt
    python tools/train_packaged_model.py --work DIR --export src/quire/packaged

The first command trains, and continues what DIR holds; it may be killed at any time. The second
writes the newest checkpoint as a folder that `transformers` loads. Both need the `torch`,
`transformers`, `tokenizers` and `numpy` of the development environment.
"""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training import tasks
from training.batches import Sampler
from training.corpus import KINDS, Text, prepare
from training.export import export
from training.loop import Plan, Run, losses, new_model, packaged_config
from training.probes import mean_loss, recall
from training.tasks import Words

TEXT_RATES = {"code": 0.55, "topics": 0.15, "books": 0.30}


def tokens(text: str) -> int:
    """`16M`, `500k` or `4096`."""
    scale = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    return round(float(text.rstrip("kM")) * scale)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the packaged model.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--tokens",
        type=tokens,
        help="budget of the whole run, such as 16M; on resume another one may be given until the "
        "learning rate begins to fall (60 %% of either budget), later it is refused",
    )
    parser.add_argument(
        "--extend",
        type=tokens,
        default=None,
        help="tokens trained on after the budget, at the longest length, at lower rates",
    )
    parser.add_argument("--books", type=Path, nargs="*", default=[], help="plain-text books")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2, help="torch's; other counts round apart")
    parser.add_argument("--save-every-s", type=float, default=120.0)
    parser.add_argument("--probe-every-steps", type=int, default=400)
    parser.add_argument("--export", type=Path, help="write the newest checkpoint here and leave")
    return parser.parse_args(argv)


def probe(run: Run, words: Words, held: Text) -> str:
    """Held-out loss by kind and recall by task, on examples that never change."""
    run.model.eval()
    rng = np.random.default_rng([run.plan.seed, 1 << 40])
    fill = held.window

    def share(examples: list[tasks.Example]) -> str:
        right, asked = recall(run.model, examples)
        return f"{right / asked:.3f}"

    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = " ".join(
            f"{k} {mean_loss(run.model, held.streams[k], 1024, 8, words.bos):.3f}"
            for k in KINDS
            if len(held.streams[k]) > 1024
        )
        token = share(
            [
                tasks.token_pairs(rng, words, 512, fill, pairs=16, asked=16, filler_weight=0.0)
                for _ in range(6)
            ]
        )
        pairs = " ".join(
            f"{length}/{count} "
            + share(
                [
                    tasks.text_pairs(rng, words, length, fill, pairs=count, asked=10)
                    for _ in range(4)
                ]
            )
            for length, count in ((256, 8), (1024, 32), (2048, 32))
        )
        keys = " ".join(
            f"{length} "
            + share([tasks.passkey(rng, words, length, fill, depth=d / 5) for d in range(6)])
            for length in (256, 2048)
        )
    run.model.train()
    return f"held-out {text} | tokens 512/16 {token} | pairs {pairs} | passkey {keys}"


def train(run: Run, held: Text, checkpoint: Path, save_every_s: float, probe_every: int) -> None:
    """Trains to the end of the budget, or until asked to stop."""
    stop = False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop
        stop = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    mean, seconds, since = float("nan"), 0.0, 0
    saved = time.monotonic()
    for loss, step_s in losses(run, lambda: stop):
        mean = loss if math.isnan(mean) else 0.97 * mean + 0.03 * loss
        seconds, since = seconds + step_s, since + run.plan.batch_tokens
        if run.step % 50 == 0:
            length = run.plan.length_tokens(run.done_tokens)
            print(
                f"{time.strftime('%H:%M:%S')} step {run.step} tokens {run.done_tokens / 1e6:.2f}M "
                f"of {run.plan.tokens / 1e6:.2f}M length {length} loss {mean:.3f} "
                f"{since / seconds:.0f} tokens/s",
                flush=True,
            )
            seconds, since = 0.0, 0
        if run.step % probe_every == 0:
            print("   ", probe(run, run.sampler.words, held), flush=True)
        if time.monotonic() - saved >= save_every_s:
            run.save(checkpoint)
            saved = time.monotonic()
    run.save(checkpoint)
    print("finished" if run.finished else "stopped", f"at {run.done_tokens} tokens", flush=True)


def write_export(work: Path, folder: Path) -> None:
    """Exports the newest checkpoint."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    plan = state["plan"]
    model = new_model(packaged_config(tokenizer.get_vocab_size()), plan["seed"])
    model.load_state_dict(state["model"])
    facts = {
        "seed": plan["seed"],
        "trained_tokens": state["done_tokens"],
        "budgets": state["budgets"],
        "extension_tokens": plan.get("extension_tokens", 0),
        "text_sha256": state["fingerprint"],
    }
    print(export(model, tokenizer, folder, facts))


def main(argv: Sequence[str] | None = None) -> int:
    """Trains or exports."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    if args.export:
        write_export(args.work, args.export)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = args.work / "checkpoint.pt"
    budget = args.tokens
    if budget is None:
        if not checkpoint.exists():
            print("error: a new run needs --tokens, such as --tokens 16M", file=sys.stderr)
            return 2
        budget = torch.load(checkpoint, weights_only=True)["plan"]["tokens"]
    extension = args.extend
    if extension is None:
        plan = torch.load(checkpoint, weights_only=True)["plan"] if checkpoint.exists() else {}
        extension = plan.get("extension_tokens", 0)
    try:
        tokenizer, trained, held, fingerprint = prepare(args.work, args.books, args.vocabulary)
        words = Words(tokenizer)
        sampler = Sampler(args.seed, words, Text(trained, TEXT_RATES))
        model = new_model(packaged_config(tokenizer.get_vocab_size()), args.seed)
        run = Run(Plan(budget, args.seed, extension_tokens=extension), model, sampler, fingerprint)
        if checkpoint.exists():
            run.load(checkpoint)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        json.dumps({kind: len(ids) for kind, ids in trained.items()}),
        f"held out {json.dumps({kind: len(ids) for kind, ids in held.items()})}",
        f"{model.num_parameters()} parameters, from step {run.step}",
        flush=True,
    )
    train(run, Text(held, TEXT_RATES), checkpoint, args.save_every_s, args.probe_every_steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
