"""One layer's step over real blocks, with the dense answer in float64 at hand: what attention backends are held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from laws.dense import first_raw, may_read
from lossy import Lossy, decoded
from quire.attention import ReferenceBackend, Row, Step
from quire.plan import KVLayer, build_layout
from quire.spans import Full, Span
from quire.spec import Field, KVConfig
from quire.store import BlockStore

TOLERANCE = {torch.float64: 1e-12, torch.float32: 6e-6, torch.bfloat16: 3e-2, torch.float16: 2e-3}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


FULL = Full()


@dataclass(frozen=True)
class Case:
    """One layer, one step: `lengths` are (cached, new) tokens per row; `split` heads keep a part of the past only."""

    lengths: tuple[tuple[int, int], ...]
    span: Span = FULL
    size: int = 4
    heads: int = 2
    share: int = 2
    dtype: str = "float32"
    residual: int | None = None
    softcap: float | None = None
    sinks: bool = False
    window: int | None = None
    split: bool = False
    seed: int = 0
    width: int = 8


class Bench:
    """The case's store, filled, with the step planned and the dense answer at hand."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        g = torch.Generator().manual_seed(case.seed)
        fields = (Field("k", (case.width,), case.dtype), Field("v", (case.width,), case.dtype))
        codecs = None if case.residual is None else {"": Lossy(case.residual)}
        layers = [KVLayer(0, case.heads, fields, case.span)]
        self.layout = build_layout(
            layers, KVConfig(block_tokens=case.size), dtype=case.dtype, codecs=codecs
        )
        room = sum(2 * self.layout.spec.bytes_for(sum(n)) + (1 << 18) for n in case.lengths)
        self.store = BlockStore(self.layout.spec, room, device="cpu")
        self.store.arena.buffer.fill_(255)  # no number in any float format
        self.kv, rows, self.gone = [], [], []
        for cached, new in case.lengths:
            n = cached + new
            kv = torch.randn(2, n, case.heads, case.width, generator=g).to(self.dtype)
            table = self.store.open()
            at = 0
            while (
                at < cached
            ):  # in two chunks, so that what a later step finds was not written at once
                stop = cached if at else max(1, cached // 2)
                table.append(stop - at)
                self._write(Step(self.store, self.layout, [Row(table, at, stop)]), kv[:, at:stop])
                table.commit()
                at = stop
            gone: set[int] = set()
            if case.split and cached > 2:
                other = table.split(0, [(0, case.heads - 1)])
                have = table.chains[other].positions(cached)
                keep = have[::2]
                table.keep(other, keep)
                gone = set(range(cached)) - set(keep.tolist())
            table.append(new)
            self.gone.append(gone)
            rows.append(Row(table, cached, n))
            self.kv.append(kv)
        self.step = Step(self.store, self.layout, rows)
        self._write(
            self.step, torch.cat([kv[:, r.start :] for kv, r in zip(self.kv, rows, strict=True)], 1)
        )
        heads_q = case.heads * case.share
        self.q = torch.randn(self.step.n_tokens, heads_q, case.width, generator=g).to(self.dtype)
        self.logits = torch.randn(heads_q, generator=g) if case.sinks else None

    @staticmethod
    def _write(step: Step, kv: torch.Tensor) -> None:
        step.write(0, {"k": kv[0], "v": kv[1]})

    def run(self, backend: ReferenceBackend, q: torch.Tensor | None = None) -> torch.Tensor:
        c = self.case
        return backend.run(
            self.step,
            0,
            self.q if q is None else q,
            scale=0.4,
            softcap=c.softcap,
            sinks=self.logits,
            window=c.window,
        )

    def dense(self) -> torch.Tensor:
        c, out, at = self.case, [], 0
        for kv, row, gone in zip(self.kv, self.step.rows, self.gone, strict=True):
            raw = kv.double()
            coded = raw.clone()
            for b in range(row.stop // c.size if c.residual is not None else 0):
                part = slice(b * c.size, (b + 1) * c.size)
                for x in range(2):
                    for h in range(c.heads):
                        block = decoded(kv[x, part, h].float().numpy(), b * c.size)
                        coded[x, part, h] = torch.from_numpy(block).to(self.dtype).double()
            for i in range(row.start, row.stop):
                limit = 0 if c.residual is None else first_raw(i, c.size, c.residual)
                out.append(self._query(self.q[at].double(), raw, coded, i, limit, gone))
                at += 1
        return torch.stack(out)

    def _query(
        self,
        q: torch.Tensor,
        raw: torch.Tensor,
        coded: torch.Tensor,
        i: int,
        limit: int,
        gone: set[int],
    ) -> torch.Tensor:
        c, out = self.case, []
        for h in range(c.heads * c.share):
            head = h // c.share
            lost = gone if head == c.heads - 1 else set()
            seen = [j for j in range(i + 1) if may_read(c.span, i, j) and j not in lost]
            seen = [j for j in seen if c.window is None or i - j < c.window]
            k = torch.stack([(coded if j < limit else raw)[0, j, head] for j in seen])
            v = torch.stack([(coded if j < limit else raw)[1, j, head] for j in seen])
            s = k @ q[h] * 0.4
            if c.softcap is not None:
                s = c.softcap * torch.tanh(s / c.softcap)
            if self.logits is not None:
                s = torch.cat([s, self.logits[h : h + 1].double()])
                v = torch.cat([v, torch.zeros(1, c.width, dtype=torch.float64)])
            out.append(torch.softmax(s, 0) @ v)
        return torch.stack(out)


def check(case: Case, backend: ReferenceBackend) -> None:
    bench = Bench(case)
    got = bench.run(backend)
    assert got.shape == bench.q.shape
    assert got.dtype == bench.dtype
    bound = TOLERANCE[bench.dtype]
    torch.testing.assert_close(got.double(), bench.dense(), rtol=bound, atol=bound)
