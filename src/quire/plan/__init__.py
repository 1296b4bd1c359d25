"""What a model's cache will be, before any of it exists: no device, no torch."""

from quire.plan.layout import KVLayer, Layout, StateLayer, build_layout

__all__ = ["KVLayer", "Layout", "StateLayer", "build_layout"]
