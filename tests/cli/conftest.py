"""A tiny model folder that the tests make themselves, and the command line run in this process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tiny_model import CHAT_TEMPLATE, make_model


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny_chat"), template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same config, with other weights."""
    return make_model(tmp_path_factory.mktemp("twin"), seed=1)


@pytest.fixture(scope="session")
def greedy(tiny: Path) -> Callable[[str, int], list[int]]:
    """What transformers' own generate() says, with its own cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def answer(prompt: str, n_tokens: int) -> list[int]:
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=n_tokens,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return tokens

    return answer


@pytest.fixture
def quire(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """Runs a command line in this process."""
    monkeypatch.delenv("QUIRE_MODEL", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object, stdin: str | None = None) -> Done:
        from quire.cli import invoke

        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = invoke([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


def lines(text: str) -> Sequence[str]:
    return [line for line in text.split("\n") if line]
