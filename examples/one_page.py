"""A decoder on one page: plain torch, Quire's own store, and the proof that caching changes no token.

    python examples/one_page.py

Follow one token's K and V: `Decoder.forward` computes them, `step.write` puts them into the row of a block that
`table.append` reserved, `backend.run` reads them back for every later token, `table.commit` seals the block once it is
full. `recompute` is the same decoder without any of this.
"""

from __future__ import annotations

import torch

from quire.attention import Row, Step
from quire.attention.reference import ReferenceBackend
from quire.ops import attend, rope_angles, rotate_half
from quire.plan import KVLayer, build_layout
from quire.spec import Field, KVConfig
from quire.store import BlockStore, BlockTable

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 101, 128, 3, 4, 2, 32
SCALE = HEAD_DIM**-0.5


class Decoder:
    """A pre-norm transformer with grouped-query attention and RoPE; random weights, seeded."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) * (1.5 / columns**0.5)

        self.embed, self.head = matrix(VOCAB, WIDTH), matrix(VOCAB, WIDTH)
        self.layers = [
            {
                "q": matrix(HEADS * HEAD_DIM, WIDTH),
                "k": matrix(KV_HEADS * HEAD_DIM, WIDTH),
                "v": matrix(KV_HEADS * HEAD_DIM, WIDTH),
                "o": matrix(WIDTH, HEADS * HEAD_DIM),
                "up": matrix(2 * WIDTH, WIDTH),
                "down": matrix(WIDTH, 2 * WIDTH),
            }
            for _ in range(LAYERS)
        ]

    def forward(self, tokens: list[int], start: int, attention: Attention) -> torch.Tensor:
        """Logits after `tokens[start:]`; what came before is the attention's business. `[VOCAB]`."""
        x = self.embed[tokens[start:]]
        cos, sin = rope_angles(torch.arange(start, len(tokens)), HEAD_DIM)
        cos, sin = cos[:, None], sin[:, None]  # [T, 1, HEAD_DIM / 2]: the same for all heads
        for number, w in enumerate(self.layers):
            h = torch.nn.functional.rms_norm(x, (WIDTH,))
            q = rotate_half((h @ w["q"].T).view(-1, HEADS, HEAD_DIM), cos, sin)
            k = rotate_half((h @ w["k"].T).view(-1, KV_HEADS, HEAD_DIM), cos, sin)
            v = (h @ w["v"].T).view(-1, KV_HEADS, HEAD_DIM)
            x = x + attention(number, q, k, v).flatten(1) @ w["o"].T
            h = torch.nn.functional.rms_norm(x, (WIDTH,))
            x = x + torch.relu(h @ w["up"].T) @ w["down"].T
        return torch.nn.functional.rms_norm(x[-1], (WIDTH,)) @ self.head.T


class Attention:
    """`(layer, q, k, v) -> out`, each `[T, heads, HEAD_DIM]`. This one keeps nothing: all tokens are new."""

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return attend(q, k, v, scale=SCALE, mask=causal).out.transpose(0, 1)


class Cached(Attention):
    """The same over blocks: writes the new tokens, reads all of them."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.backend = ReferenceBackend()

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        self.step.write(layer, {"k": k, "v": v})
        return self.backend.run(self.step, layer, q, scale=SCALE)


def recompute(model: Decoder, prompt: list[int], n_tokens: int) -> list[int]:
    """Greedy text, every token computed anew at every step."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(int(model.forward(tokens, 0, Attention()).argmax()))
    return tokens[len(prompt) :]


def generate(model: Decoder, table: BlockTable, prompt: list[int], n_tokens: int) -> list[int]:
    """Greedy text from a cache: after the prompt each step computes one token."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        start = table.length
        table.append(len(tokens) - start)  # room for the new tokens, or CapacityError
        step = Step(table.store, LAYOUT, [Row(table, start, len(tokens))])
        tokens.append(int(model.forward(tokens, start, Cached(step)).argmax()))
        table.commit()  # they are final: full blocks are sealed
    return tokens[len(prompt) :]


FIELDS = (Field("k", (HEAD_DIM,), "float32"), Field("v", (HEAD_DIM,), "float32"))
LAYOUT = build_layout(
    [KVLayer(i, KV_HEADS, FIELDS) for i in range(LAYERS)],
    KVConfig(kv="fp32", block_tokens=16),
    dtype="float32",
)


def main() -> None:
    model = Decoder()
    store = BlockStore(LAYOUT.spec, 4 << 20, device="cpu")
    table, prompt = store.open(), [3, 1, 4, 1, 5, 9, 2, 6]
    ours, plain = generate(model, table, prompt, 60), recompute(model, prompt, 60)
    print("cached     ", *ours[:20], "...")
    print("recomputed ", *plain[:20], "...")
    assert ours == plain, "caching changed a token"
    twin = table.fork()  # a second continuation: full blocks are shared, the last one is copied
    generate(model, twin, [*prompt, *ours[:-1], 7], 10)
    chain = table.chains[0]
    print(
        f"{table.length} tokens in blocks {[int(b) for b in chain.live()]}, {table.held_bytes():,} bytes"
    )
    print(f"the fork holds {twin.length} tokens in {[int(b) for b in twin.chains[0].live()]}")
    table.release()
    twin.release()
    assert store.usage().held_bytes == 0
    print("equal, and everything given back")


if __name__ == "__main__":
    main()
