"""A dictionary that keeps what was put into it last."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

MOST = 4096
"""Entries. A model of 100 layers with a few groups has some hundreds; heads with budgets of their own make new groups
with every request, and what was derived from the groups of requests long gone would be kept for ever."""


class Recent(dict[K, V]):
    """What follows from a key and can be made again: beyond `most` entries the one put in first goes."""

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        if len(self) > self.most:
            del self[next(iter(self))]

    def setdefault(self, key: K, default: V) -> V:
        """As of a dict."""
        if key not in self:
            self[key] = default
        return self[key]
