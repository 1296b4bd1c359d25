"""Evaluation through the cache: what a configuration costs in fidelity, and the bytes it really takes.

`decode` scores texts through the cache, `metrics` makes figures of the scores, `tasks` makes recall, `inject` makes
models harder judges, `calibration` lets codecs learn, `run` puts them together, `report` is what comes out. Names load
on first use, so that tasks and rows are read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.evaluate.calibration import calibrate
    from quire.evaluate.decode import Reading, Scored, Scorer
    from quire.evaluate.inject import Injection
    from quire.evaluate.metrics import Estimate, paired_bootstrap
    from quire.evaluate.report import Evaluation, Row
    from quire.evaluate.run import evaluate
    from quire.evaluate.tasks import Example, Task, parse_task

_HOME = {
    "Estimate": "metrics",
    "Evaluation": "report",
    "Example": "tasks",
    "Injection": "inject",
    "Reading": "decode",
    "Row": "report",
    "Scored": "decode",
    "Scorer": "decode",
    "Task": "tasks",
    "calibrate": "calibration",
    "evaluate": "run",
    "paired_bootstrap": "metrics",
    "parse_task": "tasks",
}

__all__ = [
    "Estimate",
    "Evaluation",
    "Example",
    "Injection",
    "Reading",
    "Row",
    "Scored",
    "Scorer",
    "Task",
    "calibrate",
    "evaluate",
    "paired_bootstrap",
    "parse_task",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
