"""What a keeper has seen of its sequence, as plain data and arrays for a file, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quire.errors import ConfigError
from quire.models.keeper import Keeper, Line
from quire.models.reader import Reader

if TYPE_CHECKING:
    from quire.models.bridge import Bridge
    from quire.models.keep import Rules
    from quire.store.chain import Chain
    from quire.store.table import BlockTable

__all__ = ["keeper_of", "revive"]


def revive(
    bridge: Bridge, table: BlockTable, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Gives a table that was read from a file the keeper that it had.

    Args:
        bridge: opened under the same policy.
        table: with the file's blocks and lengths.
        about, arrays: as `record` of a keeper made them.

    Raises:
        ConfigError: another policy.
        KeyError, ValueError: no such record.
    """
    rules = bridge.rules(bridge.keep)
    if about["keep"] != rules.keep.canonical:
        raise ConfigError(
            f"the sequence was saved under another policy ({about['keep']}); open with the same, this is "
            f"keep={bridge.keep.text!r}"
        )
    if rules.keep.reads:
        table.keeper = reader = Reader(rules.policy, about["first"])
        reader.prompt_tokens = int(about["prompt_tokens"])
        return

    table.keeper = keeper_of(rules, table.chains, about, arrays)


def keeper_of(
    rules: Rules,
    chains: Sequence[Chain],
    about: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> Keeper:
    """A keeper from its record, over chains that are as they were.

    Raises:
        ConfigError: another policy's.
        KeyError, ValueError: no such record.
    """
    if about["keep"] != rules.keep.canonical:
        raise ConfigError(f"recorded under another policy ({about['keep']})")

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(x)).to(rules.bridge.device)

    keeper = Keeper(rules, about["first"], int(about["context"]))
    for name in ("prompt_tokens", "due", "seen", "repeated"):
        setattr(keeper, name, int(about[name]))
    keeper.scales = {int(layer): float(x) for layer, x in about["scales"].items()}
    groups = {c.group.name: c.group for c in chains}
    for name, x in arrays.items():
        kind, _, of = name.partition(":")
        if kind == "queries":
            keeper.queries[int(of)] = tensor(x)
        elif kind in ("mass", "notes") and x.shape[0] == len(groups[of].coords):
            setattr(keeper.lines.setdefault(of, Line()), kind, tensor(x))
        else:
            raise ValueError(name)
    return keeper
