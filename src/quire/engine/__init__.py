"""Continuous batching: requests join and leave at any step, and every token is paid for once.

`Engine` is the only loop; `Scheduler` decides who runs and sees no tensor; a `Runner` is a model with a cache. The
names below load on first use, so that requests, the scheduler and the runner's contract are read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.engine.core import EngineStats
    from quire.engine.engine import Engine
    from quire.engine.intake import Intake, output_limit
    from quire.engine.params import SamplingParams
    from quire.engine.request import (
        Completion,
        Delta,
        Request,
        RequestFigures,
        RequestOutput,
        Sample,
        TokenLogprob,
    )
    from quire.engine.runner import Item, Room, Runner, Table
    from quire.engine.schedule import Plan, SchedulerConfig, SchedulerStats
    from quire.engine.scheduler import Scheduler
    from quire.engine.text import Detokenizer, StopMatcher

_HOME = {
    "Engine": "engine",
    "EngineStats": "core",
    "Completion": "request",
    "Intake": "intake",
    "output_limit": "intake",
    "Delta": "request",
    "Request": "request",
    "RequestFigures": "request",
    "RequestOutput": "request",
    "Sample": "request",
    "SamplingParams": "params",
    "TokenLogprob": "request",
    "Item": "runner",
    "Room": "runner",
    "Runner": "runner",
    "Table": "runner",
    "Plan": "schedule",
    "Scheduler": "scheduler",
    "SchedulerConfig": "schedule",
    "SchedulerStats": "schedule",
    "Detokenizer": "text",
    "StopMatcher": "text",
}

__all__ = [
    "Completion",
    "Delta",
    "Detokenizer",
    "Engine",
    "EngineStats",
    "Intake",
    "Item",
    "Plan",
    "Request",
    "RequestFigures",
    "RequestOutput",
    "Room",
    "Runner",
    "Sample",
    "SamplingParams",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "StopMatcher",
    "Table",
    "TokenLogprob",
    "output_limit",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first asked for."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
