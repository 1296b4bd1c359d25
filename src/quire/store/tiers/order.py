"""Which block a tier gives up first: the one used longest ago that no other stands on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

__all__ = ["Order"]

Name = tuple[bytes, bytes]
T = TypeVar("T")


class Order(Generic[T]):
    """(ns, key) to what a tier knows of the block, from the longest unused to the latest.

    A chain is eaten from its end: a block that others stand on goes behind the latest instead of out. In a chain that
    was used whole the end comes first anyway; in one that came root first each step costs a move per block before it.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[Name, tuple[bytes, T]] = OrderedDict()
        self._children: dict[Name, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: Name) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Name]:
        return iter(self._entries)

    def get(self, name: Name) -> T | None:
        """What is known of it."""
        found = self._entries.get(name)
        return None if found is None else found[1]

    def put(self, name: Name, parent: bytes, value: T) -> None:
        """It is there now, as the latest."""
        self.pop(name)
        self._entries[name] = parent, value
        above = name[0], parent
        self._children[above] = self._children.get(above, 0) + 1

    def pop(self, name: Name) -> T | None:
        """It is gone."""
        found = self._entries.pop(name, None)
        if found is None:
            return None
        above = name[0], found[0]
        left = self._children[above] - 1
        if left:
            self._children[above] = left
        else:
            del self._children[above]
        return found[1]

    def leading(self, ns: bytes, keys: Sequence[bytes]) -> int:
        """How many of the first keys are there, in a row."""
        return next((i for i, key in enumerate(keys) if (ns, key) not in self._entries), len(keys))

    def touch(self, ns: bytes, keys: Sequence[bytes]) -> None:
        """These were used; the first of them last, so that it stays the longest."""
        for key in reversed(keys):
            if (ns, key) in self._entries:
                self._entries.move_to_end((ns, key))

    def oldest(self) -> Name | None:
        """Whose turn it is; None where nothing is there."""
        for _ in range(len(self._entries)):
            name = next(iter(self._entries))
            if not self._children.get(name):
                return name
            self._entries.move_to_end(name)
        return next(iter(self._entries), None)  # a ring of names: nobody makes one but a forger
