"""Everything that `quire plan` says, as one document. Its keys are a contract: more may be added."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from quire.errors import ConfigError
from quire.plan.demand import Demand, Setup
from quire.plan.fit import remedies
from quire.plan.speed import Floor, Speed, price
from quire.spec import CacheGroup


def answer(
    setup: Setup,
    *,
    context: int,
    users: int = 1,
    lengths: Sequence[int] = (),
    price_per_hour: float | None = None,
    images: int = 0,
) -> dict[str, Any]:
    """Plans one model under one configuration.

    Args:
        setup: model, cache and device.
        context: tokens per user.
        users: at the same time.
        lengths: tokens of real requests, instead of `context` for all; see `plan.lengths`.
        price_per_hour: of one device.
        images: per user, on top of `context`.

    Returns:
        The document. Without a device what depends on one is None.

    Raises:
        ConfigError: something is missing, out of range, or cannot serve this model.
    """
    for what, value in (("--context", context), ("--users", users)):
        if value < 1:
            raise ConfigError(f"{what} must be at least 1, not {value}")
    demand = Demand(setup)
    shape = setup.shape
    tokens = context + _image_tokens(setup, images)
    each = demand.sequence_bytes(tokens) * setup.ranks
    document: dict[str, Any] = {
        "model": shape.name,
        "kv": setup.config.kv,
        "keep": setup.config.keep,
        "context": context,
        "users": users,
        "device": setup.device.name if setup.device else None,
        "ranks": setup.ranks,
        "dtype": shape.dtype,
        "block_tokens": max(g.block_tokens for g in demand.spec),
        "bytes_per_token": demand.bytes_per_token,
        "bytes_per_token_growing": demand.growing_bytes_per_token,
        "bytes_per_token_per_layer": {str(k): v for k, v in demand.layer_bytes_per_token.items()},
        "bytes_per_sequence": demand.bytes_per_sequence,
        "bytes_per_image": _per_image(demand),
        "kept_tokens": None if demand.kept is None else demand.kept_tokens(tokens),
        "kv_bytes_per_user": each,
        "kv_peak_bytes_per_user": demand.peak_bytes(tokens) * setup.ranks,
        "kv_bytes": users * each,
        "table_bytes": demand.rank_layout.table_bytes * setup.ranks,
        "weight_bytes": _weight_bytes(demand),
        "weight_form": setup.weight_form,
        "parameters": setup.parameters.total if setup.parameters else None,
        "active_parameters": setup.parameters.active if setup.parameters else None,
        "groups": [_group(g, demand) for g in demand.spec],
        "max_trained_context": shape.max_context,
        "assumed": [*shape.assumed, *_assumed(demand)],
        "warnings": _warnings(setup, tokens),
    }
    document |= _fitting(demand, users, tokens)
    document |= _floors(demand, users, tokens, price_per_hour)
    document["lengths"] = _mix(demand, users, lengths) if lengths else None
    return document


def _weight_bytes(demand: Demand) -> int | None:
    """None where nobody knows them and no device asks."""
    try:
        return demand.weight_bytes
    except ConfigError:
        if demand.setup.device is not None:
            raise
        return None


def _image_tokens(setup: Setup, images: int) -> int:
    if images < 0:
        raise ConfigError(f"--images must be 0 or more, not {images}")
    if images and setup.shape.image_tokens is None:
        raise ConfigError(
            f"{setup.shape.name}: its config does not say how many tokens an image takes; add them to --context"
        )
    return images * (setup.shape.image_tokens or 0)


def _per_image(demand: Demand) -> float | None:
    tokens = demand.setup.shape.image_tokens
    return None if tokens is None else tokens * demand.bytes_per_token


def _group(group: CacheGroup, demand: Demand) -> dict[str, Any]:
    fields = {f.name: list(f.shape) for f in demand.layout.fields_of(group)}
    return {
        "group": group.name,
        "span": type(group.span).__name__.lower(),
        "span_tokens": getattr(group.span, "tokens", None),
        "layers": len(group.layers),
        "coords": len(group.coords),
        "fields": fields,
        "codec": group.codec,
        "block_tokens": group.block_tokens,
        "block_bytes": group.block_bytes,
        "bytes_per_token": group.bytes_per_token,
    }


def _assumed(demand: Demand) -> list[str]:
    """What the planner cannot know of a policy."""
    policy = demand.keep.policy
    out = []
    if hasattr(policy, "bound") and hasattr(policy, "map"):
        out.append(f"a map for {policy.name} of this model: bytes are planned without it")
    if demand.kept is not None and not policy.bounded:
        out.append(f"{policy.name} drops nothing: how much it drops, only the text says")
    return out


def _warnings(setup: Setup, tokens: int) -> list[str]:
    shape = setup.shape
    out = []
    if shape.max_context is not None and tokens > shape.max_context:
        out.append(
            f"{tokens:,} tokens are more than the {shape.max_context:,} that {shape.name} was made for: memory is "
            "planned, quality is not"
        )
    if shape.kv_heads < setup.ranks:
        what = "latents" if shape.kv_heads == 1 else "KV heads"
        out.append(
            f"{setup.ranks} ranks share {shape.kv_heads} {what}: beyond {shape.kv_heads} each rank holds a copy"
        )
    return out


# -- the device --------------------------------------------------------------------------------------------------


def _fitting(demand: Demand, users: int, tokens: int) -> dict[str, Any]:
    names = ("device_bytes", "activation_bytes", "reserve_bytes", "kv_room_bytes", "fits")
    if demand.setup.device is None:
        return dict.fromkeys((*names, "max_users", "max_context", "outgrows_weights_tokens"))
    ranks = demand.setup.ranks
    fits = demand.fits(users, tokens)
    return {
        "device_bytes": demand.device_bytes,
        "activation_bytes": demand.activation_bytes * ranks,
        "reserve_bytes": demand.reserved * ranks,
        "kv_room_bytes": max(0, demand.rank_kv_bytes) * ranks,
        "fits": fits,
        "max_users": demand.max_users(tokens),
        "max_context": demand.max_context(users),
        "outgrows_weights_tokens": demand.outgrows_weights(),
        "remedies": []
        if fits
        else [dataclasses.asdict(r) for r in remedies(demand, users, tokens)],
    }


def _floors(
    demand: Demand, users: int, tokens: int, price_per_hour: float | None
) -> dict[str, Any]:
    names = ("decode", "prefill_s", "prefill_tokens_per_s", "compute_bound_batch", "price")
    device = demand.setup.device
    rates = device is not None and device.bandwidth_bytes_s is not None
    if price_per_hour is not None and not price_per_hour > 0:
        raise ConfigError(f"--price must be above zero, not {price_per_hour:g}")
    if not rates or demand.setup.parameters is None:
        out: dict[str, Any] = dict.fromkeys(names)
        if price_per_hour is not None:
            out["price"] = _price(demand, price_per_hour, tokens, None)
        return out
    speed = Speed(demand)
    decode = {str(b): _floor(speed.decode(b, tokens)) for b in sorted({1, users})}
    seconds = speed.prefill_s(tokens)
    return {
        "decode": decode,
        "prefill_s": seconds,
        "prefill_tokens_per_s": tokens / seconds,
        "compute_bound_batch": speed.compute_bound_batch(tokens),
        "price": None if price_per_hour is None else _price(demand, price_per_hour, tokens, speed),
    }


def _floor(floor: Floor) -> dict[str, Any]:
    return {
        "batch": floor.batch,
        "seconds": floor.seconds,
        "tokens_per_s": floor.tokens_per_s,
        "bound": floor.bound,
    }


def _price(demand: Demand, per_hour: float, tokens: int, speed: Speed | None) -> dict[str, Any]:
    """For as many users as fit: what a full device costs each of them."""
    if demand.setup.device is None:
        raise ConfigError("--price is that of a device: add --device")
    most = demand.max_users(tokens)
    floor = speed.decode(most, tokens) if speed is not None and most else None
    found = price(per_hour, demand.setup.ranks, most, floor)
    return {"users": most, **dataclasses.asdict(found)}


def _mix(demand: Demand, users: int, lengths: Sequence[int]) -> dict[str, Any]:
    from quire.plan.lengths import mix

    found = mix(demand, lengths)
    ranks = demand.setup.ranks
    out: dict[str, Any] = {
        "requests": len(found.lengths),
        "mean_tokens": found.mean_tokens,
        "p50_tokens": found.tokens_at(0.5),
        "p99_tokens": found.tokens_at(0.99),
        "longest_tokens": found.lengths[-1],
        "expected_bytes": users * found.mean_bytes * ranks,
        "p99_bytes": found.p99_bytes(users) * ranks,
        "max_users_expected": None,
        "max_users_p99": None,
    }
    if demand.setup.device is not None:
        room = demand.rank_kv_bytes - demand.slack_bytes
        out["max_users_expected"] = max(0, int(room // found.mean_bytes))
        out["max_users_p99"] = found.max_users(room)
    return out
