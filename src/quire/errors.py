"""Every error Quire raises, grouped by what the reader can do about it.

    QuireError
    ├── ConfigError      change the configuration; the message says what would work       (also a ValueError)
    ├── CapacityError    make room: fewer or shorter requests, a smaller codec, more memory
    ├── TierError        recompute: a lower tier lost, corrupted or refused what it held
    ├── RequestError     tell the client: this one request cannot be served as asked      (also a ValueError)
    └── InvariantError   our bug: report it; never caught, because nothing after it can be trusted

Catch a group where its remedy can be applied and nowhere else: a scheduler answers `CapacityError` by preempting, a
cache answers `TierError` by recomputing the block, the server answers `RequestError` with status 400 and the command
line answers `ConfigError` with one line and exit code 2.

An assert states what our own code guarantees and is never used to check input.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "ConfigError",
    "InvariantError",
    "QuireError",
    "RequestError",
    "TierError",
]


class QuireError(Exception):
    """The root of all errors Quire raises on purpose.

    Attributes:
        exit_code: what a command that ends with this error returns to the shell.
    """

    exit_code = 1


class ConfigError(QuireError, ValueError):
    """What was asked for cannot work, whatever the input. Remedy: change it.

    Raised before anything is loaded wherever a model's config suffices to know. The message is one line, names the
    offending value and ends with what would work: `unknown codec 'int5': choose from bf16, fp16, fp32, int8`.
    """

    exit_code = 2


class CapacityError(QuireError):
    """There is no room now. Remedy: make some, by releasing, preempting, evicting, waiting or buying.

    Attributes:
        needed_bytes: what the refused step wanted, where it is known.
        free_bytes: what could have been given, counting idle blocks that may be evicted, where it is known.
    """

    def __init__(
        self, message: str, *, needed_bytes: int | None = None, free_bytes: int | None = None
    ) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling between processes with the figures intact."""
        return (_capacity_error, (str(self), self.needed_bytes, self.free_bytes))


class TierError(QuireError):
    """A lower tier cannot give back, or cannot take, a block. Remedy: recompute it and go on.

    No content is lost that the tokens cannot restore, so this never reaches a client on its own.
    """


class RequestError(QuireError, ValueError):
    """One request is wrong or impossible; the others go on. Remedy: tell the client.

    For example a prompt longer than the model's context, or a sampling parameter outside its range.
    """

    exit_code = 2


class InvariantError(QuireError):
    """Quire's own books do not balance. Remedy: report it.

    Never caught inside the library: a pool whose counts are wrong may already have handed out somebody else's block.
    """

    exit_code = 70


def _capacity_error(
    message: str, needed_bytes: int | None, free_bytes: int | None
) -> CapacityError:
    return CapacityError(message, needed_bytes=needed_bytes, free_bytes=free_bytes)
