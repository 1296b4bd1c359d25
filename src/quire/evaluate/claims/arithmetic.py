"""Claims that follow from shapes. Every figure comes from the planner, which the engine's own bytes are held to."""

from __future__ import annotations

from typing import Any

from quire.evaluate.claims.claim import Claim, Outcome
from quire.plan.catalogue import known_model
from quire.plan.demand import Demand, Setup
from quire.plan.lengths import mix
from quire.plan.shape import read_shape
from quire.plan.weights import count_parameters, weight_bytes
from quire.spec import KVConfig

__all__ = ["CLAIMS", "demand", "gib", "projections", "scores"]

GIB, MIB = 1 << 30, 1 << 20


def demand(name: str, kv: str = "auto", ranks: int = 1) -> Demand:
    """A model of the catalogue under a recipe, in 16 bits."""
    row = known_model(name)
    assert row is not None, name
    return Demand(Setup(read_shape(row["config"], name), KVConfig(kv), ranks=ranks))


def gib(n: float) -> str:
    """`10 GiB`, `305.18 GiB`."""
    return f"{n / GIB:,.2f}".rstrip("0").rstrip(".") + " GiB"


def projections(prompt: int, output: int) -> tuple[int, int]:
    """Tokens that pass the projections to write `output` tokens: without a cache, and with one."""
    without = sum(prompt + i for i in range(output))
    return without, prompt + output - 1


