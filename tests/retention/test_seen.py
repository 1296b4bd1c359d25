"""What the engine shows a policy is what transformers' own attention, keys and queries say."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import zoo
from quire.retention import parse_keep
from quire.retention.contract import Seen
from retention.kept import PLAIN, prompts, run, small

N, HEADS, SHARE = 150, 2, 2
[PROMPT] = prompts([N], zoo.VOCAB, seed=4)
SCORED = [p for p in PLAIN if p not in ("random", "fastgen")]


class Dense:
    """One forward of transformers with nothing of ours: `[heads, N, N]` probabilities, keys, values and queries."""

    def __init__(self) -> None:
        self.model = zoo.build("llama")
        self.model.set_attn_implementation("eager")
        hidden: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda _m, _a, kwargs: hidden.append(kwargs["hidden_states"]), with_kwargs=True
            )
        cache, at = DynamicCache(), torch.arange(N)[None]
        with torch.no_grad():
            out = self.model(torch.tensor([PROMPT]), past_key_values=cache, output_attentions=True)
            cos, sin = self.model.model.rotary_emb(hidden[0], at)
            self.p = [a[0].double() for a in out.attentions]
            self.kv = [(x.keys[0], x.values[0]) for x in cache.layers]
            self.q = []
            for layer, h in zip(self.model.model.layers, hidden, strict=True):
                q = layer.self_attn.q_proj(h).view(1, N, HEADS * SHARE, -1).transpose(1, 2)
                self.q.append(apply_rotary_pos_emb(q, q, cos, sin)[0][0])
        self.angles = self.model.model.rotary_emb.inv_freq

    def turn(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        theta = torch.cat([by[..., None] * self.angles] * 2, -1)
        a, b = x.chunk(2, -1)
        return x * theta.cos() + torch.cat([-b, a], -1) * theta.sin()

    def mass(self, layer: int, policy: Any) -> torch.Tensor | None:
        """`[HEADS, N]`, query by query."""
        if policy.queries is None:
            return None
        p = self.p[layer].unflatten(0, (HEADS, SHARE))
        p = p.amax(1) if policy.fold == "max" else p.mean(1)
        out = torch.zeros(HEADS, N, dtype=torch.float64)
        for i in range(N if policy.queries == "all" else policy.queries):
            query = N - 1 - i
            for h in range(HEADS):
                if policy.over == "sum":
                    out[h] += p[h, query]
                    continue
                for j in p[h, query, : query + 1].topk(min(policy.top, query + 1)).indices.tolist():
                    out[h, j] = max(float(out[h, j]), query + 1)
        return out

    def show(self, layer: int, policy: Any) -> Seen:
        k, v = self.kv[layer]
        last = policy.last_queries
        return Seen(
            coords=tuple((layer, h) for h in range(HEADS)),
            n_layers=3,
            positions=torch.arange(N).expand(HEADS, N),
            length=N,
            prompt_tokens=N,
            read={"k": k, "v": v}.__getitem__,
            mass=self.mass(layer, policy),
            queries=self.q[layer][:, N - last :] if last else None,
            query_positions=torch.arange(N - last, N) if last else None,
            scale=64**-0.5,
            turn=self.turn,
        )


@cache
def dense() -> Dense:
    return Dense()


@pytest.mark.parametrize("policy", SCORED)
@pytest.mark.parametrize(("attention", "step_tokens"), [("reference", 48), ("auto", 4096)])
def test_the_best_by_transformers_own_figures_stay(
    policy: str, attention: str, step_tokens: int
) -> None:
    keep = small(policy)
    got = run(
        zoo.build("llama"),
        [(PROMPT, keep)],
        n_tokens=2,
        attention=attention,
        step_tokens=step_tokens,
    )
    kept, chosen = got.seen.of(N)[N], parse_keep(keep).policy
    safe = {0, 1, *range(N - 4, N)}
    for layer in range(3):
        scores = chosen.score(dense().show(layer, chosen)).double()
        near = 1e-4 * float(scores[:, 2 : N - 4].std())
        for h in range(HEADS):
            mine = set(kept[layer, h])
            assert len(mine) == round(0.4 * N)
            assert safe <= mine
            worst = min(float(scores[h, i]) for i in mine - safe)
            best = max(float(scores[h, i]) for i in set(range(N)) - mine)
            assert worst >= best - near, (layer, h)


def test_heads_of_fastgen_are_those_that_transformers_own_attention_names() -> None:
    policy = parse_keep("fastgen").policy
    recovered: dict[tuple[int, int], tuple[float, float]] = {}
    for layer in range(3):
        mass = dense().mass(layer, policy)
        assert mass is not None
        for h in range(HEADS):
            share = (mass[h] / mass[h].sum()).tolist()
            middle = sorted(share[2 : N - 4], reverse=True)
            protected = 1 - sum(middle)
            recovered[layer, h] = protected, protected + sum(middle[: round(0.4 * N) - 6])
    heavy = sorted(x for _, x in recovered.values())
    for recover in (heavy[2] + heavy[3]) / 2, max(p for p, _ in recovered.values()) - 1e-4:
        keep = small("fastgen") + f",recover={recover}"
        kept = run(zoo.build("llama"), [(PROMPT, keep)], n_tokens=2).seen.of(N)[N]
        sizes = set()
        for coord, (protected, more) in recovered.items():
            want = 6 if protected >= recover else 60 if more >= recover else N
            assert abs(len(kept[coord]) - want) <= 4, "rounded to blocks of 8"
            sizes.add(want)
        assert len(sizes) > 1, "the control: heads differ here"


@pytest.mark.parametrize(
    ("policy", "want"), [("snapkv", [64, 8, 8]), ("tova", [1, 1, 1]), ("rkv", [8, 8, 8])]
)
def test_what_the_last_queries_paid_is_counted_once(
    policy: str, want: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probabilities of a query sum to one; of those before tokens went last, nothing is left."""
    cls, sums = type(parse_keep(policy).policy), []
    score = cls.score

    def noting(self: Any, seen: Seen) -> torch.Tensor:
        assert seen.mass is not None
        if seen.layer == 2:
            sums.append((seen.length, seen.mass.sum(-1)))
        found: torch.Tensor = score(self, seen)
        return found

    monkeypatch.setattr(cls, "score", noting)
    monkeypatch.setattr(cls, "fold", "mean")
    run(zoo.build("llama"), [(PROMPT, small(policy))])
    assert [n for n, _ in sums] == [N, N + 8, N + 16]
    for (_, paid), n in zip(sums, want, strict=True):
        torch.testing.assert_close(paid, torch.full((HEADS,), float(n)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("policy", ["h2o", "lru", "ada(h2o)"])
def test_what_was_paid_goes_on_with_its_token(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(parse_keep(policy.rpartition("(")[2].rstrip(")")).policy)
    score, seen_at = cls.score, {}  # type: ignore[var-annotated]

    def noting(self: Any, seen: Seen) -> torch.Tensor:
        assert seen.mass is not None
        for coord, positions, mass in zip(seen.coords, seen.positions, seen.mass, strict=True):
            paid = dict(zip(positions.tolist(), mass.tolist(), strict=True))
            seen_at[seen.length, coord] = paid
        found: torch.Tensor = score(self, seen)
        return found

    monkeypatch.setattr(cls, "score", noting)
    run(zoo.build("llama"), [(PROMPT, small(policy))])
    for layer in range(3):
        for h in range(HEADS):
            for n in (N + 8, N + 16):
                before, after = seen_at[n - 8, (layer, h)], seen_at[n, (layer, h)]
                most = n if policy == "lru" else 8
                assert len(set(before.values())) > 10
                for p in after.keys() & before.keys():
                    assert before[p] - 1e-5 <= after[p] <= before[p] + most
                assert set(after) <= {*before, *range(n - 8, n)}
