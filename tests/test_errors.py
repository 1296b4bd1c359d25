"""The exception tree: what it is drawn as is what it is, and each group keeps its promises."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from quire import errors
from quire.errors import (
    CapacityError,
    ConfigError,
    InvariantError,
    QuireError,
    RequestError,
    TierError,
)

ALL = [CapacityError, ConfigError, InvariantError, RequestError, TierError]


def test_the_drawing_in_the_module_is_the_tree() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    real = [
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind is not QuireError and issubclass(kind, QuireError)
    ]
    assert sorted(drawn) == sorted(real) == sorted(kind.__name__ for kind in ALL)
    assert sorted(errors.__all__) == sorted([*drawn, "QuireError"])


@pytest.mark.parametrize("kind", ALL)
def test_every_error_names_its_remedy(kind: type[QuireError]) -> None:
    assert "Remedy:" in (kind.__doc__ or "")


@pytest.mark.parametrize("kind", [ConfigError, RequestError])
def test_errors_about_values_are_value_errors_and_exit_2(kind: type[QuireError]) -> None:
    assert issubclass(kind, ValueError)
    assert kind.exit_code == 2


@pytest.mark.parametrize("kind", [CapacityError, TierError, InvariantError])
def test_errors_about_the_world_are_not_value_errors(kind: type[QuireError]) -> None:
    assert not issubclass(kind, ValueError)
    assert kind.exit_code != 2


def test_a_capacity_error_travels_between_processes_with_its_figures() -> None:
    sent = CapacityError("no room", needed_bytes=4096, free_bytes=64)
    got = pickle.loads(pickle.dumps(sent))
    assert type(got) is CapacityError
    assert (str(got), got.needed_bytes, got.free_bytes) == ("no room", 4096, 64)


def test_a_capacity_error_needs_no_figures() -> None:
    error = CapacityError("no room")
    assert error.needed_bytes is None
    assert error.free_bytes is None
