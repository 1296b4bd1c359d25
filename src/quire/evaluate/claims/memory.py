"""Claims about how a cache is laid out: rooms or blocks, blocks of which size, and windows that roll."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.evaluate.claims.claim import Claim, Outcome

__all__ = ["CLAIMS", "Served", "scaled", "serve"]

ROOMS = 4
"""Requests of the longest length that the arena holds."""
SIZES = (8, 16, 32, 64, 128, 256)
_NEED = Outcome(
    "", "not here", "needs recorded requests with prompt and output: --lengths FILE.csv"
)


# -- rooms and blocks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What came of serving all requests.

    Args:
        steps: of the engine.
        users: requests in a step, on average.
        preempted: times that a request lost its blocks and was computed again.
    """

    tokens: int
    seconds: float
    steps: int
    users: float
    preempted: int

    @property
    def tokens_per_s(self) -> float:
        """Of output."""
        return self.tokens / self.seconds


def scaled(
    requests: Sequence[tuple[int, int]], n: int, longest: int
) -> tuple[list[tuple[int, int]], float]:
    """n of the requests, drawn alike every time, and shortened alike so that the longest of all has `longest` tokens.

    Returns:
        The requests, and by how much they were shortened.
    """
    by = max(1.0, max(p + o for p, o in requests) / longest)
    drawn = random.Random(0).sample(list(requests), min(n, len(requests)))
    return [(max(1, int(p / by)), max(1, int(o / by))) for p, o in drawn], by


def serve(
    bench: Any, requests: Sequence[tuple[int, int]], *, room: int, block: int, waves: bool
) -> Served:
    """Serves all requests on an arena of ROOMS rooms.

    Args:
        room: tokens of the longest request.
        block: tokens of a block; `room` for a contiguous cache.
        waves: a batch of ROOMS begins when the one before has ended; else each begins when there is room.
    """
    from quire.engine import Engine, SamplingParams
    from quire.engine.schedule import SchedulerConfig

    with bench.opened("auto") as runner:
        each = runner.bytes_per_token
    memory = int(ROOMS * room * each)
    with bench.opened("auto", memory=memory, block_tokens=block) as runner:
        config = SchedulerConfig(watermark=0)  # one room of four is more than a margin
        engine = Engine(runner, bench.loaded.tokenizer, eos_token_ids=(), config=config)
        size = ROOMS if waves else len(requests)
        steps = present = 0
        began = time.perf_counter()
        for first in range(0, len(requests), size):
            for i, (prompt, output) in enumerate(requests[first : first + size]):
                ids = [bench.ids[(7 * i + j) % len(bench.ids)] for j in range(prompt)]
                engine.add_request(ids, SamplingParams(max_tokens=output, ignore_eos=True))
            while engine.has_work:
                ended = sum(d.output is not None for d in engine.step())
                steps += 1
                present += engine.stats().scheduler.running + ended
        seconds = time.perf_counter() - began
        preempted = engine.stats().scheduler.preemptions
        engine.close()
    return Served(sum(o for _, o in requests), seconds, steps, present / steps, preempted)


def _throughput(bench: Any) -> Outcome:
    if not bench.requests:
        return _NEED
    n, room = (16, 256) if bench.quick else (32, 512)
    requests, by = scaled(bench.requests, n, room)
    ways = {
        "static, rooms": (room, True),
        "continuous, rooms": (room, False),
        "continuous, blocks of 16": (16, False),
    }
    turns = [
        {n: serve(bench, requests, room=room, block=b, waves=w) for n, (b, w) in ways.items()}
        for _ in range(1 if bench.quick else 3)
    ]
    said, rate, users = [], {}, {}
    for name in ways:
        each = [turn[name] for turn in turns]
        rate[name] = max(s.tokens_per_s for s in each)
        users[name] = each[0].users
        said.append(
            f"{name}: {users[name]:.1f} users, {rate[name]:,.0f} tokens/s, {each[0].steps:,} steps"
        )
    static, rooms, blocks = ways
    ratio = rate[blocks] / rate[rooms]
    again = turns[0][blocks].preempted
    return Outcome(
        f"{'; '.join(said)}. Blocks against rooms: {users[blocks] / users[rooms]:.1f} times the users, {ratio:.1f} "
        f"times the tokens per second ({rate[blocks] / rate[static]:.1f} times against static batches)",
        "reproduced" if 2 <= ratio <= 4 else "contradicted",
        f"{len(requests)} recorded requests, {by:.0f} times shorter, on one arena of {ROOMS} rooms of {room:,} tokens; "
        "the packaged model on a processor, where prompts and more users cost time that an accelerator has to spare; "
        f"{again} preemptions with blocks; the best of {len(turns)}",
        (("tokens per second by paging (2 to 4 claimed)", 4, ratio),),
    )


# -- sizes of blocks ---------------------------------------------------------------------------------------------


def waste_of(lengths: Sequence[int], block: int) -> float:
    """Share of the bytes that tables hold, at the pool, and no token fills; each sequence at its full length."""
    store = _counting(block, 1 << 30)
    held = used = 0
    for n in lengths:
        table = store.open()
        table.append(n)
        table.commit()
        held += store.usage().held_bytes
        used += table.used_bytes()
        table.release()
    return 1 - used / held


def look_up_s(tokens: int, block: int) -> float:
    """Seconds to find a cached prompt of so many tokens, the median of 30."""
    from quire.store.sharing import Sharing

    sharing = Sharing(_counting(block, 1 << 26))
    ids = list(range(tokens))
    table = sharing.open(ids, limit=tokens)
    table.append(tokens)
    table.commit()
    table.release()
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        found = sharing.look(ids, limit=tokens).found
        seconds.append(time.perf_counter() - began)
        assert found == tokens // block, "what is cached is found"
    return statistics.median(seconds)


