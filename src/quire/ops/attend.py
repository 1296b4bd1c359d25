"""Softmax attention as a fold: each segment gives (out, log-sum-exp), and partial results merge in any order.

For one query, a segment S of keys gives

    lse(S) = log sum_{j in S} exp(s_j),      out(S) = sum_{j in S} exp(s_j - lse(S)) v_j

and for disjoint segments A, B:  lse = logaddexp(lse_A, lse_B),  out = e^(lse_A - lse) out_A + e^(lse_B - lse) out_B.
The empty segment (lse = -inf, out = 0) is the identity; a learned sink logit is a segment with zero output.
Source: the online softmax (arXiv 1805.02867) and its use for split keys in FlashDecoding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """Attention over a part of the keys.

    `out: [..., H_q, T, D_v]` in the accumulation dtype; `lse: [..., H_q, T]`, natural logarithm, -inf where no key was
    seen.
    """

    out: torch.Tensor
    lse: torch.Tensor


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Partial:
    """Attention of queries over one segment.

    Args:
        q: `[..., H_q, T, D]`; H_q a multiple of H_kv, query head h reads KV head h // (H_q / H_kv).
        k: `[..., H_kv, N, D]`.
        v: `[..., H_kv, N, D_v]`.
        scale: multiplies the scores.
        mask: True where a query may read, broadcastable to `[..., T, N]`.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma2).
        dtype: of scores, softmax and sums: float32 by default, float64 when q is.

    Returns:
        Partial with `out: [..., H_q, T, D_v]`.

    Cost: one read of k and v; T x N scores per query head are materialised.
    """
    dtype = dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    *lead, heads, t, d = q.shape
    kv_heads, n = k.shape[-3], k.shape[-2]
    share = heads // kv_heads
    grouped = q.reshape(*lead, kv_heads, share * t, d).to(dtype)
    s = torch.matmul(grouped, k.to(dtype).transpose(-1, -2)) * scale
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    s = s.reshape(*lead, heads, t, n)
    if mask is not None:
        s = s.masked_fill(~mask.unsqueeze(-3), float("-inf"))
    if n == 0:
        return empty_partial((*lead, heads, t), v.shape[-1], dtype, q.device)
    top = s.amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    out = torch.matmul(p.reshape(*lead, kv_heads, share * t, n), v.to(dtype)).reshape(
        *lead, heads, t, v.shape[-1]
    )
    return Partial(
        out / total.clamp_min(torch.finfo(dtype).tiny), (top + torch.log(total)).squeeze(-1)
    )


def merge(a: Partial, b: Partial) -> Partial:
    """The attention over both segments. Associative and commutative up to rounding; `empty_partial` is the identity."""
    lse = torch.logaddexp(a.lse, b.lse)
    safe = torch.where(torch.isfinite(lse), lse, torch.zeros_like(lse))
    wa, wb = torch.exp(a.lse - safe).unsqueeze(-1), torch.exp(b.lse - safe).unsqueeze(-1)
    return Partial(a.out * wa + b.out * wb, lse)


def empty_partial(
    shape: tuple[int, ...], d_v: int, dtype: torch.dtype, device: torch.device
) -> Partial:
    """The identity of `merge`: no key seen. `shape` is that of lse."""
    return Partial(
        torch.zeros(*shape, d_v, dtype=dtype, device=device),
        torch.full(shape, float("-inf"), dtype=dtype, device=device),
    )


def sink_partial(logits: torch.Tensor, like: Partial) -> Partial:
    """A learned sink logit per query head (`[H_q]`, gpt-oss) as a segment: weight in the softmax, zero output."""
    lse = logits.to(like.lse.dtype).unsqueeze(-1).expand_as(like.lse)
    return Partial(torch.zeros_like(like.out), lse)


def finish(part: Partial, dtype: torch.dtype) -> torch.Tensor:
    """The attention output in `dtype`; zeros where no key was seen."""
    return part.out.to(dtype)
