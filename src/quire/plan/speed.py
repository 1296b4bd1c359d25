"""Floors of time: what memory, arithmetic and links allow at best, from a device's own peaks.

A decode step reads the weights once and every user's cache; a prefill multiplies every token by all weights it passes.
Neither can be faster than this; how near a system comes is for `quire bench`.

    step >= max(bytes read / bandwidth, operations / peak) + bytes exchanged / link
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.errors import ConfigError
from quire.plan.demand import Demand
from quire.plan.fields import Fields
from quire.plan.layout import KVLayer
from quire.plan.weights import Parameters
from quire.spec import DTYPE_BYTES, Full

MOST_BATCH = 1 << 20


@dataclass(frozen=True)
class Floor:
    """One decode step of a batch.

    Args:
        batch: sequences in it.
        read_s, compute_s, link_s: what each resource takes at its peak.
    """

    batch: int
    read_s: float
    compute_s: float
    link_s: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return max(self.read_s, self.compute_s) + self.link_s

    @property
    def tokens_per_s(self) -> float:
        """Of the whole batch."""
        return self.batch / self.seconds

    @property
    def bound(self) -> str:
        """What holds it up."""
        return "bandwidth" if self.read_s >= self.compute_s else "compute"


class Speed:
    """Floors of one setup.

    Raises:
        ConfigError: the device has no rates in the catalogue, or the weights are not known by their parameters.
    """

    def __init__(self, demand: Demand) -> None:
        setup = demand.setup
        device, parameters = setup.device, setup.parameters
        if device is None or device.bandwidth_bytes_s is None or device.bf16_flops is None:
            raise ConfigError("floors of time need a device of the catalogue, as in --device h100")
        if parameters is None:
            raise ConfigError(f"{setup.shape.name}: its parameters are not known, so no floors")
        self.demand = demand
        self.ranks = setup.ranks
        self.bandwidth = device.bandwidth_bytes_s
        self.flops = device.bf16_flops
        if setup.weight_form == "fp8" and device.fp8_flops:
            self.flops = device.fp8_flops
        self.link = device.link_bytes_s
        self.parameters: Parameters = parameters
        self._always, self._expert, self._chosen = _experts(demand, parameters)

    def decode(self, batch: int, context: int) -> Floor:
        """One step in which each of `batch` sequences of `context` tokens gets its next token."""
        read = self._weights_read(batch) / self.ranks + batch * self.demand.sequence_bytes(context)
        seen = self._attention(context, self.demand.kept_tokens(context))
        work = batch * (2 * self.parameters.active + seen)
        return Floor(
            batch, read / self.bandwidth, work / self.ranks / self.flops, self._exchange(batch)
        )

    def prefill_s(self, tokens: int) -> float:
        """The arithmetic of a prompt of so many tokens, alone."""
        work = tokens * 2 * self.parameters.active + tokens * self._attention(tokens, tokens) / 2
        return work / self.ranks / self.flops + self._exchange(tokens)

    def compute_bound_batch(self, context: int) -> int | None:
        """The batch from which arithmetic takes as long as reading; None where each user's cache costs more to read."""
        if self.decode(MOST_BATCH, context).bound == "bandwidth":
            return None
        low, high = 0, MOST_BATCH
        while high - low > 1:
            middle = (low + high) // 2
            if self.decode(middle, context).bound == "bandwidth":
                low = middle
            else:
                high = middle
        return high

    def _weights_read(self, batch: int) -> float:
        """Bytes of weights that a step touches: of the experts those that somebody in the batch chose."""
        touched = self._always + self._expert * (1 - (1 - self._chosen) ** batch)
        return self.demand.weight_bytes * touched / self.parameters.total

    def _attention(self, context: int, kept: int) -> float:
        """Operations of attention for one new token: two products with every position that it sees.

        Layers that would see all of the context see so many `kept` tokens of it.
        """
        shape = self.demand.setup.shape
        spec, total = self.demand.spec, 0.0
        raws = {g.raw for g in spec}
        for layer, x in _owners(self.demand).values():
            heads = seen = 0
            for g in spec:
                if g.holds(layer) and g.name not in raws and not g.recurrent:
                    n = len(g.heads(layer))
                    heads += n
                    seen += n * min(
                        sum(g.span.reach(context)), kept if type(g.span) is Full else context
                    )
            total += 2.0 * seen / heads * shape.heads * sum(f.shape[0] for f in x.fields)
        return total

    def _exchange(self, tokens: int) -> float:
        """Two all-reduces per layer between ranks; the link's rate counts both directions."""
        if self.ranks == 1 or not self.link:
            return 0.0
        shape = self.demand.setup.shape
        size = tokens * shape.hidden * DTYPE_BYTES[shape.dtype]
        moved = 2 * shape.n_layers * size * 2 * (self.ranks - 1) / self.ranks
        return moved / (self.link / 2)


def _owners(demand: Demand) -> dict[int, tuple[int, KVLayer]]:
    """Every attending layer to the layer whose cache it reads, with its number."""
    shape = demand.setup.shape
    own = {x.layer: (x.layer, x) for x in shape.layers if isinstance(x, KVLayer)}
    return own | {i: own[o] for i, o in shape.shared.items() if o in own}


def _experts(demand: Demand, p: Parameters) -> tuple[float, float, float]:
    """Parameters that every token uses, those of all experts, and the share of these that a token chooses."""
    if p.active >= p.total:
        return float(p.total), 0.0, 1.0
    f = Fields(demand.setup.shape.config, demand.setup.shape.name)
    n = f.get("n_routed_experts", "num_local_experts", "num_experts")
    used = f.get("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")
    if not isinstance(n, int) or not isinstance(used, int) or not 0 < used < n:
        return float(p.active), float(p.total - p.active), 0.0
    chosen = used / n
    expert = (p.total - p.active) / (1 - chosen)
    return p.total - expert, expert, chosen


@dataclass(frozen=True)
class Price:
    """What memory and time cost.

    Args:
        per_hour: of all ranks.
        per_user_hour: shared by as many users as fit.
        per_million_tokens: of output, at the decode floor of so many users: a lower bound.
    """

    per_hour: float
    per_user_hour: float | None
    per_million_tokens: float | None


def price(per_device_hour: float, ranks: int, users: int, floor: Floor | None) -> Price:
    """Divides an hour's price of the devices among users, and by what they write in it at best."""
    whole = per_device_hour * ranks
    tokens = floor.tokens_per_s * 3600 if floor is not None and users else None
    return Price(whole, whole / users if users else None, whole / tokens * 1e6 if tokens else None)
