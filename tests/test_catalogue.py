"""The catalogues are what the docstrings say, and everything in them says where it comes from and what it costs."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from quire.codecs import available
from quire.codecs.recipe import codec_class
from quire.retention import available as policies
from quire.retention.contract import Scored
from quire.retention.recipe import policy_class
from tool import load_tool

ROOT = Path(__file__).resolve().parents[1]


def tool() -> ModuleType:
    return load_tool("catalogue")


def test_the_page_is_what_the_docstrings_say() -> None:
    page = (ROOT / "docs" / "codecs.md").read_text(encoding="utf-8")
    assert page == tool().page(), "run: python tools/catalogue.py --write docs/codecs.md"
    for name in available():
        assert f"\n## `{name}`\n" in page


@pytest.mark.parametrize("name", available())
def test_a_codec_says_where_it_comes_from_and_what_it_costs(name: str) -> None:
    cls = codec_class(name)
    text = importlib.import_module(cls.__module__).__doc__
    assert text is not None
    assert text.startswith(f"`{name}`: ")
    wanted = ["Source: ", "Cost: "] if cls.plain else ["Source: ", "Cost: ", "Differs: ", "Error: "]
    assert all(head in text for head in wanted)
    for parameter in fields(cls):
        assert f"`{parameter.name}`" in cls.__doc__, "each parameter is explained"


def test_the_policies_page_is_what_the_docstrings_say() -> None:
    page = (ROOT / "docs" / "retention.md").read_text(encoding="utf-8")
    assert page == tool().policies_page(page), (
        "run: python tools/catalogue.py --policies docs/retention.md"
    )
    for name in policies():
        assert f"\n## `{name}" in page


@pytest.mark.parametrize("name", policies())
def test_a_policy_says_what_it_is_and_what_it_costs(name: str) -> None:
    cls = policy_class(name)
    text = importlib.import_module(cls.__module__).__doc__
    assert text is not None
    assert text.startswith((f"`{name}`: ", f"`{name}(...)`: "))
    wanted = (
        ["Idea: ", "Cost: "] if name in ("full", "random") else ["Idea: ", "Source: ", "Cost: "]
    )
    assert all(head in text for head in wanted)
    common = {f.name for f in fields(Scored)} if issubclass(cls, Scored) else set()
    for parameter in (f for f in fields(cls) if f.init):
        if parameter.name not in {"inner", *common}:
            assert f"`{parameter.name}`" in cls.__doc__, "each parameter is explained"


def test_a_page_without_its_mark_is_left_alone() -> None:
    with pytest.raises(SystemExit, match="nothing to write below"):
        tool().policies_page("# Retention")


def test_drawings_are_fenced_and_sections_begin_paragraphs() -> None:
    text = "One: two.\n\n    a ──> b\n\nSource: x\n    and y\nCost: z"
    assert tool().paragraphs(text) == [
        "One: two.",
        "```\na ──> b\n```",
        "**Source.** X and y",
        "**Cost.** Z",
    ]
