"""Codebooks: weighted k-means over many groups of points at once, seeded, and the nearest centre of a point.

    points [G, N, c], weights [G, N]  ──>  centres [G, K, c]         G independent problems side by side

Source: k-means++ (Arthur and Vassilvitskii, 2007) for the beginning, Lloyd's turns with weights for the rest. A centre
that no point is nearest to moves to the point that costs most.
"""

from __future__ import annotations

import torch

TURNS = 20
GAIN = 1e-3
"""Turns that save less than this share of the cost, on average over groups, end the search."""
FIRST_POINTS = 8
"""Per centre: as many points, evenly chosen, as the beginning looks at."""
_ELEMENTS = 1 << 21
_NEAR = 1 << 19
"""Most distances held at once, by products and one by one: the latter are fastest within a cache."""


def nearest(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """`[G, N, c]` and `[G, K, c]` to `[G, N]` int64: the centre at the least squared distance, of equals the first.

    Element by element, so that neither batch nor order shows in the result. Cost: c passes over `[G, N, K]`.
    """
    out = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    by_channel = centres.mT.contiguous().unsqueeze(2)
    step = max(1, _NEAR // (x.shape[0] * centres.shape[1]))
    for at in range(0, x.shape[1], step):
        part = x[:, at : at + step]
        total = (part[:, :, 0, None] - by_channel[:, 0]).square_()
        for j in range(1, x.shape[2]):
            total += (part[:, :, j, None] - by_channel[:, j]).square_()
        out[:, at : at + step] = total.min(-1).indices
    return out


def kmeans(
    x: torch.Tensor, weight: torch.Tensor, k: int, *, seed: int, turns: int = TURNS
) -> torch.Tensor:
    """Centres `[G, K, c]` float32 that make the weighted sum of squared distances small.

    Args:
        x: `[G, N, c]` float32, N at least k.
        weight: `[G, N]`, not negative; only ratios within a group count, and a group of zeros counts evenly.
        seed: the same seed, the same centres, on one machine with one number of threads.

    Cost: `turns` products of the points and the centres, fewer where they hardly move any more.
    """
    mean = weight.double().mean(-1, keepdim=True)
    w = torch.where(mean > 0, weight.double() / mean, 1.0).float()
    rng = torch.Generator(device=x.device).manual_seed(seed)
    every = max(1, x.shape[1] // (FIRST_POINTS * k))
    centres = _begin(x[:, ::every], w[:, ::every], k, rng)
    before = torch.full(x.shape[:1], torch.inf, dtype=torch.float64, device=x.device)
    for _ in range(turns):
        at, cost = _assign(x, centres)
        now = (w * cost).double().sum(-1)
        if float((now / before.clamp_min(1e-300)).mean()) > 1 - GAIN:
            break
        before = now
        centres = _centres(x, w, at, cost, centres)
    return centres


def _begin(x: torch.Tensor, w: torch.Tensor, k: int, rng: torch.Generator) -> torch.Tensor:
    """k-means++: each next centre a point, with a chance as large as its weighted distance from those there are."""
    groups = torch.arange(x.shape[0], device=x.device)
    chance, centres = w, []
    reach = torch.full_like(w, torch.inf)
    for _ in range(k):
        ends = chance.double().cumsum(-1)
        draw = torch.rand(x.shape[0], 1, generator=rng, dtype=torch.float64, device=x.device)
        at = torch.searchsorted(ends, draw * ends[:, -1:], right=True).clamp_max(x.shape[1] - 1)
        centres.append(x[groups, at[:, 0]])
        reach = torch.minimum(reach, ((x - centres[-1].unsqueeze(1)) ** 2).sum(-1))
        chance = w * reach
    return torch.stack(centres, 1)


def _assign(x: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centres and the squared distances, by products: fast, and good enough to learn from."""
    at = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    cost = torch.empty(x.shape[:2], device=x.device)
    sizes = (centres**2).sum(-1).unsqueeze(1)
    step = max(1, _ELEMENTS // (x.shape[0] * centres.shape[1]))
    for i in range(0, x.shape[1], step):
        part = x[:, i : i + step]
        far = torch.baddbmm(sizes, part, centres.mT, alpha=-2)
        least, at[:, i : i + step] = far.min(-1)
        cost[:, i : i + step] = (least + (part**2).sum(-1)).clamp_min(0)
    return at, cost


def _centres(
    x: torch.Tensor, w: torch.Tensor, at: torch.Tensor, cost: torch.Tensor, old: torch.Tensor
) -> torch.Tensor:
    n_groups, k, c = old.shape
    flat = (at + k * torch.arange(n_groups, device=x.device).unsqueeze(1)).reshape(-1)
    mass = torch.zeros(n_groups * k, dtype=torch.float64, device=x.device)
    mass.index_add_(0, flat, w.double().reshape(-1))
    sums = torch.zeros(n_groups * k, c, dtype=torch.float64, device=x.device)
    sums.index_add_(0, flat, (x * w.unsqueeze(-1)).double().reshape(-1, c))
    moved = torch.where(mass.unsqueeze(-1) > 0, sums / mass.unsqueeze(-1).clamp_min(1e-300), 0.0)
    new = moved.float().view(n_groups, k, c)
    empty = (mass == 0).view(n_groups, k)
    for g in empty.any(-1).nonzero().flatten().tolist():
        gone = empty[g].nonzero().flatten()
        worst = (w[g] * cost[g]).topk(min(len(gone), x.shape[1])).indices
        new[g, gone[: len(worst)]] = x[g, worst]
    return new
