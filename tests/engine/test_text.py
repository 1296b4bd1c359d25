"""Text as it comes: whole characters, the same text in the end, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.tokenizers_made_here import LINES, byte_fallback, byte_level, word_piece
from quire.engine.text import REPLACEMENT, Detokenizer, StopMatcher, Transcript

ALL = [byte_level, byte_fallback, word_piece]
TEXTS = [
    *LINES,
    "".join(LINES),
    "👩‍👩‍👧‍👦" * 20,
    "日本語" * 30,
    "  two  spaces  ",
    "",
    "x",
]


def emitted(tokenizer: Any, tokens: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    stream = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*(stream.push(token) for token in tokens), stream.flush()]


def whole(tokenizer: Any, tokens: list[int], *, skip_special_tokens: bool = True) -> str:
    return tokenizer.decode(
        tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


# ---- detokenizing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole(make: Callable[[], Any], text: str) -> None:
    tokenizer = make()
    tokens = tokenizer.encode(text)
    pieces = emitted(tokenizer, tokens)
    assert "".join(pieces) == whole(tokenizer, tokens)
    assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.text(max_size=80))
def test_any_text_byte_level(text: str) -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode(text)
    pieces = emitted(tokenizer, tokens)
    assert "".join(pieces) == whole(tokenizer, tokens) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.text(max_size=80))
def test_any_text_byte_fallback(text: str) -> None:
    tokenizer = byte_fallback()
    tokens = tokenizer.encode(text)
    assert "".join(emitted(tokenizer, tokens)) == whole(tokenizer, tokens)


@given(st.lists(st.integers(0, 319), max_size=120), st.booleans())
def test_any_tokens_byte_level(tokens: list[int], skip: bool) -> None:
    """A model may sample anything: bytes that never become characters are shown as the decoder shows them."""
    tokenizer = byte_level()
    pieces = emitted(tokenizer, tokens, skip_special_tokens=skip)
    assert "".join(pieces) == whole(tokenizer, tokens, skip_special_tokens=skip)


@given(st.lists(st.integers(0, 290), max_size=120))
def test_any_tokens_byte_fallback_until_they_are_no_text(tokens: list[int]) -> None:
    tokenizer = byte_fallback()
    text = "".join(emitted(tokenizer, tokens))
    expected = whole(tokenizer, tokens)
    if REPLACEMENT not in expected:
        assert text == expected


@given(st.lists(st.integers(2, 159), max_size=60))
def test_any_tokens_word_piece(tokens: list[int]) -> None:
    tokenizer = word_piece()
    assert "".join(emitted(tokenizer, tokens)) == whole(tokenizer, tokens)


def test_text_comes_at_once_when_it_is_certain() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("the fox 👩 the")
    shown = ""
    for at, (token, piece) in enumerate(zip(tokens, emitted(tokenizer, tokens), strict=False)):
        shown += piece
        now = whole(tokenizer, tokens[: at + 1])
        assert shown == now or now.endswith(REPLACEMENT), token


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_endless_broken_bytes_are_let_out(make: Callable[[], Any]) -> None:
    tokenizer = make()
    [broken] = [
        token
        for token in range(len(tokenizer))
        if tokenizer.convert_ids_to_tokens(token) in ("<0xFF>", "ÿ")
    ]
    pieces = emitted(tokenizer, [broken] * 200)
    assert "".join(pieces) == REPLACEMENT * 200
    assert sum(bool(piece) for piece in pieces) > 150
    tail = tokenizer.encode("the fox")
    stream = Detokenizer(tokenizer)
    text = "".join(stream.push(token) for token in [broken] * 100 + tail)
    assert text.endswith("the fox")


def test_work_per_token_is_bounded() -> None:
    pieces = word_piece()
    [joined, *_] = [t for t in range(160) if pieces.convert_ids_to_tokens(t).startswith("##")]
    for tokenizer, tokens in (
        (byte_level(), byte_level().encode("日本語 the fox " * 300)),
        (byte_level(), [200] * 3000),
        (byte_fallback(), byte_fallback().encode("日本語 the fox " * 300)),
        (pieces, [joined] * 3000),  # no part of it decodes to the end of the whole
    ):
        stream = Detokenizer(tokenizer)
        decode, sizes = stream._decode, []

        def counting(ids: list[int], decode: Any = decode, sizes: list[int] = sizes) -> str:
            sizes.append(len(ids))
            return decode(ids)

        stream._decode = counting
        for token in tokens:
            stream.push(token)
        assert sum(sizes) < 60 * len(tokens)
        assert max(sizes) < 40


def test_special_tokens_and_slow_tokenizers() -> None:
    tokenizer = byte_level()
    tokens = [0, *tokenizer.encode("fox"), 1]
    assert "".join(emitted(tokenizer, tokens)) == "fox"
    assert "".join(emitted(tokenizer, tokens, skip_special_tokens=False)) == "<s>fox</s>"
    split = [token for byte in tokenizer.encode("ÿ") for token in [byte, *[0] * 40]]
    assert len(split) > 80  # one character in two tokens, far apart
    assert "".join(emitted(tokenizer, split)) == "ÿ"

    class Slow:
        all_special_ids = (0, 1)

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return tokenizer.decode(ids, **kwargs)

    assert "".join(emitted(Slow(), tokens)) == "fox"


def test_context_keeps_the_space_before_the_first_word() -> None:
    tokenizer = byte_fallback()
    prompt, output = tokenizer.encode("the"), tokenizer.encode("a dog")
    assert "".join(emitted(tokenizer, output)) == "a dog"
    stream = Detokenizer(tokenizer, context=prompt)
    assert "".join([stream.push(token) for token in output]) == " a dog"


def test_a_published_vocabulary(shared: Path) -> None:
    """The tokenizers of the shared models: SentencePiece with byte fallback, and byte-level."""
    from transformers import AutoTokenizer

    for name in ("stories260K", "recall-5m"):
        tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
        for text in TEXTS:
            tokens = tokenizer.encode(text)
            assert "".join(emitted(tokenizer, tokens)) == whole(tokenizer, tokens)


# ---- stop strings ---------------------------------------------------------------------------------------------------


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the first stop string to be complete, the longest of several, cuts before it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@example("ab", ["b", "ab"], [])
@example("aab", ["ab", "b", "aab"], [1])
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_stops_cut_whatever_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    marks = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    shown = ""
    expected, stop = cut(text, stops)
    for low, high in pairwise(marks):
        shown += matcher.push(text[low:high])
        assert expected.startswith(shown), "a prefix of a stop string leaked"
        if matcher.found is None:  # no more is held back than may become a stop string
            held = text[len(shown) : high]
            assert not held or any(s.startswith(held) for s in stops)
    assert matcher.found == stop
    if stop is None:
        shown += matcher.flush()
    assert shown == expected


def test_a_stop_string_may_overlap_itself() -> None:
    matcher = StopMatcher(["aab"])
    assert [matcher.push(c) for c in "aaab"] == ["", "", "a", ""]
    assert matcher.found == "aab"


def test_before_the_minimum_a_stop_string_is_text() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("xENDy", armed=False) == "xENDy"
    assert matcher.push("EN", armed=False) == ""
    assert matcher.push("D", armed=True) == ""
    assert matcher.found == "END"


def test_transcript_holds_back_characters_and_stops() -> None:
    tokenizer = byte_level()
    transcript = Transcript(tokenizer, ["❤️"])
    text = "hearts: ❤ and ❤️ no more"
    shown = "".join(transcript.push(token) for token in tokenizer.encode(text))
    assert transcript.found == "❤️"
    assert shown == transcript.text == "hearts: ❤ and "
    assert transcript.finish() == ""


def test_transcript_gives_back_a_partial_stop_at_the_end() -> None:
    tokenizer = byte_level()
    transcript = Transcript(tokenizer, ["dog days"])
    for token in tokenizer.encode("the lazy dog"):
        transcript.push(token)
    assert transcript.text == "the lazy "
    assert transcript.finish() == "dog"
    assert transcript.text == "the lazy dog"
    assert transcript.found is None
