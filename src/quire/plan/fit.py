"""What would make it fit, cheapest loss first.

The losses of codecs are this project's own, on the packaged model (docs/ledger.md, "fidelity in decode mode"): how far
predictions move from those of the exact cache, in nats of KL divergence. Another model loses more or less, in much
the same order; `quire eval --model` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from quire.errors import ConfigError
from quire.plan.demand import Demand
from quire.plan.weights import BITS

MEASURED_KL = {
    "int8": 0.00004,
    "fp8": 0.0012,
    "kivi:bits=4": 0.0014,
    "int4": 0.0061,
    "kvarn": 0.0208,
    "kivi:bits=2": 0.049,
    "kvarn:key_bits=2": 0.0908,
}
"""Recipe to KL divergence in nats, packaged model, WikiText-2 at 1,024 tokens."""
ROUNDED_KL = {"int8": 0.0005, "int4": 0.058}
"""The same of weights, as `--weights` of the engine rounds them (`benchmarks/rounding.py`)."""


@dataclass(frozen=True)
class Remedy:
    """One change, and what fits with it.

    Args:
        change: as flags of `quire plan`.
        loss: in words: nothing, or nats as measured.
        kl: nats, where measured.
        max_users, max_context: with it.
        fits: whether what was asked for does.
    """

    change: str
    loss: str
    kl: float | None
    max_users: int
    max_context: int | None
    fits: bool


def remedies(demand: Demand, users: int, context: int) -> list[Remedy]:
    """Changes that keep what was asked for, cheapest loss first; more devices come first, since they lose nothing.

    Those that change nothing for the better, and codecs that cannot serve the model, are left out.
    """
    before = demand.max_users(context)

    def tried(changes: Iterable[_Change]) -> list[Remedy]:
        return [
            Remedy(
                change,
                loss,
                kl,
                other.max_users(context),
                other.max_context(users),
                other.fits(users, context),
            )
            for change, loss, kl, other in changes
            if other.max_users(context) > before
        ]

    out = tried(_changes(demand))
    if not any(r.fits for r in out):
        out += [r for r in tried(_pairs(demand)) if r.fits]
    return out


_Change = tuple[str, str, float | None, Demand]


def _pairs(demand: Demand) -> Iterator[_Change]:
    """Two changes together, for when no single one is enough: a codec, with more devices or smaller weights."""
    for kv, loss, kl, other in _changes(demand):
        if kv.startswith("--kv"):
            for change, more, kl_of_more, both in _changes(other):
                if not change.startswith("--kv"):
                    known = kl if kl_of_more == 0.0 else None
                    yield (
                        f"{kv} {change}",
                        loss if known is not None else f"{loss}, {more}",
                        known,
                        both,
                    )


def _changes(demand: Demand) -> list[_Change]:
    """One change each, the cheapest loss first."""
    setup = demand.setup
    found: list[_Change] = [
        (f"--tp {ranks}", "none", 0.0, Demand(replace(setup, ranks=ranks)))
        for ranks in (2 * setup.ranks, 4 * setup.ranks, 8 * setup.ranks)
        if ranks <= 8
    ]
    for kv, kl in MEASURED_KL.items():
        try:
            other = Demand(replace(setup, config=replace(setup.config, kv=kv)))
        except ConfigError:
            continue
        found.append((f"--kv {kv}", _nats(kl), kl, other))
    if setup.parameters is not None and setup.given_weight_bytes is None:
        for form, kl in ROUNDED_KL.items():
            if BITS[form] < BITS.get(setup.weight_form, 16):
                other = Demand(replace(setup, weight_form=form))
                found.append((f"--weights {form}", _nats(kl), kl, other))
    return sorted(found, key=lambda x: x[2] or 0.0)


def _nats(kl: float) -> str:
    return f"{kl:g} nats on the packaged model"
