"""Wrong numbers in circulation, each beside the right one, which is worked out and not typed."""

from __future__ import annotations

from quire.evaluate.claims.arithmetic import MIB, demand, gib

__all__ = ["slips"]


def slips() -> list[dict[str, str]]:
    """Rows of `said`, `right` and `why`."""
    l70, l13 = demand("llama-2-70b"), demand("llama-2-13b")
    big = demand("llama-3.1-405b").setup.shape
    weights = 70.55e9 * 2
    rate = 2000 / 1250
    rows = [
        (
            "a token of a 70B model takes 1.6 MB, 32k tokens 50 GB",
            f"{l70.bytes_per_token / 1024:.0f} KiB and {gib(l70.sequence_bytes(32_768))}",
            "80 layers, 8 KV heads of 128, 16 bits: 1.6 MB is five times that, and MHA would be 2.5 MiB",
        ),
        (
            "LLaMA-2 13B takes 0.6 MB a token and 2.5 GB at 4,096",
            f"{l13.bytes_per_token / MIB:.2f} MiB and {gib(l13.sequence_bytes(4096))}",
            "40 layers of 40 heads of 128",
        ),
        (
            "Llama-3.1-405B has 32 query heads",
            f"{big.heads} query heads over {big.kv_heads} KV heads",
            "its config",
        ),
        (
            "with a cache each step's attention is constant",
            "linear in the context",
            "one query reads every cached key and value",
        ),
        (
            "38 sessions of 2,500 tokens of a 70B model fit 80 GB at 2.1 GB each",
            f"{l70.sequence_bytes(2500) / 1e9:.2f} GB each, and the weights alone take {weights / 1e9:.0f} GB",
            "weights do not go away when the cache is counted",
        ),
        (
            "12.4 s for an answer without a cache beside a prefill rate of 1,250 tokens/s",
            f"about {1_124_750 / 1250:,.0f} s without a cache at that rate, {rate:.1f} s for the prompt",
            "1,124,750 token passes: off by about 70 times",
        ),
        (
            "a cache takes layers x tokens x 2 x hidden size",
            "layers x tokens x 2 x KV heads x head width x bytes",
            "the first holds where every head keeps its own keys, and counts elements",
        ),
        (
            "Infini-attention reuses a cache across requests",
            "a compressive memory within one sequence",
            "arXiv 2404.07143",
        ),
        (
            "sizes printed as MB and GB in such tables",
            "MiB and GiB",
            "0.5 MB a token is 524,288 bytes",
        ),
    ]
    return [{"said": a, "right": b, "why": c} for a, b, c in rows]