def scores(prompt: int, output: int) -> tuple[int, int]:
    """Pairs of query and key to write `output` tokens: without a cache, and with one."""
    without = sum((n := prompt + i) * (n + 1) // 2 for i in range(output))
    last = prompt + output - 1  # the last token is never read
    return without, last * (last + 1) // 2


def _sum(
    ours: str, *, holds: bool, why: str = "", ratios: tuple[tuple[str, float, float], ...] = ()
) -> Outcome:
    return Outcome(ours, "arithmetic" if holds else "contradicted", why, ratios)


def _quadratic(_: Any) -> Outcome:
    without, cached = projections(2000, 500)
    return _sum(
        f"{without:,} token projections without a cache, {cached:,} with it: {without / cached:,.0f} times fewer",
        holds=without == 1_124_750 and cached == 2499,
        why="the prompt again for each token; with a cache each token once, the last one never",
    )


def _cubic(_: Any) -> Outcome:
    without, cached = scores(2000, 500)
    long = scores(0, 20_000)
    growth = [b / a for a, b in zip(scores(0, 10_000), long, strict=True)]
    return _sum(
        f"2,000 + 500 tokens: {without:,} pairs of query and key without a cache, {cached:,} with it: "
        f"{without / cached:,.0f} times fewer; twice as long a text takes {growth[0]:.2f} and {growth[1]:.2f} times "
        "as many",
        holds=[round(g, 2) for g in growth] == [8, 4],
        why="per head and layer, each query with what is up to it; without a cache every step asks all again",
    )


def _document(_: Any) -> Outcome:
    without, cached = projections(10_000, 500)
    share = 1 - cached / without
    return _sum(
        f"{share:.1%} of {without:,} word passes are repeats", holds=share > 0.99, why="as above"
    )


_TABLE = {
    "llama-2-7b": (0.5, 2.0),
    "llama-2-70b": (0.3125, 1.25),
    "mistral-7b-v0.2": (0.125, 0.5),
    "gpt-3-175b": (4.5, 18.0),
}


def _sizes(_: Any) -> Outcome:
    said, holds = [], True
    for name, (mib, full) in _TABLE.items():
        d = demand(name)
        token, whole = d.bytes_per_token / MIB, d.sequence_bytes(4096) / GIB
        holds &= (token, whole) == (mib, full)
        said.append(f"{name} {token:g} MiB and {whole:g} GiB")
    return _sum("; ".join(said), holds=holds, why="per token and at 4,096 tokens, 16 bits")


def _seventy(_: Any) -> Outcome:
    d = demand("llama-2-70b")
    sizes = [d.sequence_bytes(n) for n in (4096, 32_768, 131_072, 1_000_000)]
    each = ", ".join(gib(s) for s in sizes)
    many = ", ".join(gib(32 * s) for s in sizes)
    holds = [round(s / GIB, 2) for s in sizes] == [1.25, 10, 40, 305.18]
    return _sum(f"{each}; a batch of 32: {many}", holds=holds)


def _long_user(_: Any) -> Outcome:
    n_bytes = demand("llama-3-70b").sequence_bytes(131_072)
    return _sum(f"{gib(n_bytes)} ({n_bytes / 1e9:.1f} GB)", holds=38 < n_bytes / GIB < 43)


def _heads(_: Any) -> Outcome:
    """Against a cache of all query heads, same shape."""
    one, eight = demand("falcon-7b").bytes_per_token, demand("llama-2-70b").bytes_per_token
    mqa, gqa = 32 * 71 * 64 * 4 / one, 80 * 64 * 128 * 4 / eight
    return _sum(
        f"MQA {mqa:g} times smaller (falcon-7b, 71 heads), GQA {gqa:g} times (llama-2-70b, 64 heads over 8)",
        holds=(mqa, gqa) == (71, 8),
    )


def _latents(_: Any) -> Outcome:
    v2, old = demand("deepseek-v2").bytes_per_token, demand("deepseek-67b").bytes_per_token
    six = 1 - v2 * 6 / 16 / old
    equal = 1 - v2 / old
    heads = [1 - 576 / (128 * width) for width in (256, 320)]
    return _sum(
        f"{six:.1%} against DeepSeek 67B in 16 bits with the latents in 6; {equal:.1%} at equal bits; "
        f"{heads[0]:.1%} to {heads[1]:.1%} against all heads of its own shape",
        holds=round(six, 3) == 0.933,
        why="the figure holds for the paper's comparison, which changes model and bits at once",
        ratios=(("MLA at equal bits", 1 / (1 - 0.933), old / v2),),
    )


def _sixteen(_: Any) -> Outcome:
    full = 32 * 32 * 128 * 4
    each = [full / demand("llama-3-8b", kv).bytes_per_token for kv in ("int4:group=32", "int4")]
    return _sum(
        f"{each[0]:.1f} times with a scale and minimum per 32 channels, {each[1]:.1f} with one per head",
        holds=False,
        why="16 forgets the scales",
        ratios=(("GQA with INT4, a scale per head", 16, each[1]),),
    )


def _mistral(_: Any) -> Outcome:
    d = demand("mistral-7b-v0.1")
    full = 32 * 32 * 128 * 4 * 32_768
    ratio = full / (4096 * 32 * 8 * 128 * 4)
    held = d.sequence_bytes(32_768)
    return _sum(
        f"the window alone holds {held / MIB:.0f} MiB at 32,768 tokens, 8 times less than without it, and heads are "
        f"shared 4 to 1 besides: {ratio:g} times less than all heads and tokens; 32 layers x 4,096 = {32 * 4096:,}",
        holds=held <= 0.5 * GIB + 32 * 32 * 4096,
        why="8 is the window's part alone at 32k; the span is what a token can have heard of, layer by layer",
    )


def _read(_: Any) -> Outcome:
    return _sum(f"{2e9 / 2e12 * 1e3:g} ms", holds=2e9 / 2e12 == 1e-3)


def _million(_: Any) -> Outcome:
    row = known_model("llama-7b")
    assert row is not None
    shape = read_shape(row["config"], "llama-7b")
    weights = weight_bytes(count_parameters(shape), "float16")
    elements = demand("llama-7b").bytes_per_token / 2
    totals = {bits: (weights + 1e6 * elements * bits / 8) / 1e9 for bits in (2.0, 2.32)}
    return _sum(
        f"{totals[2.0]:.1f} GB with weights at 2.00 bits, {totals[2.32]:.1f} GB at 2.32",
        holds=totals[2.0] < 80 < totals[2.32],
        why="true of the codes alone; with KVQuant's 1 % of outliers it takes more than 80 GB",
    )


def _kivi(_: Any) -> Outcome:
    n = 32_768
    exact = demand("llama-3-8b").sequence_bytes(n)
    each = [
        exact / demand("llama-3-8b", f"kivi:bits=2,group={g}").sequence_bytes(n) for g in (32, 128)
    ]
    bits = [2 + 32 / g for g in (32, 128)]
    return _sum(
        f"{each[0]:.2f} times at groups of 32 and {each[1]:.2f} at 128, scales and 128 raw tokens included, at 32k",
        holds=False,
        why=f"scales make {bits[0]:g} and {bits[1]:g} bits of 2",
        ratios=tuple(
            (f"KIVI-2, groups of {g}", 8, r) for g, r in zip((32, 128), each, strict=True)
        ),
    )


def _kvquant(_: Any) -> Outcome:
    return _sum(
        f"{16 / 2.32:.1f} times at 2.32 bits",
        holds=False,
        why="1 % of outliers take 0.32 bits",
        ratios=(("KVQuant-2 with 1 % of outliers", 8, 16 / 2.32),),
    )


def _coupled(_: Any) -> Outcome:
    codebooks = 2 * 32 * 8 * 128 * 2**8 * 2
    return _sum(
        f"8 channels in 8 bits are 16 times less than 16 bits; codebooks take {codebooks / MIB:.0f} MiB once for a "
        "Llama 3 8B",
        holds=True,
        why="bytes; `cq` is built, and docs/methods.md has its loss: calibrating it takes longer than a claim",
    )


def _waste(bench: Any) -> Outcome:
    """Rooms for the longest request, which a contiguous cache must have, against blocks, on recorded lengths."""
    lengths = bench.lengths
    if not lengths:
        return Outcome("", "not here", "needs recorded lengths: --lengths FILE.csv")
    room, block, total = max(lengths), 16, sum(lengths)
    rooms = 1 - total / (room * len(lengths))
    blocks = 1 - total / sum(-(-n // block) * block for n in lengths)
    holds = 0.6 <= rooms <= 0.8 and blocks < 0.04
    return Outcome(
        f"{rooms:.1%} of rooms of {room:,} tokens are empty, and {blocks:.2%} of blocks of {block}",
        "reproduced" if holds else "contradicted",
        f"{len(lengths):,} recorded requests; a room is as long as the longest of them",
    )


def _users(bench: Any) -> Outcome:
    if not bench.lengths:
        return Outcome("", "not here", "needs recorded lengths: --lengths FILE.csv")
    d = demand("llama-3.1-8b")
    memory = 40 * GIB
    whole = memory // d.sequence_bytes(max(bench.lengths))
    paged = mix(d, bench.lengths).max_users(memory)
    ratio = paged / whole
    return Outcome(
        f"{whole} users in rooms for the longest request, {paged} in blocks (99th percentile of their sum): "
        f"{ratio:.1f} times as many",
        "reproduced" if 2 <= ratio <= 4 else "contradicted",
        f"{len(bench.lengths):,} recorded requests of Llama 3.1 8B in 40 GiB; users at a time, not tokens per second",
        (("users by paging (2 to 4 claimed)", 4, ratio),),
    )


def _bound(_: Any) -> Outcome:
    from quire.plan.catalogue import find_device
    from quire.plan.speed import Speed

    row = known_model("llama-3.1-8b")
    assert row is not None
    shape = read_shape(row["config"], "llama-3.1-8b")
    setup = Setup(
        shape, KVConfig(), count_parameters(shape), "bfloat16", device=find_device("h100")
    )
    speed = Speed(Demand(setup))
    one = speed.decode(1, 2048)
    prefill = speed.prefill_s(2048)
    batch = speed.compute_bound_batch(128)
    return _sum(
        f"Llama 3.1 8B on an H100: a step reads for {1e3 * one.read_s:.2f} ms and computes for "
        f"{1e3 * one.compute_s:.3f}; 2,048 prompt tokens compute for {1e3 * prefill:.1f} ms over the same weights; at "
        f"128 tokens of context decode turns compute-bound at {batch} users",
        holds=one.bound == "bandwidth" and prefill > one.read_s,
        why="from the device's peaks; the packaged model is too small to show it: its weights fit a processor's cache",
    )


CLAIMS = (
    Claim(
        "projections",
        "A cache turns the projections of a generation from quadratic to linear: 2,000 + 500 tokens need 1,124,750 "
        "token projections without one and about 2,500 with it",
        "common knowledge",
        _quadratic,
    ),
    Claim(
        "attention",
        "A cache turns the attention of a generation from cubic to quadratic",
        "common knowledge",
        _cubic,
    ),
    Claim(
        "document",
        "With a document of 10,000 words and 500 words out, 99 % of the work without a cache is repeated",
        "tutorials",
        _document,
    ),
    Claim("sizes", "The well-known table of cache sizes", "tutorials", _sizes),
    Claim(
        "70b",
        "A 70B model at 4,096, 32,768, 131,072 and 1,000,000 tokens: 1.25, 10, 40, 305 GB, times 32 for a batch of 32",
        "tutorials",
        _seventy,
    ),
    Claim(
        "128k", "About 40 GB for one user of Llama 3 70B at 128k tokens", "tutorials", _long_user
    ),
    Claim(
        "heads",
        "MQA shrinks the cache by the number of heads, GQA by heads over groups",
        "arXiv 1911.02150, 2305.13245",
        _heads,
    ),
    Claim("mla", "MLA needs 93.3 % less cache", "DeepSeek-V2, arXiv 2405.04434", _latents),
    Claim("gqa-int4", "GQA with INT4 is 16 times smaller", "tutorials", _sixteen),
    Claim(
        "mistral",
        "Mistral's rolling window makes the cache 8 times smaller, is bounded, and still spans 131k tokens",
        "arXiv 2310.06825",
        _mistral,
    ),
    Claim("read", "Reading 2 GB at 2 TB/s takes 1 ms", "tutorials", _read),
    Claim(
        "million",
        "LLaMA-7B serves 1 M tokens on one 80 GB card",
        "KVQuant, arXiv 2401.18079",
        _million,
    ),
    Claim("kivi-8x", "KIVI at 2 bits is 8 times smaller", "tutorials on arXiv 2402.02750", _kivi),
    Claim(
        "kvquant-8x", "KVQuant at 2 bits is 8 times smaller", "tutorials on 2401.18079", _kvquant
    ),
    Claim(
        "coupled", "Coupled quantization stores keys in 1 to 2 bits", "arXiv 2405.03918", _coupled
    ),
    Claim("bound", "Prefill is compute-bound, decode bandwidth-bound", "common knowledge", _bound),
    Claim(
        "paging-waste",
        "Paging cuts waste from 60 to 80 % to under 4 %",
        "vLLM, arXiv 2309.06180",
        _waste,
    ),
    Claim(
        "paging-users",
        "Paging serves 2 to 4 times as many users at a time",
        "vLLM, arXiv 2309.06180",
        _users,
    ),
)
