"""The training text: what every Python installation carries, plus books the caller names.

Three kinds of text are kept apart, because the sampler draws from them at fixed rates:

- `code`: the standard library's own modules (no tests, no site-packages, no generated tables);
- `topics`: the documentation topics that `help()` shows;
- `books`: plain-text books given by path.

A thirty-second of the modules and topics (by hash of the name) and the last 4 % of each book are
held out. Documents are joined as `<s> document </s>`.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

Ids = npt.NDArray[np.int64]

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
KINDS = ("code", "topics", "books")
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages"}
    | {"test", "tests"}
)
HELD_OUT_OF_BOOK = 0.04


@dataclass(frozen=True)
class Document:
    """One file, topic or part of a book."""

    kind: str
    name: str
    text: str
    held_out: bool


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 32 == 0


def library_modules(stdlib: Path) -> Iterator[Document]:
    """The standard library's sources, in the order of their names."""
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if SKIPPED_FOLDERS.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        yield Document("code", name.as_posix(), text, _is_held_out(name.as_posix()))


def documentation_topics() -> Iterator[Document]:
    """The topics of `help()`."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document("topics", name, text, _is_held_out(name))


def book(path: Path) -> Iterator[Document]:
    """One book, cut into the part trained on and the part held out."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    cut = int(len(text) * (1 - HELD_OUT_OF_BOOK))
    yield Document("books", path.name, text[:cut], held_out=False)
    yield Document("books", path.name, text[cut:], held_out=True)


def gather(books: Sequence[Path]) -> list[Document]:
    """All documents, in an order that depends on their names alone."""
    documents = [*library_modules(Path(sysconfig.get_paths()["stdlib"])), *documentation_topics()]
    for path in sorted(books, key=lambda p: p.name):
        documents.extend(book(path))
    return documents


def fingerprint(documents: Sequence[Document]) -> str:
    """A digest of every name and text: another Python's library gives another one."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.kind}\0{document.name}\0{document.held_out}\0".encode())
        digest.update(document.text.encode())
    return digest.hexdigest()


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE in which every digit is a token of its own.

    Single digits make a number's tokens the same wherever it stands, which is what recall of
    numbers needs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


@dataclass(frozen=True)
class Text:
    """Token streams by kind, and the rates at which windows are drawn from them."""

    streams: dict[str, Ids]
    rates: dict[str, float]

    def window(self, rng: np.random.Generator, length_tokens: int) -> Ids:
        """A window that starts anywhere in a stream drawn by rate.

        Returns: [length_tokens] int64
        """
        kinds = [k for k in KINDS if len(self.streams.get(k, ())) > length_tokens]
        if not kinds:
            raise ValueError(f"no text holds a window of {length_tokens} tokens")
        rates = np.array([self.rates[k] for k in kinds])
        stream = self.streams[kinds[rng.choice(len(kinds), p=rates / rates.sum())]]
        start = int(rng.integers(0, len(stream) - length_tokens + 1))
        return stream[start : start + length_tokens]


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> dict[str, Ids]:
    """The streams of the documents by kind, each document within `<s>` and `</s>`."""
    streams: dict[str, list[int]] = {kind: [] for kind in KINDS}
    encodings = tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False)
    for document, encoding in zip(documents, encodings, strict=True):
        streams[document.kind] += [BOS_ID, *encoding.ids, EOS_ID]
    return {kind: np.array(ids, dtype=np.int64) for kind, ids in streams.items()}


def prepare(
    work: Path, books: Sequence[Path], vocabulary: int
) -> tuple[Tokenizer, dict[str, Ids], dict[str, Ids], str]:
    """Tokenizer and streams, made once and kept in the work folder.

    Returns: the tokenizer, the streams trained on, the streams held out, the text's fingerprint.
    """
    documents = gather(books)
    digest = fingerprint(documents)
    record, tokenizer_file, arrays = (
        work / name for name in ("corpus.json", "tokenizer.json", "corpus.npz")
    )
    if not record.exists():
        tokenizer = train_tokenizer([d.text for d in documents if not d.held_out], vocabulary)
        tokenizer.save(str(tokenizer_file))
        kept = {
            "train": encode(tokenizer, [d for d in documents if not d.held_out]),
            "held": encode(tokenizer, [d for d in documents if d.held_out]),
        }
        flat: dict[str, Any] = {f"{s}.{k}": ids for s in kept for k, ids in kept[s].items()}
        np.savez(arrays, **flat)
        record.write_text(json.dumps({"fingerprint": digest, "vocabulary": vocabulary}))
    made_from = json.loads(record.read_text())
    if made_from != {"fingerprint": digest, "vocabulary": vocabulary}:
        raise ValueError(
            f"{work} was made from other text or another vocabulary (another Python, other "
            "books?): resume with what it began with, or begin in an empty folder"
        )
    with np.load(arrays) as data:
        train, held = ({k: data[f"{s}.{k}"] for k in KINDS} for s in ("train", "held"))
    return Tokenizer.from_file(str(tokenizer_file)), train, held, digest
