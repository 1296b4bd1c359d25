"""Output that must follow a JSON schema, a regular expression, a list of texts or a Lark grammar, by llguidance.

A grammar is compiled once, checked on the way, and kept; each sample gets a copy of the matcher, which costs little.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np

from quire.serve.errors import ApiError
from quire.serve.forms import ResponseFormat, StructuredOutputs

__all__ = ["Grammar", "GrammarSource", "Grammars", "wanted_grammar"]

KEPT = 64
"""Compiled grammars that are remembered."""

LONGEST = 1 << 18
"""Characters of a grammar's text."""

GrammarSource = tuple[str, str]
"""Kind ("json", "regex", "lark") and text."""


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: of transformers, a fast one.
        vocab_size: columns of the logits.
        eos_token_ids: allowed where the output may end.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._made: Any = None
        self._kept: OrderedDict[GrammarSource, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, source: GrammarSource) -> Grammar:
        """The grammar, new or remembered. May take long: call it in a thread.

        Raises:
            ApiError: it is none, or this tokenizer cannot be constrained.
        """
        with self._lock:
            found = self._kept.get(source)
            if found is None:
                found = self._kept[source] = Grammar(self._matcher(source), self._vocab_size)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(source)
            return found

    def _matcher(self, source: GrammarSource) -> Any:
        kind, text = source
        if len(text) > LONGEST:
            raise ApiError(400, f"a grammar may have {LONGEST:,} characters, not {len(text):,}")
        if self._made is None:
            if not self._eos or not getattr(self._tokenizer, "is_fast", False):
                raise ApiError(
                    400,
                    "this model's tokenizer cannot be constrained: that needs a fast one with an end token",
                )
            self._made = llguidance.hf.from_tokenizer(
                self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos
            )
        matcher = llguidance.LLMatcher
        try:
            if kind == "json":
                grammar = matcher.grammar_from_json_schema(
                    text, overrides={"whitespace_flexible": False}
                )
            elif kind == "regex":
                grammar = matcher.grammar_from_regex(text)
            else:
                grammar = matcher.grammar_from_lark(text)
            made = matcher(self._made, grammar, log_level=0)
        except ValueError as e:
            raise ApiError(400, f"the grammar cannot be used: {_line(str(e))}") from e
        if made.is_error():
            raise ApiError(400, f"the grammar cannot be used: {_line(made.get_error())}")
        return made


class Grammar:
    """A compiled grammar: the engine's `Constraint`."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def open(self) -> Progress:
        """A matcher at the beginning."""
        return Progress(self._matcher.deep_copy(), self._vocab_size)


class Progress:
    """How far one sample has come: the engine's `Matcher`."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.n_tokens = 0

    @property
    def error(self) -> str | None:
        """Why it cannot go on."""
        return _line(self._matcher.get_error()) if self._matcher.is_error() else None

    def accept(self, tokens: Sequence[int]) -> None:
        """The sample's next tokens."""
        if tokens:
            self._matcher.consume_tokens(list(tokens))
            self.n_tokens += len(tokens)

    def allowed(self) -> np.ndarray:
        """[vocab] bool."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)


def wanted_grammar(
    form: ResponseFormat | None, structured: StructuredOutputs | None
) -> GrammarSource | None:
    """What a request says about its output's form; None: nothing.

    Raises:
        ApiError: it says two things, or a schema is missing.
    """
    found: list[GrammarSource] = []
    if form is not None and form.type == "json_object":
        found.append(("json", '{"type":"object"}'))
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(
                400, "a response_format of json_schema needs a schema", param="response_format"
            )
        found.append(json_source(form.json_schema.schema_))
    if structured is not None:
        if structured.json_ is not None:
            found.append(json_source(structured.json_))
        if structured.regex is not None:
            found.append(("regex", structured.regex))
        if structured.choice is not None:
            found.append(json_choice(structured.choice))
        if structured.grammar is not None:
            found.append(("lark", structured.grammar))
        if not found:
            raise ApiError(400, "structured_outputs needs one of json, regex, choice, grammar")
    if len(found) > 1:
        raise ApiError(400, "the output can follow one grammar; give one of them")
    return found[0] if found else None


def json_source(schema: Any) -> GrammarSource:
    """A JSON schema as text, keys in the order in which they were written: it is that of the output."""
    try:
        text = json.dumps(schema, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError) as e:
        raise ApiError(400, "the JSON schema cannot be written as JSON in Unicode") from e
    return ("json", text)


def json_choice(texts: Sequence[str]) -> GrammarSource:
    """One of several texts, not quoted."""
    if any(not text for text in texts):
        raise ApiError(400, "structured_outputs.choice holds an empty text", param="choice")
    literals = [json.dumps(text, ensure_ascii=False) for text in texts]
    return ("lark", "start: " + " | ".join(literals))


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
