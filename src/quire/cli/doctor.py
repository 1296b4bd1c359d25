"""`quire doctor`: what memory, disk and network give here, and which tiers pay for a model. --help needs no torch."""

from __future__ import annotations

import json as json_module
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.cli.console import interruptible, quiet_transformers, spinner, write
from quire.cli.declared import Json
from quire.errors import ConfigError

__all__ = ["command"]


def command(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB_ID", show_default=False, help="Default: the packaged model."
        ),
    ] = None,
    kv: Annotated[
        str, typer.Option(metavar="RECIPE", help="The codec whose blocks would move.")
    ] = "auto",
    folder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="On the disk that is meant; default: the system's temporary folder.",
        ),
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            show_default=False,
            help="A Redis or Valkey server that could be a tier, as --tiers redis:SIZE@… has it.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Of the prompt that is timed.")] = 512,
    size: Annotated[
        int, typer.Option(metavar="MIB", help="Written to the disk and read back, each turn.")
    ] = 64,
    repeats: Annotated[int, typer.Option(metavar="N", help="Turns of each measurement.")] = 3,
    json: Json = False,
) -> None:
    """Measure copies, checksums, the disk, the network and the model, and say which tiers pay.

    A tier pays where bringing a block up takes clearly less than computing it. With --redis that tier is timed over the
    network that lies between, under names of its own; its password may come from QUIRE_REDIS_PASSWORD.

    [dim]quire doctor --folder /var/cache[/dim]
    """

    def work() -> int:
        return _run(model, kv, folder, redis, tokens, size, repeats, json=json)

    raise typer.Exit(interruptible(work))


