"""Attention over blocks: a step is planned once, then run once per layer over segments."""

from quire.attention.observe import Attended, Mass
from quire.attention.read import Row
from quire.attention.reference import ReferenceBackend
from quire.attention.step import Step

__all__ = ["Attended", "Mass", "ReferenceBackend", "Row", "Step"]
