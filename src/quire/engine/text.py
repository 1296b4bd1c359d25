"""From tokens back to text as they come: whole characters only, and nothing that a stop string might take back.

`Detokenizer` keeps a short window of tokens and decodes only that; `StopMatcher` runs one small automaton per stop
string over the characters. Both cost O(1) amortised per token and per character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

__all__ = ["Detokenizer", "StopMatcher", "Transcript"]

REPLACEMENT = "�"
"""What decoders put for bytes that are no character, or not yet."""

MOST_PENDING = 3
"""An incomplete UTF-8 character is at most 3 bytes, shown as at most as many replacement characters."""

PATIENCE_TOKENS = 16
"""Tokens to wait for a text that ends in a whole character; after that the replacement characters are meant."""

KEEP_TOKENS = 6
"""Tokens that stay in the window: the neighbours that decide about spaces, at least."""

WINDOW_TOKENS = 12
"""A window longer than this is shortened."""


class Detokenizer:
    """Text of a growing list of tokens, emitted as soon as it is certain.

    The emitted pieces concatenate to `tokenizer.decode(tokens, skip_special_tokens=...)`, without the clean-up of
    spaces that WordPiece tokenizers may add. Tokens in a window of a few decode like tokens in the whole list, but for
    the window's first ones; so what a token adds is the decoded window with it, less without it. A trailing replacement
    character may be the beginning of a character and is held back until it is decided.

    Where bytes that never become characters follow complete ones, a byte-fallback decoder judges the run of byte tokens
    as one and would take back characters already emitted; here they stay.

    Args:
        tokenizer: any `transformers` tokenizer.
        skip_special_tokens: leave special tokens out.
        context: tokens before the first, whose text is not emitted: with them a SentencePiece text keeps the space
            before its first word.

    Cost: one decode of about WINDOW_TOKENS tokens per token, 1 to 2 µs with a fast tokenizer.
    """

    __slots__ = ("_decode", "_pending", "_shown", "_special", "_window")

    def __init__(
        self, tokenizer: Any, *, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> None:
        self._decode = _decoder(tokenizer, skip_special_tokens=skip_special_tokens)
        self._special = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._window = [token for token in context if token not in self._special][-KEEP_TOKENS:]
        self._pending = 0  # tokens since the text last ended in a whole character
        self._shown = len(self._decode(self._window)) if self._window else 0

    def push(self, token: int) -> str:
        """Add one token; returns the text that is now certain, possibly none."""
        if token in self._special:
            return ""
        window = self._window
        window.append(token)
        text = self._decode(window)
        certain = len(text)
        if text.endswith(REPLACEMENT):
            self._pending += 1
            if self._pending < PATIENCE_TOKENS:
                return ""
            while certain > max(0, len(text) - MOST_PENDING) and text[certain - 1] == REPLACEMENT:
                certain -= 1
        else:
            self._pending = 0
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if len(window) > WINDOW_TOKENS:
            self._shorten(text)
        return new

    def _shorten(self, text: str) -> None:
        """Forget old tokens, at a point from which the rest decodes to the same characters."""
        window = self._window
        hidden = len(text) - self._shown
        hopeless = len(window) > WINDOW_TOKENS + PATIENCE_TOKENS
        for keep in range(KEEP_TOKENS, WINDOW_TOKENS):
            rest = self._decode(window[-keep:])
            if hopeless or (rest and text.endswith(rest)):
                del window[:-keep]
                self._shown = max(0, len(rest) - hidden)
                return

    def flush(self) -> str:
        """At the end: what was held back, as the decoder shows it."""
        if not self._pending:
            return ""
        self._pending = 0
        text = self._decode(self._window)
        new = text[self._shown :]
        self._shown = len(text)
        return new


def _decoder(tokenizer: Any, *, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """The cheapest decode that this tokenizer has: the Rust one where there is one."""
    rust = getattr(tokenizer, "_tokenizer", None)
    if rust is not None and type(rust).__module__.startswith("tokenizers"):
        return partial(rust.decode, skip_special_tokens=skip_special_tokens)
    return partial(
        tokenizer.decode,
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )


def _special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(getattr(tokenizer, "all_special_ids", ()))


class StopMatcher:
    """Cuts a stream of text before the first stop string, and never emits what may become one.

    Each stop string has a Knuth-Morris-Pratt automaton that eats the text character by character, so what is found
    depends on the text alone and not on how it was cut into pieces: the first stop string to be complete wins, the
    longest of several complete at once.

    Args:
        stops: non-empty strings.

    Cost: O(characters · stops); nothing is ever searched twice.
    """

    __slots__ = ("_failures", "_pending", "_states", "found", "stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(sorted(stops, key=len, reverse=True))
        self._failures = [_failure_links(stop) for stop in self.stops]
        self._states = [0] * len(self.stops)
        self._pending = ""
        self.found: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Add text; returns what can be emitted. After a match `found` is set and the rest is dropped.

        Args:
            text: the next characters.
            armed: False: a stop string that is complete here does not count (before the minimum number of tokens).
        """
        if self.found is not None:
            return ""
        states = self._states
        for at, char in enumerate(text):
            for i, stop in enumerate(self.stops):
                links, state = self._failures[i], states[i]
                while state and stop[state] != char:
                    state = links[state - 1]
                if stop[state] == char:
                    state += 1
                if state == len(stop):
                    if armed:
                        self.found = stop
                        seen = self._pending + text[: at + 1]
                        self._pending = ""
                        return seen[: len(seen) - len(stop)]
                    state = links[state - 1]
                states[i] = state
        seen = self._pending + text
        keep = max(states)
        self._pending = seen[len(seen) - keep :] if keep else ""
        return seen[: len(seen) - keep] if keep else seen

    def flush(self) -> str:
        """At the end: the partial match that came to nothing."""
        rest, self._pending = self._pending, ""
        return rest


def _failure_links(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is also a prefix."""
    links, state = [0] * len(pattern), 0
    for at in range(1, len(pattern)):
        while state and pattern[at] != pattern[state]:
            state = links[state - 1]
        if pattern[at] == pattern[state]:
            state += 1
        links[at] = state
    return links


class Transcript:
    """One sample's text so far: detokenizer, stop strings, and what has been emitted."""

    __slots__ = ("_detokenizer", "_matcher", "_pieces")

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stops) if stops else None
        self._pieces: list[str] = []

    @property
    def found(self) -> str | None:
        """The stop string that ended the text."""
        return None if self._matcher is None else self._matcher.found

    @property
    def text(self) -> str:
        """All that was emitted."""
        return "".join(self._pieces)

    def push(self, token: int, *, armed: bool = True) -> str:
        """Add a token; returns new text, cut before a stop string."""
        new = self._detokenizer.push(token)
        if self._matcher is not None:
            new = self._matcher.push(new, armed=armed)
        if new:
            self._pieces.append(new)
        return new

    def finish(self, *, armed: bool = True) -> str:
        """No more tokens; returns what was held back, unless a stop string is in it."""
        new = self._detokenizer.flush()
        if self._matcher is not None:
            new = self._matcher.push(new, armed=armed) + self._matcher.flush()
        if new:
            self._pieces.append(new)
        return new
