"""Prompts from the command line, from a file, from stdin; each with its own sampling parameters."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quire.cli.options import RunOptions, check_context
from quire.engine.intake import check_text, common
from quire.engine.params import SamplingParams
from quire.errors import ConfigError, RequestError

__all__ = ["Ask", "encode", "read_prompts"]

STDIN = "-"

KEYS = (
    "prompt",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "share",
    "context",
)
"""What a JSON line may hold."""


@dataclass(frozen=True)
class Ask:
    """One prompt: a text, or token ids.

    Args:
        where: names it in messages: "" for the only one of the command line.
        context: a text that it begins with, or its number of tokens, after which tokens go already; 0: at its end only.
    """

    prompt: str | Sequence[int]
    params: SamplingParams
    where: str = ""
    token_ids: tuple[int, ...] = ()
    share: str | None = None
    context: str | int = 0


def read_prompts(arguments: Sequence[str], options: RunOptions) -> list[Ask]:
    """All prompts, in order: the arguments, then the file's.

    Raises:
        ConfigError: none at all, an empty one, a file that is not there, a line that cannot be read.
    """
    if arguments.count(STDIN) + (options.prompts == STDIN) > 1:
        raise ConfigError("stdin can be read once; give - a single time")
    params = options.sampling()
    asks = []
    for i, text in enumerate(arguments, 1):
        where = f"prompt {i}: " if len(arguments) > 1 else ""
        asks.append(_ask(_stdin() if text == STDIN else text, params, where))
    if options.prompts is not None:
        asks += _read_file(options.prompts, options)
    if options.context is not None:
        asks = [a if a.context else replace(a, context=options.context) for a in asks]
    if not asks:
        raise ConfigError("no prompt: give one as an argument, --prompts FILE, or - to read stdin")
    return asks


def _ask(prompt: str | Sequence[int], params: SamplingParams, where: str) -> Ask:
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise ConfigError(f"{where}the prompt is empty; give at least one word")
    if isinstance(prompt, str):
        try:
            check_text(prompt)
        except RequestError as e:
            raise ConfigError(f"{where}{e}") from e
    return Ask(prompt, params, where)


def _stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as e:
        raise ConfigError(f"stdin is not {e.encoding} text; convert it first") from e


def _read_file(name: str, options: RunOptions) -> list[Ask]:
    if name == STDIN:
        text = _stdin()
    else:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"--prompts {name}: {e.strerror or e}") from e
        except UnicodeDecodeError as e:
            raise ConfigError(f"--prompts {name}: not UTF-8 text; convert it first") from e
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts {name}: holds no prompt; one per line, as text or as JSON")
    as_json = name.endswith((".jsonl", ".ndjson")) or lines[0][1].lstrip().startswith("{")
    read = _json_line if as_json else _text_line
    return [read(line.rstrip("\r"), f"--prompts {name}, line {i}: ", options) for i, line in lines]


def _text_line(line: str, where: str, options: RunOptions) -> Ask:
    return _ask(line, options.sampling(), where)


def _json_line(line: str, where: str, options: RunOptions) -> Ask:
    """`{"prompt": "text" or [ids], "max_tokens": 5, ...}`; what it does not say the flags do."""
    try:
        found: Any = json.loads(line)
    except ValueError as e:
        raise ConfigError(f"{where}not JSON ({e})") from e
    if not isinstance(found, dict) or "prompt" not in found:
        raise ConfigError(f'{where}must be an object with a prompt, as in {{"prompt": "Once"}}')
    unknown = sorted(set(found) - set(KEYS))
    if unknown:
        raise ConfigError(f"{where}unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
    prompt, share, about = (found.pop(n, None) for n in ("prompt", "share", "context"))
    if about is not None:
        check_context(about, options.keep, f"{where}context")
    if share not in (None, "off", "prefix") or (share == "prefix" and options.share == "off"):
        raise ConfigError(
            f"{where}share must be off, or prefix where --share prefix is given, not {share!r}"
        )
    if not isinstance(prompt, str) and not (
        isinstance(prompt, list) and all(type(x) is int for x in prompt)
    ):
        raise ConfigError(f"{where}prompt must be a string or a list of token ids")
    if found.get("max_tokens", 1) == 0:
        raise ConfigError(f"{where}max_tokens must be at least 1, not 0")
    try:
        ask = _ask(prompt, options.sampling(**found), where)
        return replace(ask, share=share, context=about or 0)
    except ConfigError as e:
        message = str(e)
        raise ConfigError(message if message.startswith(where) else where + message) from e


def encode(asks: Sequence[Ask], tokenizer: Any, *, context: int | None, vocab: int) -> list[Ask]:
    """The prompts as token ids.

    Args:
        asks: prompts.
        tokenizer: None where the model has none.
        context: the model's longest sequence; None: no limit.
        vocab: how many tokens it knows.

    Raises:
        RequestError: a prompt that this model cannot take.
    """
    out = []
    for ask in asks:
        if not isinstance(ask.prompt, str):
            ids = tuple(ask.prompt)
        elif tokenizer is None:
            raise RequestError(
                f'{ask.where}this model has no tokenizer; give ids, as {{"prompt": [1, 2]}} in --prompts FILE'
            )
        else:
            ids = tuple(tokenizer.encode(ask.prompt))
        if not ids:
            raise RequestError(
                f"{ask.where}the tokenizer makes no token of this prompt; add a word"
            )
        if min(ids) < 0 or max(ids) >= vocab:
            raise RequestError(f"{ask.where}token ids must lie within 0..{vocab - 1}")
        if context is not None and len(ids) >= context:
            raise RequestError(
                f"{ask.where}the prompt has {len(ids)} tokens and the context {context}; "
                f"at most {context - 1} leave room for output"
            )
        out.append(replace(ask, token_ids=ids, context=_context_tokens(ask, ids, tokenizer)))
    return out


def _context_tokens(ask: Ask, ids: Sequence[int], tokenizer: Any) -> int:
    """How many tokens of a prompt its context has. Raises RequestError."""
    context = ask.context
    if isinstance(context, str):
        if not isinstance(ask.prompt, str) or not ask.prompt.startswith(context):
            raise RequestError(
                f"{ask.where}the context must be the text that the prompt begins with, or a number of tokens"
            )
        return common(tokenizer.encode(context), ids)
    if context > len(ids):
        raise RequestError(
            f"{ask.where}the context of {context} tokens is longer than the prompt of {len(ids)}"
        )
    return context