def _run(
    model: str | None,
    kv: str,
    folder: str | None,
    redis: str | None,
    tokens: int,
    size: int,
    repeats: int,
    *,
    json: bool,
) -> int:
    for name, value in (("tokens", tokens), ("size", size), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    place = Path(tempfile.gettempdir() if folder is None else folder).expanduser()
    if not place.is_dir():
        raise ConfigError(f"--folder {place}: there is no such folder")
    address = None
    if redis is not None:
        from quire.store.tiers.address import parse_address

        address = parse_address(redis, os.environ.get("QUIRE_REDIS_PASSWORD") or None)
    from quire.cli.options import NO_CACHE
    from quire.plan.layout import check_config
    from quire.spec import KVConfig

    if kv == NO_CACHE:
        raise ConfigError("--kv none caches nothing, so nothing could be moved; name a codec")
    check_config(KVConfig(kv))
    from quire.models.load import check_source, load_model
    from quire.models.open import open_runner

    source = check_source(model)
    quiet_transformers()
    context = source.max_context_tokens
    if context is not None and tokens >= context:
        raise ConfigError(f"--tokens {tokens}: the model's context is {context}; give fewer")
    with spinner("loading the model …"):
        runner: Any = open_runner(load_model(source).model, kv=kv)
    try:
        doc = _measure(runner, place, address, tokens, size << 20, repeats)
    finally:
        runner.close()
    doc |= {"model": source.name, "kv": kv}
    write(json_module.dumps(doc) + "\n" if json else _page(doc))
    return 0


def _measure(
    runner: Any, place: Path, address: Any, tokens: int, n_bytes: int, repeats: int
) -> dict[str, Any]:
    from quire.bench import doctor
    from quire.bench.machine import hardware

    groups = [g for g in runner.bridge.layout.spec.groups if not g.recurrent]
    if not groups:
        raise ConfigError("this model keeps state and no tokens, so there are no blocks to move")
    chunk = max(g.block_tokens for g in groups)
    chunk_bytes = sum(g.block_bytes * (chunk // g.block_tokens) for g in groups if g.raw is None)
    chunk_bytes += sum(g.block_bytes for g in groups if g.raw is not None)
    largest = max(g.block_bytes for g in groups)
    with spinner("timing memory …"):
        memory = doctor.memory_rates(n_bytes, repeats)
        device = doctor.device_rates(n_bytes, repeats)
    with spinner(f"timing the disk at {place} …"):
        disk = doctor.disk_rates(place, largest, max(1, n_bytes // largest), repeats)
    with spinner("timing the network …"):
        network = doctor.network_rates(n_bytes, repeats)
        network["redis"] = None
        if address is not None:
            n_blocks = max(1, n_bytes // largest)
            network["redis"] = doctor.redis_rates(address, largest, n_blocks, repeats)
    with spinner("timing the model …"):
        speed = doctor.compute_tokens_per_s(runner, tokens, repeats)
    compute_s = chunk / speed["median"]
    per_byte = sum(1 / memory[k]["median"] for k in ("copy_gb_per_s", "checksum_gb_per_s"))
    host_rate = 1e9 / per_byte
    verdicts = [
        doctor.judge("host", host_rate, chunk_bytes, compute_s),
        doctor.judge("disk", disk["get_gb_per_s"]["median"] * 1e9, chunk_bytes, compute_s),
    ]
    remote = network["redis"]
    if remote is not None:
        rate, wait_s = remote["get_gb_per_s"]["median"] * 1e9, remote["lookup_s"]["median"]
        wait_s /= max(
            1, tokens // chunk
        )  # one question, for as long a prefix as the prompt that was timed
        verdicts.append(doctor.judge("redis", rate, chunk_bytes, compute_s, wait_s))
    return {
        "hardware": hardware(),
        "folder": str(place),
        "memory": memory,
        "device": device,
        "disk": disk,
        "prefill_tokens_per_s": speed,
        "block_tokens": chunk,
        "block_bytes": chunk_bytes,
        "network": network,
        "verdicts": [
            {**vars(v), "times_as_fast": round(v.times, 2), "text": v.text()} for v in verdicts
        ],
    }


def _page(doc: dict[str, Any]) -> str:
    memory, disk = doc["memory"], doc["disk"]
    how = "past the page cache" if disk["direct"] else "through the page cache"
    of = f"blocks of {disk['block_bytes']:,} bytes"
    lines = [
        f"copy in memory     {memory['copy_gb_per_s']['median']:8.2f} GB/s",
        f"checksum ({memory['checksum']:>6})  {memory['checksum_gb_per_s']['median']:8.2f} GB/s",
        f"disk, put, synced  {disk['put_gb_per_s']['median']:8.2f} GB/s  at {doc['folder']}",
        f"disk, cold get     {disk['get_gb_per_s']['median']:8.2f} GB/s  {how}, verified, {of}",
    ]
    if doc["device"] is not None:
        up, down = (doc["device"][k]["median"] for k in ("up_gb_per_s", "down_gb_per_s"))
        lines.append(f"GPU, up and down   {up:8.2f} and {down:.2f} GB/s, pinned")
    lines += _network(doc["network"])
    speed = doc["prefill_tokens_per_s"]["median"]
    a_block = f"{doc['block_bytes']:,} bytes for {doc['block_tokens']} tokens"
    lines += [
        f"{doc['model']}, {doc['kv']}: {speed:,.0f} prompt tokens/s, {a_block}",
        *(v["text"] for v in doc["verdicts"]),
    ]
    if memory["checksum"] == "sha256":
        lines.append("pip install 'quire[tiers]' verifies with XXH3, many times as fast")
    return "\n".join(lines) + "\n"


def _network(found: dict[str, Any]) -> list[str]:
    rate, trip = (found[k]["median"] for k in ("loopback_gb_per_s", "loopback_round_trip_s"))
    links = ", ".join(
        f"{name} {speed:,} Mbit/s" for name, speed in found["links_mbit_per_s"].items()
    )
    remote = found["redis"]
    hint = f"; links: {links}" if links else ""
    lines = [f"TCP on loopback    {rate:8.2f} GB/s  a round trip in {1e6 * trip:.0f} µs{hint}"]
    if remote is None:
        return [*lines, "no server was measured: --redis HOST:PORT times one as a tier"]
    put, get = (remote[k]["median"] for k in ("put_gb_per_s", "get_gb_per_s"))
    wait = f"a look-up in {1e6 * remote['lookup_s']['median']:.0f} µs"
    of = f"blocks of {remote['block_bytes']:,} bytes"
    return [
        *lines,
        f"redis, put         {put:8.2f} GB/s  at {remote['address']}",
        f"redis, get         {get:8.2f} GB/s  verified, {wait}, {of}",
    ]
