"""What a long measurement has found so far, in a file, so that a killed run goes on where it was.

    {"asked": {...}}                                      the question: another one is not answered from this file
    {"at": "…", "cells": [{"reading": [...], "values": {"nll": [["<f8", "base64"], …]}}, …]}     a text, all caches

A line is written whole when its text has been scored; the half line of a killed run is cut off. Arrays are kept bit for
bit, so a run that was interrupted gives the figures of one that was not, to the last digit.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import astuple
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from quire.errors import ConfigError
from quire.evaluate.decode import Reading

__all__ = ["Found", "Journal", "digest_of"]

Found = list[tuple[dict[str, npt.NDArray[Any]], Reading]]
"""Per cell what one text added: its values, and what was read."""


def digest_of(question: Any) -> str:
    """A name for anything that JSON can say."""
    return sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """Texts by name, kept in a file as they are scored.

    Args:
        path: the file; begun when there is none.
        asked: the question, as JSON.

    Raises:
        ConfigError: the file cannot be used, or answers another question.
    """

    def __init__(self, path: Path, asked: Any) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        self._lines = self._read()
        asked = json.loads(json.dumps(asked))
        self.resumed = 0
        """Texts that were there already."""
        if self._lines and self._lines[0].get("asked") != asked:
            before = self._lines[0].get("asked")
            differs = [
                k for k in asked if not isinstance(before, dict) or before.get(k) != asked[k]
            ]
            raise ConfigError(
                f"{path} is of another run ({', '.join(map(str, differs)) or 'asked less'} differs); "
                "delete it, or write to another file"
            )
        for line in self._lines[1:]:
            self._known[line["at"]] = line
        self.resumed = len(self._known)
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"{path}: {e.strerror or e}") from e
        if not self._lines:
            self._write({"asked": asked})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def get(self, name: str) -> Any:
        """What was put under the name, None where nothing was."""
        line = self._known.get(name)
        return None if line is None else line.get("value")

    def put(self, name: str, value: Any) -> None:
        """Keeps anything that JSON can say."""
        self._keep({"at": name, "value": value})

    def text(self, name: str) -> Found | None:
        """The text of that name, None where it has not been scored."""
        line = self._known.get(name)
        if line is None:
            return None
        return [
            ({n: _array(v) for n, v in c["values"].items()}, Reading(*c["reading"]))
            for c in line["cells"]
        ]

    def put_text(self, name: str, found: Sequence[tuple[dict[str, Any], Reading]]) -> None:
        """Keeps a text."""
        cells = [
            {"reading": list(astuple(reading)), "values": {n: _said(v) for n, v in values.items()}}
            for values, reading in found
        ]
        self._keep({"at": name, "cells": cells})

    def done(self) -> None:
        """The run has ended and what it found is elsewhere: the file goes."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _keep(self, line: dict[str, Any]) -> None:
        self._known[line["at"]] = line
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _read(self) -> list[Any]:
        """All whole lines; what a killed run left of another is cut off."""
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as e:
            raise ConfigError(f"{self.path}: {e.strerror or e}") from e
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(x) for x in whole.splitlines()]
            if lines and (not isinstance(lines[0], dict) or "asked" not in lines[0]):
                raise ValueError("its first line asks nothing")
        except ValueError as e:
            raise ConfigError(
                f"{self.path} is no journal of a run ({e}); delete it, or write to another file"
            ) from e
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return lines


def _said(x: Any) -> list[str]:
    x = np.ascontiguousarray(x)
    return [x.dtype.str, base64.b64encode(x.tobytes()).decode()]


def _array(said: list[str]) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(said[1]), np.dtype(said[0]))
