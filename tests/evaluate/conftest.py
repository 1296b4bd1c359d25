"""Tiny models, a tokenizer of single bytes, and the codecs of the tests under their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import zoo
from evaluate.codecs_made_here import register


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.fixture(scope="session")
def llama() -> Any:
    return zoo.build("llama")


@pytest.fixture(scope="session")
def text() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, zoo.VOCAB, (400,), generator=generator).tolist()


class Bytes:
    """A tokenizer with a token per byte below 198, and 0 to begin a text: as much of one as is asked for."""

    bos_token_id: int | None = 0
    all_special_ids = (0,)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [1 + b % 198 for b in text.encode()]

    def decode(self, ids: Any) -> str:
        return bytes(int(i) - 1 for i in ids if i).decode()

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(i) for i in ids]

    def __len__(self) -> int:
        return zoo.VOCAB


@pytest.fixture(scope="session")
def tokenizer() -> Bytes:
    return Bytes()
