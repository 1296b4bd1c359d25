"""`quire fsck DIR`: what a disk tier's folder holds, every slot read and verified. --help needs no torch."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from quire.cli.console import interruptible, say, write
from quire.cli.declared import Json

__all__ = ["command"]

SHOWN = 20
BAD = 1
"""Exit code where bad slots are left."""


def command(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A disk tier's folder, which nobody is using.")
    ],
    drop: Annotated[
        bool,
        typer.Option(
            "--drop", metavar=" ", help="Empty the bad slots; they would be misses anyway."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Read and verify every block of a disk tier.

    Ends with 1 where bad slots are left. A bad slot never becomes an answer, with or without this.

    [dim]quire fsck /var/cache/quire --drop[/dim]
    """
    raise typer.Exit(interruptible(lambda: _run(folder, drop=drop, json=json)))


def _run(folder: str, *, drop: bool, json: bool) -> int:
    from pathlib import Path

    from quire.store.tiers.fsck import fsck

    found = fsck(Path(folder).expanduser(), drop=drop)
    left = len(found.bad) - found.dropped
    if json:
        write(json_module.dumps({"folder": folder, **found.document()}) + "\n")
        return BAD if left else 0
    write(
        f"{found.good:,} good blocks of {found.good_bytes:,} bytes in {found.files} files, {found.empty:,} empty "
        f"slots, {len(found.bad):,} bad\n"
    )
    for ns, n in sorted(found.namespaces.items(), key=lambda x: -x[1]):
        write(f"  namespace {ns}…: {n:,} blocks\n")
    for name, slot, why in found.bad[:SHOWN]:
        write(f"  {name} slot {slot}: {why}\n")
    if len(found.bad) > SHOWN:
        write(f"  … and {len(found.bad) - SHOWN:,} more\n")
    if found.dropped:
        say(f"{found.dropped:,} bad slots are empty now", "green")
    elif left:
        say("bad slots are misses; --drop empties them", "yellow")
    return BAD if left else 0
