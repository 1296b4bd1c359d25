"""Attention over a planned step in plain torch: exact, on any device.

`reference` computes scores, softmax and sums in float32 (float64 for float64 queries), segment by segment, and merges.
`torch` is its fast twin for what it can do without changing results beyond the model's own rounding: products in the
model's dtype with a float32 softmax for single queries, and torch's fused attention for chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.attention.fused import attend_pieces, pieces
from quire.attention.observe import Attended, observe
from quire.attention.read import Read
from quire.attention.sparse import attend_chosen, choice_of, chosen_slots
from quire.attention.step import Step
from quire.errors import InvariantError
from quire.ops.attend import Partial, attend, empty_partial, merge, sink_partial

SCORE_BYTES = 64 << 20
"""Scores materialised at once by a chunk of queries."""

FUSED_ELEMENTS = 1 << 18
"""In 16 bits torch's fused attention of single queries is faster than two products up to so many elements of keys
(benchmarks/overhead.py); in float32 always."""

DENSE_BYTES = 32 << 20
"""Of a chunk's decoded keys and values at a time, where a backend decodes the heads that it is asked for."""

ALL = slice(None)
_NO_LSE = torch.empty(0)


class ReferenceBackend:
    """The plain backend; `write` and `run` are the whole interface."""

    name = "reference"

    def write(self, step: Step, layer: int, values: dict[str, torch.Tensor]) -> None:
        """Stores the new tokens' fields of one layer, `[n_tokens, heads, *shape]`, and seals what became whole."""
        step.write(layer, values)

    def run(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        *,
        scale: float,
        keys: tuple[str, ...] = ("k",),
        value: str = "v",
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        window: int | None = None,
        attended: Attended | None = None,
    ) -> torch.Tensor:
        """Attends every new token of the step to what it may read in `layer`.

        Args:
            q: `[n_tokens, H_q, D]`, post-RoPE; head h reads KV head h // (H_q / H_kv).
            keys: fields whose concatenation over the last dimension is the key (`("latent", "k_rope")` for MLA).
            value: field that is the value.
            softcap, sinks, window: as in `ops.attend`; sinks `[H_q]`; window narrows the layer's span.
            attended: filled in with what was paid to each slot, for who asks.

        Returns:
            `[n_tokens, H_q, D_v]` in q's dtype.
        """
        reads = step.of_layer(layer)[2]
        if step.away:
            return self._streamed(step, layer, q, scale, keys, value, softcap, sinks, window)
        if attended is not None:
            attended.begin(q)
            self.observe(step, layer, q, reads, attended, keys, scale, softcap, sinks, window)
        return self.run_reads(
            step,
            layer,
            q,
            reads,
            scale=scale,
            keys=keys,
            value=value,
            softcap=softcap,
            sinks=sinks,
            window=window,
        )

    def observe(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        reads: list[Read],
        attended: Attended,
        keys: tuple[str, ...],
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        window: int | None,
    ) -> None:
        """Answers `attended` for some of the layer's reads, all those of their queries."""

        def keys_of(r: Read) -> torch.Tensor:
            parts = [self._gather(step, layer, r, n, q.dtype) for n in keys]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

        observe(
            attended,
            q,
            reads,
            keys_of,
            layer=layer,
            share=q.shape[1] // max(1, kv_heads_of(step.of_layer(layer)[2], layer)),
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            window=window,
            turn=lambda r, some, part: turned_back(step, layer, r, some, part),
        )

    def run_reads(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        reads: list[Read],
        *,
        scale: float,
        keys: tuple[str, ...],
        value: str,
        softcap: float | None,
        sinks: torch.Tensor | None,
        window: int | None,
    ) -> torch.Tensor:
        """`run` over some of the layer's reads; what queries of other reads get means nothing."""
        r = reads[0]
        alone = len(reads) == 1 and not r.sinks
        if sinks is None and alone and r.contiguous and r.tokens.numel() == len(q):
            part = self._read(
                step,
                layer,
                r,
                q.view(*r.tokens.shape, *q.shape[1:]),
                scale,
                keys,
                value,
                softcap,
                window,
                want_lse=False,
            )
            return part.out.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1).to(q.dtype)
        share = q.shape[1] // max(1, kv_heads_of(step.of_layer(layer)[2], layer))
        return self._fold(step, layer, q, reads, share, scale, keys, value, softcap, sinks, window)

    def _fold(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        reads: list[Read],
        share: int,
        scale: float,
        keys: tuple[str, ...],
        value: str,
        softcap: float | None,
        sinks: torch.Tensor | None,
        window: int | None,
    ) -> torch.Tensor:
        """The general case: partial results per segment and head, merged in token order."""
        total = self._partials(
            step, layer, q, reads, None, share, scale, keys, value, softcap, window
        )
        return self._total(total, q, sinks)

    def _streamed(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        scale: float,
        keys: tuple[str, ...],
        value: str,
        softcap: float | None,
        sinks: torch.Tensor | None,
        window: int | None,
        *,
        near: bool = False,
    ) -> torch.Tensor:
        """What is here, then what is away, run by run as it is staged: the same sum in more parts.

        `near`: `Step.near` at once, for `_partials` that reads it.
        """
        reads = step.near(layer)[0] if near else step.of_layer(layer)[2]
        share = q.shape[1] // max(1, kv_heads_of(reads, layer))
        rest = share, scale, keys, value, softcap, window
        total = self._partials(step, layer, q, reads, None, *rest)
        for r in step.staged(layer, far=near):
            total = self._partials(step, layer, q, [r], total, *rest)
        return self._total(total, q, sinks)

    @staticmethod
    def _total(total: Partial, q: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """The sum `[n_tokens, H_q, D_v]` in q's dtype, with the model's sink logits."""
        if sinks is not None:
            turned = Partial(total.out.transpose(0, 1), total.lse.transpose(0, 1))
            total = Partial(
                merge(turned, sink_partial(sinks, turned)).out.transpose(0, 1), total.lse
            )
        return total.out.to(q.dtype)

    def _partials(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        reads: list[Read],
        total: Partial | None,
        share: int,
        scale: float,
        keys: tuple[str, ...],
        value: str,
        softcap: float | None,
        window: int | None,
    ) -> Partial:
        """`total` (default: nothing yet) with these reads merged in: `[n_tokens, H_q, D_v]` and `[n_tokens, H_q]`."""
        for r in reads:
            heads = torch.tensor(
                [h * share + g for h in r.group.heads(layer) for g in range(share)], device=q.device
            )
            part = self._read(
                step,
                layer,
                r,
                turned_back(step, layer, r, q[r.tokens][:, :, heads]),
                scale,
                keys,
                value,
                softcap,
                window,
                want_lse=True,
            )
            if total is None:
                dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
                total = empty_partial((q.shape[0], q.shape[1]), part.out.shape[-1], dtype, q.device)
            at = r.tokens.unsqueeze(-1), heads  # [R, T, 1] x [heads]
            mine = Partial(
                part.out.transpose(1, 2).to(total.out.dtype),
                part.lse.transpose(1, 2).to(total.lse.dtype),
            )
            both = merge(Partial(total.out[at], total.lse[at]), mine)
            total.out[at], total.lse[at] = both.out, both.lse
        assert total is not None
        return total

    def _read(
        self,
        step: Step,
        layer: int,
        r: Read,
        q: torch.Tensor,
        scale: float,
        keys: tuple[str, ...],
        value: str,
        softcap: float | None,
        window: int | None,
        *,
        want_lse: bool,
    ) -> Partial:
        """One batch: `q: [R, T, heads, D]` to Partial over `[R, heads, T]`."""
        k, v = self._keys_and_values(step, layer, r, keys, value, q.dtype)
        choice = choice_of(step, r, layer)
        if choice is not None:
            chosen = chosen_slots(step, layer, r, q[:, 0], scale, choice)
            return attend_chosen(q, k, v, chosen, r.mask(window), scale, softcap)
        return self._segment(q.transpose(1, 2), k, v, r, window, scale, softcap, want_lse=want_lse)

    def _keys_and_values(
        self,
        step: Step,
        layer: int,
        r: Read,
        keys: tuple[str, ...],
        value: str,
        dtype: torch.dtype,
        heads: slice = ALL,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a batch reads, `[R, heads, N, D]` each, in scratch memory that is good until the next call."""
        if len(keys) == 1 and keys[0] != value and r.mode == "raw":
            one, two = step.gather_both(layer, r, (keys[0], value), dtype)
            return one[:, heads], two[:, heads]
        names = dict.fromkeys((*keys, value))
        fields = {n: self._gather(step, layer, r, n, dtype, heads) for n in names}
        k = fields[keys[0]] if len(keys) == 1 else torch.cat([fields[n] for n in keys], -1)
        return k, fields[value]

    def _gather(
        self,
        step: Step,
        layer: int,
        r: Read,
        name: str,
        dtype: torch.dtype,
        heads: slice = ALL,
    ) -> torch.Tensor:
        """One field of a batch, decoded: `[R, heads, N, *shape]`."""
        return step.gather(layer, r, name, dtype)[:, heads]

    def _segment(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        r: Read,
        window: int | None,
        scale: float,
        softcap: float | None,
        *,
        want_lse: bool,
    ) -> Partial:
        """`q: [R, H_q, T, D]`, `k, v: [R, H_kv, N, D]`, read as `r` says."""
        mask = r.mask(window)
        rows = max(1, SCORE_BYTES // (4 * q.shape[0] * q.shape[1] * max(1, k.shape[2])))
        if rows >= q.shape[2]:
            return attend(q, k, v, scale=scale, mask=mask, softcap=softcap)
        parts = [
            attend(
                q[:, :, i : i + rows],
                k,
                v,
                scale=scale,
                mask=None if mask is None else mask[:, i : i + rows],
                softcap=softcap,
            )
            for i in range(0, q.shape[2], rows)
        ]
        return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))


class TorchBackend(ReferenceBackend):
    """The fast twin."""

    name = "torch"
    by_head = False
    """Whether `_gather` decodes no more than the heads that it is asked for."""

    def run_reads(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        reads: list[Read],
        *,
        scale: float,
        keys: tuple[str, ...],
        value: str,
        softcap: float | None,
        sinks: torch.Tensor | None,
        window: int | None,
    ) -> torch.Tensor:
        """As the plain one; what a chunk reads in several segments is put side by side for one fused call."""
        chunks: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Read]] = {}
        rest = reads
        split = len(reads) > 1 or not reads[0].contiguous
        if sinks is None and softcap is None and split and not any(r.sinks for r in reads):
            rest = [r for r in reads if r.queries == 1]
            for r in reads:
                if r.queries > 1:
                    chunks.setdefault((tuple(r.firsts), r.group.heads(layer)), []).append(r)
        out: torch.Tensor | None = None
        if rest:
            out = super().run_reads(
                step,
                layer,
                q,
                rest,
                scale=scale,
                keys=keys,
                value=value,
                softcap=softcap,
                sinks=sinks,
                window=window,
            )
        share = q.shape[1] // max(1, kv_heads_of(step.of_layer(layer)[2], layer))
        for (_, kv_heads), parts in chunks.items():
            heads = torch.tensor(
                [h * share + g for h in kv_heads for g in range(share)], device=q.device
            )
            at = parts[0].tokens.unsqueeze(-1), heads  # [R, T, 1] x [heads]
            done = self._joined(step, layer, q[at], parts, scale, keys, value, window)
            if out is None:
                out = q.new_zeros(*q.shape[:2], done.shape[-1])
            out[at] = done
        assert out is not None
        return out

    def _joined(
        self,
        step: Step,
        layer: int,
        q: torch.Tensor,
        parts: list[Read],
        scale: float,
        keys: tuple[str, ...],
        value: str,
        window: int | None,
    ) -> torch.Tensor:
        """Segments of the same rows and heads in one call: `q: [R, T, heads, D]` to `[R, T, heads, D_v]`."""
        n_heads = len(parts[0].group.heads(layer))
        share, at_once = q.shape[2] // n_heads, n_heads
        if self.by_head and any(r.mode == "body" for r in parts):
            n_slots = sum(r.kpos.numel() for r in parts)
            at_once = max(1, DENSE_BYTES // (2 * n_slots * q.shape[3] * q.element_size()))
        out = []
        for first in range(0, n_heads, at_once):
            heads = slice(first, min(n_heads, first + at_once))
            fields = []
            for r in parts:
                kv = self._keys_and_values(step, layer, r, keys, value, q.dtype, heads)
                fields.append(kv if r is parts[-1] else tuple(x.clone() for x in kv))  # scratch
            k, v = (torch.cat(x, 2) if len(x) > 1 else x[0] for x in zip(*fields, strict=True))
            part = q[:, :, heads.start * share : heads.stop * share].transpose(1, 2)
            done = self._many(part, k, v, parts, window, scale)
            out.append(done.transpose(1, 2))
        return out[0] if len(out) == 1 else torch.cat(out, 2)

    def _segment(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        r: Read,
        window: int | None,
        scale: float,
        softcap: float | None,
        *,
        want_lse: bool,
    ) -> Partial:
        plain = not want_lse and softcap is None
        if q.shape[2] == 1 and q.dtype != torch.float64:
            if not plain or (q.dtype != torch.float32 and k.numel() > FUSED_ELEMENTS):
                return self._single(q, k, v, r.mask(window), scale, softcap, want_lse=want_lse)
            # The query heads of a KV head stand side by side as its queries: keys and values are not repeated.
            grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            out = F.scaled_dot_product_attention(
                grouped, k, v, attn_mask=r.bias(window, q.dtype), scale=scale
            )
            return Partial(out.reshape(*q.shape[:3], v.shape[3]), _NO_LSE)
        if not plain:
            if softcap is None and _flash_gives_lse(q, k, v) and r.mask(window) is None:
                # Nothing is masked, so the query heads of a KV head are as many more queries.
                rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
                out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001 - no other gives it
                    rows, k, v, scale=scale
                )
                return Partial(out.reshape(*q.shape[:3], v.shape[3]), lse.reshape(q.shape[:3]))
            return super()._segment(q, k, v, r, window, scale, softcap, want_lse=want_lse)
        return Partial(self._many(q, k, v, [r], window, scale), _NO_LSE)

    def _many(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parts: list[Read],
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """Many queries over what some reads of theirs have side by side: `[R, H_q, T, D_v]`."""
        return attend_pieces(q, k, v, pieces(parts, window), scale)

    @staticmethod
    def _single(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        *,
        want_lse: bool,
    ) -> Partial:
        """One query per row: the query heads of a KV head are the rows of one product."""
        r, heads, _, d = q.shape
        s = torch.matmul((q * scale).reshape(r, k.shape[1], -1, d), k.transpose(-1, -2)).float()
        if softcap is not None:
            s = torch.tanh(s / softcap) * softcap
        if mask is not None:
            s = s.masked_fill(~mask.unsqueeze(1), float("-inf"))
        lse = torch.logsumexp(s, -1, keepdim=True) if want_lse else None
        p = (
            torch.softmax(s, -1)
            if lse is None
            else torch.exp(s - torch.where(torch.isfinite(lse), lse, 0.0))
        )
        out = torch.matmul(p.to(v.dtype), v).reshape(r, heads, 1, v.shape[-1])
        return Partial(out, _NO_LSE if lse is None else lse.reshape(r, heads, 1))


def _flash_gives_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch's fused attention serves these tensors and says the log-sum-exp as well."""
    alike = q.dtype == k.dtype == v.dtype and q.shape[3] == v.shape[3]
    return alike and q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)


def turned_back(
    step: Step, layer: int, r: Read, q: torch.Tensor, part: slice = ALL
) -> torch.Tensor:
    """Queries `[R, T, heads, D]` of a read as it wants them: turned back for the sinks of a streaming span."""
    if not r.sinks or not int(r.turned.max()):
        return q
    if step.turn is None:
        raise InvariantError("a streaming span needs a model whose RoPE can be turned back")
    return step.turn(layer, q, -r.turned[:, part].unsqueeze(-1))


def kv_heads_of(reads: list[Read], layer: int) -> int:
    """KV heads of the layer: each group counts once, a lossy body and its raw companion together."""
    return len({h for r in reads for h in r.group.heads(layer)})