def _counting(block: int, n_bytes: int) -> Any:
    """A store that counts without memory, for one layer with one head."""
    from quire.spec import CacheGroup, CacheSpec, Field
    from quire.store import BlockStore

    field = Field("k", (16,), "float32")
    group = CacheGroup("all", ((0, 0),), (field,), block_tokens=block)
    return BlockStore(CacheSpec((group,)), n_bytes)


def _sizes(bench: Any) -> Outcome:
    drawn = random.Random(0)
    n = 300 if bench.quick else 2000
    recorded = bool(bench.lengths)
    lengths = (
        drawn.sample(bench.lengths, min(n, len(bench.lengths)))
        if recorded
        else [drawn.randint(1, 2048) for _ in range(n)]
    )
    tokens = 2048
    waste = [waste_of(lengths, b) for b in SIZES]
    looked = [look_up_s(tokens, b) for b in SIZES]
    holds = waste == sorted(waste) and looked[0] > 2 * looked[-1] and waste[SIZES.index(16)] < 0.04
    most = max(b for b, w in zip(SIZES, waste, strict=True) if w < 0.04)
    return Outcome(
        f"blocks of {', '.join(map(str, SIZES))} tokens: {', '.join(f'{w:.2%}' for w in waste)} of the bytes wasted, "
        f"{', '.join(str(tokens // b) for b in SIZES)} blocks and {', '.join(f'{1e6 * s:,.0f}' for s in looked)} us to "
        f"look a prompt of {tokens:,} tokens up",
        "reproduced" if holds else "contradicted",
        (
            f"{len(lengths):,} recorded lengths"
            if recorded
            else "lengths drawn evenly from 1 to 2,048"
        )
        + f", bytes as the pool counts them; waste stays below 4 % up to {most} tokens",
    )


# -- windows -----------------------------------------------------------------------------------------------------


def _window(_: Any) -> Outcome:
    """A random model of windows alone: how many bytes it holds, and how far a changed first token is heard."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from quire.engine.runner import Item
    from quire.models.open import open_runner

    layers, window, n = 4, 32, 512
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=window,
        max_position_embeddings=n,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = MistralForCausalLM(config).double().eval()
    runner: Any = open_runner(model, memory=8 << 20, block_tokens=16)
    held, logits = [], []
    try:
        for first in (1, 2):
            ids = [first] + [(5 * i) % 64 for i in range(1, n)]
            table, rows = runner.open(), []
            for start in range(0, n, 16):
                table.append(16)
                rows.append(runner.forward([Item(table, ids, start, start + 16, 16)]).clone())
                table.commit()
                held.append(runner.usage().held_bytes)
            table.release()
            logits.append(torch.cat(rows))
    finally:
        runner.close()
    changed = (logits[0] != logits[1]).any(-1).nonzero().flatten()
    last, reach = int(changed[-1]), layers * (window - 1)
    bounded = max(held[len(held) // 4 :]) <= max(held[: len(held) // 4])
    return Outcome(
        f"{layers} layers with a window of {window} hold {max(held):,} bytes at most, behind 128 tokens as behind {n}; "
        f"another first token changes the predictions up to position {last}, and {layers} x {window - 1} = {reach}",
        "reproduced" if bounded and last == reach else "contradicted",
        "a random model in float64; without windows it would hold "
        f"{n * 2 * layers * 32 * 8:,} bytes, and through one layer the token would be heard up to {window - 1}",
    )


# -- a context larger than the arena -----------------------------------------------------------------------------


def _offload(bench: Any) -> Outcome:
    from quire.engine import Engine, SamplingParams
    from quire.errors import CapacityError

    n, n_out, times = (768, 8, 4) if bench.quick else (2048, 32, 4)
    ids = [bench.ids[i % len(bench.ids)] for i in range(n)]
    with bench.opened("fp32") as runner:
        want = int(runner.bytes_per_token * (n + n_out))
    here: dict[str, Any] = {"memory": 2 * want, "block_tokens": 16}
    small = here | {"memory": want // times}
    below = small | {"tiers": f"host:{2 * want}B;offload=on"}
    texts, rates, refused = [], [], ""
    for options in (here, small, below):
        with bench.opened("fp32", **options) as runner, Engine(runner) as engine:
            began = time.perf_counter()
            try:
                (out,) = engine.generate([ids], SamplingParams(max_tokens=n_out, ignore_eos=True))
            except CapacityError as e:
                refused = str(e)
                continue
            rates.append(n_out / (time.perf_counter() - began))
            texts.append(out.token_ids)
    same = len(texts) == 2 and texts[0] == texts[1]
    return Outcome(
        f"{n + n_out:,} tokens, {times} times the arena: refused without a tier, served with one, with "
        f"{'the same' if same else 'other'} tokens as an arena that holds everything",
        "reproduced" if same and refused else "contradicted",
        f"output tokens per second with the prompt, {rates[0]:.1f} here and {rates[-1]:.1f} with cold blocks in host "
        "memory, on a processor, where both are the same memory",
    )


CLAIMS = (
    Claim(
        "offload",
        "Offloading serves what would otherwise run out of memory",
        "several systems",
        _offload,
    ),
    Claim(
        "block-size",
        "The size of a block trades waste against the cost of looking blocks up; 16 tokens are small enough",
        "vLLM, arXiv 2309.06180",
        _sizes,
    ),
    Claim(
        "paging-speed",
        "Paging serves 2 to 4 times the tokens per second",
        "vLLM, arXiv 2309.06180",
        _throughput,
    ),
    Claim(
        "window",
        "A rolling window keeps the cache bounded and still passes information on, layer by layer",
        "arXiv 2310.06825",
        _window,
    ),
)
