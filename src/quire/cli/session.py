"""The file of `quire chat --session`: what was said, the settings, and the cache's blocks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quire.cli.dialogue import Dialogue
from quire.cli.options import ChatOptions, flag
from quire.engine.conversation import Conversation
from quire.errors import ConfigError, QuireError, TierError
from quire.models.load import Loaded, Source
from quire.store.snapshot import Snapshot, read_snapshot, spec_digest

__all__ = ["Session"]

BINDING = ("kv", "keep", "block_tokens", "system")
"""Settings that the saved cache depends on; the others may change from one sitting to the next."""

FREE = ("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "dtype")


class Session:
    """A session file, there already or not yet.

    Raises:
        ConfigError: the path is no session file.
        TierError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.exists = path.exists()
        self._head: Snapshot | None = None
        self._settings: Mapping[str, Any] = {}
        self._ours: str | None = None
        """Checksum of the file as it was read or written last; None: there was none."""
        if not self.exists:
            if not path.parent.is_dir():
                raise ConfigError(f"--session {path}: there is no folder {path.parent}")
            _check_writable(path)
            return
        if not path.is_file():
            raise ConfigError(f"--session {path}: not a file; name one that may be written")
        _check_writable(path)
        self._head = read_snapshot(path)
        self._ours = self._head.checksum
        try:
            found = json.loads(self._head.extra["settings"])
            self._settings = {n: found[n] for n in (*BINDING, *FREE)}
        except (KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"--session {path}: holds a cache, but not a conversation") from e

    def settle(self, options: ChatOptions) -> ChatOptions:
        """The options, with the session's settings where the user gave none.

        Raises:
            ConfigError: a flag contradicts what the saved cache depends on.
        """
        if self._head is None:
            return options
        for name in sorted(options.given & set(BINDING)):
            asked, was = getattr(options, name), self._settings[name]
            either = {asked, was} if name == "kv" else set()
            if asked != was and "auto" not in either:
                raise ConfigError(
                    f"--session {self.path} was made with {flag(name)} {was}, not {asked}; drop the flag, "
                    "or use another file"
                )
        taken = {n: v for n, v in self._settings.items() if n not in options.given}
        if "stop" in taken:
            taken["stop"] = tuple(taken["stop"])
        settled = replace(options, **taken)
        settled.check()
        return settled

    def check_source(self, source: Source) -> None:
        """Raises ConfigError when the model is another one, as far as its config tells."""
        if self._head is not None and self._head.extra.get("config") != _config_digest(
            source.config
        ):
            raise self._other(source.name)

    def open(self, loaded: Loaded, conversation: Conversation, dialogue: Dialogue) -> None:
        """Puts the saved conversation into place; nothing to do for a new file.

        Raises:
            ConfigError: other weights, or another codec.
            TierError: the file is damaged.
        """
        if self._head is None:
            return
        if self._head.extra.get("weights") != loaded.digest:
            raise self._other(loaded.name)
        if self._head.spec != spec_digest(conversation.runner.bridge.store.spec):
            raise ConfigError(
                f"--session {self.path} was made with --kv {self._settings['kv']} and --block-tokens "
                f"{self._settings['block_tokens']}, which gives other blocks here; use the same, or another file"
            )
        conversation.restore(self._head)
        try:
            dialogue.load(self._head.extra["dialogue"])
        except (KeyError, TypeError, ValueError) as e:
            raise TierError(f"--session {self.path}: its conversation cannot be read") from e

    def save(
        self,
        loaded: Loaded,
        conversation: Conversation,
        dialogue: Dialogue,
        options: ChatOptions,
    ) -> bool:
        """Writes the file anew, or from then on another beside it, where somebody else has written it meanwhile.

        Returns:
            Whether that was so.

        Raises:
            ConfigError: it cannot be written.
        """
        diverted = self._taken()
        if diverted:
            self.path = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        settings = {n: getattr(options, n) for n in (*BINDING, *FREE)}
        extra = {
            "model": loaded.name,
            "weights": loaded.digest,
            "config": _config_digest(loaded.config),
            "settings": json.dumps(settings, ensure_ascii=False),
            "dialogue": dialogue.dump(),
        }
        conversation.save(self.path, extra)
        self.exists, self._ours = True, read_snapshot(self.path).checksum
        return diverted

    def _taken(self) -> bool:
        """Whether the file is no longer the one that was read or written last: another process has it, too."""
        if not self.path.exists():
            return False
        try:
            return read_snapshot(self.path).checksum != self._ours
        except QuireError:
            return True

    def _other(self, name: str) -> ConfigError:
        assert self._head is not None
        was = self._head.extra.get("model", "another model")
        same = " with other weights" if was == name else ""
        return ConfigError(
            f"--session {self.path} belongs to the model {was}{same}, this is {name}; name that model, "
            "or another session file"
        )


def _check_writable(path: Path) -> None:
    """A conversation that cannot be saved at its end is better not begun."""
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--session {path}: the folder {path.parent} cannot be written")


def _config_digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
