"""What `quire eval` and `quire tune` are asked: lists of recipes, policies and tasks, texts and prompts, checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.codecs.recipe import FIELDS, available, parse_recipe
from quire.errors import ConfigError
from quire.retention import parse_keep
from quire.spec import KVConfig

__all__ = [
    "PPL",
    "check",
    "check_ask",
    "numbers",
    "read_file",
    "read_prompt_ids",
    "split_policies",
    "split_recipes",
    "split_tasks",
]

PPL = "ppl"


def split_recipes(texts: Sequence[str]) -> list[str]:
    """`"auto,kivi:bits=2,residual=128"` to two recipes: a name begins one, `k=` begins one or goes on with one.

    Raises:
        ConfigError: an unknown codec, or `none`, which keeps nothing to read.
    """
    names = {"auto", "none", "map", *available()}
    found: list[str] = []
    for text in texts:
        current: list[str] = []
        for item in text.split(","):
            head = item.strip().partition(":")[0].partition(";")[0].strip()
            field = head.partition("=")[0].strip() if "=" in head else ""
            of_fields = bool(current) and current[0].partition("=")[0].strip() in FIELDS
            goes_on = field not in FIELDS if field else head.lstrip("-").isdecimal()
            if current and (goes_on or (field in FIELDS and of_fields)) and head not in names:
                current.append(item)
                continue
            if current:
                found.append(",".join(current).strip())
            current = [item]
        found.append(",".join(current).strip())
    for recipe in found:
        if recipe == "none":
            raise ConfigError(
                "--kv none keeps no cache, so there is nothing to evaluate; --kv auto is the exact one"
            )
        parse_recipe(recipe)
    return found


def split_policies(text: str) -> list[str]:
    """`"full,h2o:budget=0.2,window=64,ada(snapkv:0.2)"` to three policies: what has a = and no name is a parameter."""
    items, depth = [""], 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == "," and not depth:
            items.append("")
        else:
            items[-1] += c
    found: list[str] = []
    for item in items:
        head = item.partition("(")[0].partition(":")[0]
        if found and "=" in head:
            found[-1] += f",{item.strip()}"
        else:
            found.append(item.strip())
    return found


def check_ask(ask: str, configs: Sequence[tuple[str, str]]) -> None:
    """Raises ConfigError where --ask is unknown, or about no policy here."""
    from quire.evaluate.run import ASK

    if ask not in ASK:
        raise ConfigError(f"--ask {ask!r} is not known; known: {', '.join(ASK)}")
    if ask == "before" and all(parse_keep(keep).spans for _, keep in configs):
        raise ConfigError(
            "--ask before is about policies that drop tokens by score, and no --keep here does; drop it"
        )


def split_tasks(texts: Sequence[str]) -> list[str]:
    """`"ppl,kv:count=16,asked=4"` to two tasks: what has a = and no name is a number of the task before it."""
    found: list[str] = []
    for item in ",".join(texts).split(","):
        if found and "=" in item and ":" not in item:
            found[-1] += f",{item.strip()}"
        else:
            found.append(item.strip())
    return found


def numbers(text: str) -> list[int]:
    """`"512,1024"` to two numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--length {text!r} must be a number of tokens, or several as 512,1024")
    return list(dict.fromkeys(map(int, parts)))


def check(
    configs: Sequence[tuple[str, str]],
    tasks: Sequence[str],
    examples: int,
    max_tokens: int,
    block_tokens: int,
    seed: int,
) -> None:
    """All refusals that need no model. Raises ConfigError."""
    from quire.evaluate.tasks import parse_task
    from quire.plan.layout import check_config

    for flag, value in (("--examples", examples), ("--max-tokens", max_tokens)):
        if value < 1:
            raise ConfigError(f"{flag} must be at least 1, not {value}")
    if seed < 0:
        raise ConfigError(f"--seed must be at least 0, not {seed}")
    for kv, keep in configs:
        check_config(KVConfig(kv, keep, block_tokens))
    for task in tasks:
        if task != PPL:
            parse_task(task)


def read_file(flag: str, name: str | None) -> str | None:
    """The text of a file, None where none is named. Raises ConfigError in one line."""
    if name is None:
        return None
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{flag} {name}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{flag} {name}: not UTF-8 text; convert it first") from e


def read_prompt_ids(name: str, source: Any, answer_tokens: int) -> list[list[int]]:
    """The prompts of a file as token ids: a text per line, or JSON as `quire run --prompts` reads it.

    Raises:
        ConfigError, RequestError: a file or a line that cannot be read, or a prompt that leaves no room for its answer.
    """
    from quire.cli.options import RunOptions
    from quire.cli.prepare import vocabulary
    from quire.cli.prompts import encode, read_prompts

    asks = read_prompts([], RunOptions(prompts=name))
    context = source.max_context_tokens
    room = None if context is None else context - answer_tokens + 1
    found = encode(asks, source.tokenizer, context=room, vocab=vocabulary(source))
    return [list(a.token_ids) for a in found]
