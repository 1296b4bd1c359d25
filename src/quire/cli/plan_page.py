"""`quire plan` for people: what it takes, what fits, how fast at best, and what would help."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from quire.cli.console import out, say

if TYPE_CHECKING:
    from quire.plan.catalogue import Device
    from quire.plan.demand import Setup

__all__ = ["catalogue_tables", "show", "size"]

_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def size(n: float) -> str:
    """`12.5 GiB`, `320 KiB`, `96 B`."""
    for unit, step in _UNITS:
        if abs(n) >= step:
            return f"{n / step:,.4g} {unit}" if n / step < 1000 else f"{n / step:,.0f} {unit}"
    return f"{n:,.0f} B"


def _count(n: int | None, none: str = "no limit") -> str:
    return none if n is None else f"{n:,}"


def _billions(n: int) -> str:
    return f"{n / 1e9:,.2f} B" if n >= 1e8 else f"{n / 1e6:,.2f} M"


def _seconds(s: float) -> str:
    if s >= 1:
        return f"{s:,.2f} s"
    return f"{1e3 * s:,.2f} ms" if s >= 1e-3 else f"{1e6 * s:,.1f} us"


def show(documents: Sequence[Mapping[str, Any]], setup: Setup) -> None:
    """Everything on stdout; warnings and assumptions on stderr."""
    console = out()
    first = documents[0]
    for note in first["assumed"]:
        say(f"assumed: {note}", "yellow")
    for warning in first["warnings"]:
        say(f"warning: {warning}", "yellow")
    console.print(Text(_title(first), "bold"))
    console.print(_facts(first))
    console.print()
    console.print(_recipes(documents))
    for table in (_groups(first), _times(first), _lengths(first), _price(first)):
        if table is not None:
            console.print()
            console.print(table)
    if first.get("remedies"):
        console.print()
        console.print(_remedies(first))
        say("losses are KL divergences measured on the packaged model, docs/ledger.md", "dim")
    elif first["fits"] is False:
        say("nothing that is known here would make it fit: a shorter context or fewer users would")
    source = setup.device.source if setup.device else ""
    if source:
        say(f"rates of {first['device']}: {source}", "dim")


def _title(d: Mapping[str, Any]) -> str:
    where = f" on {d['ranks']} x {d['device']}" if d["device"] else ""
    users = f"{d['users']:,} user{'s' * (d['users'] != 1)}"
    return f"{d['model']}, {users} of {d['context']:,} tokens{where}"


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _facts(d: Mapping[str, Any]) -> Table:
    rows = []
    if d["weight_bytes"] is not None:
        params = f", {_billions(d['parameters'])} parameters" if d["parameters"] else ""
        if d["parameters"] and d["active_parameters"] < d["parameters"]:
            params += f", {_billions(d['active_parameters'])} of them per token"
        rows.append(("weights", f"{size(d['weight_bytes'])} ({d['weight_form']}{params})"))
    if d["device_bytes"] is not None:
        allowance = f"{size(d['activation_bytes'])} activations, {size(d['reserve_bytes'])} reserve"
        rows += [
            ("device", f"{size(d['device_bytes'])}; allowance: {allowance}"),
            ("left for the cache", size(d["kv_room_bytes"])),
        ]
    if d["kept_tokens"] is not None:
        every = f"{d['kept_tokens']:,} of {d['context']:,} tokens per layer and head on average"
        rows.append(("kept", f"{every}; per user: just before tokens go again"))
    if d["kv_peak_bytes_per_user"] > d["kv_bytes_per_user"]:
        peak = size(d["kv_peak_bytes_per_user"])
        rows.append(("while a prompt is read", f"{peak} for its user; one at a time is counted"))
    if d["bytes_per_sequence"]:
        rows.append(("per sequence", f"{size(d['bytes_per_sequence'])}, whatever its length"))
    if d["bytes_per_image"] is not None:
        rows.append(("per image", size(d["bytes_per_image"])))
    if d["outgrows_weights_tokens"] is not None:
        tokens = d["outgrows_weights_tokens"]
        rows.append(("cache > weights", f"from {tokens:,} tokens of one user"))
    return _grid(rows)


def _recipes(documents: Sequence[Mapping[str, Any]]) -> Table:
    """A line per recipe: what a token, a user and all users take, and what fits."""
    device = documents[0]["device"] is not None
    table = Table(box=None, pad_edge=False, header_style="cyan")
    heads = ["--kv", "per token", "per user", "all users"]
    heads += ["fits", "most users", "most tokens"] if device else []
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    for d in documents:
        cells = [
            d["kv"],
            size(d["bytes_per_token"]),
            size(d["kv_bytes_per_user"]),
            size(d["kv_bytes"]),
        ]
        if device:
            fits = Text("yes", "green") if d["fits"] else Text("no", "bold red")
            table.add_row(*cells, fits, _count(d["max_users"]), _count(d["max_context"]))
        else:
            table.add_row(*cells)
    return table


def _groups(d: Mapping[str, Any]) -> Table | None:
    """What layers keep, where they do not all keep the same."""
    groups = [g for g in d["groups"] if not g["group"].endswith(".raw")]
    if len(groups) < 2 and d["kv"] == "auto":
        return None
    table = Table(box=None, pad_edge=False, header_style="cyan")
    for head in ("layers", "keep", "fields", "as", "per token", "per block"):
        table.add_column(head, no_wrap=head != "fields")
    for g in d["groups"]:
        fields = " + ".join(f"{n} {'x'.join(map(str, s))}" for n, s in g["fields"].items())
        span = g["span"] if g["span_tokens"] is None else f"{g['span']} {g['span_tokens']:,}"
        per = size(g["bytes_per_token"]) if g["span"] != "state" else "-"
        table.add_row(str(g["layers"]), span, fields, g["codec"], per, size(g["block_bytes"]))
    return table


def _times(d: Mapping[str, Any]) -> Table | None:
    if not d["decode"]:
        return None
    rows = []
    for floor in d["decode"].values():
        users = f"{floor['batch']:,} user{'s' * (floor['batch'] != 1)}"
        rate = f"at most {floor['tokens_per_s']:,.0f} tokens/s ({floor['bound']}-bound)"
        rows.append((f"decode, {users}", f"at least {_seconds(floor['seconds'])} a step, {rate}"))
    rows.append(
        (
            "prefill",
            f"at least {_seconds(d['prefill_s'])}, at most {d['prefill_tokens_per_s']:,.0f} tokens/s",
        )
    )
    batch = d["compute_bound_batch"]
    text = "never at this context: reading each cache takes longer than computing with it"
    rows.append(("decode compute-bound", text if batch is None else f"from {batch:,} users"))
    return _grid(rows)


def _lengths(d: Mapping[str, Any]) -> Table | None:
    found = d["lengths"]
    if found is None:
        return None
    most = f"99 % up to {found['p99_tokens']:,}, longest {found['longest_tokens']:,} tokens"
    half = f"mean {found['mean_tokens']:,.0f}, half up to {found['p50_tokens']:,}"
    rows = [
        ("requests", f"{found['requests']:,}: {half}, {most}"),
        (
            f"{d['users']:,} of them",
            f"{size(found['expected_bytes'])} expected, {size(found['p99_bytes'])} at the 99th percentile",
        ),
    ]
    if found["max_users_p99"] is not None:
        rows.append(
            (
                "most users",
                f"{found['max_users_p99']:,} (99th percentile), {found['max_users_expected']:,} on average",
            )
        )
    return _grid(rows)


def _price(d: Mapping[str, Any]) -> Table | None:
    found = d["price"]
    if found is None:
        return None
    rows = [("price", f"{found['per_hour']:,.4g} an hour")]
    if found["per_user_hour"] is not None:
        rows.append(
            ("per user", f"{found['per_user_hour']:,.4g} an hour, {found['users']:,} at a time")
        )
    if found["per_million_tokens"] is not None:
        rows.append(("per million tokens", f"at least {found['per_million_tokens']:,.4g} (output)"))
    return _grid(rows)


def _remedies(d: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="cyan", title_justify="left")
    for head in ("would help", "fits", "users", "tokens", "loss"):
        right = head in ("users", "tokens")
        table.add_column(head, justify="right" if right else "left", no_wrap=True)
    for r in d["remedies"]:
        fits = Text("yes", "green") if r["fits"] else Text("no", "red")
        loss = f"{r['kl']:.5f}".rstrip("0") + " nats" if r["kl"] else r["loss"]
        table.add_row(r["change"], fits, _count(r["max_users"]), _count(r["max_context"]), loss)
    return table


def catalogue_tables(
    models: Mapping[str, str], devices: Mapping[str, Device]
) -> tuple[Table, Table]:
    """`quire plan --list`."""
    first = Table(box=None, pad_edge=False, header_style="cyan")
    first.add_column(f"{len(models)} models", no_wrap=True)
    first.add_column("source", overflow="fold")
    for name, source in models.items():
        first.add_row(name, source)
    second = Table(box=None, pad_edge=False, header_style="cyan")
    for head in (f"{len(devices)} devices", "memory", "bandwidth", "bf16", "link"):
        second.add_column(head, no_wrap=True, justify="left" if "device" in head else "right")
    second.add_column("source", overflow="fold")
    for name, d in devices.items():
        bandwidth, flops, link = d.bandwidth_bytes_s or 0, d.bf16_flops or 0, d.link_bytes_s or 0
        second.add_row(
            name,
            size(d.memory_bytes),
            f"{bandwidth / 1e9:,.0f} GB/s",
            f"{flops / 1e12:,.0f} T/s",
            f"{link / 1e9:,.0f} GB/s",
            d.source,
        )
    return first, second
