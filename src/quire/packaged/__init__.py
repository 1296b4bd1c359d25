"""The model that travels with the package, so that everything can be tried offline.

It is a folder of ordinary files which `transformers` loads:

    AutoModelForCausalLM.from_pretrained(quire.packaged.path())

Finding the folder needs neither torch nor transformers. `docs/packaged-model.md` says what the
model is, what it was trained on and what it can do.
"""

import json
from importlib.resources import files
from pathlib import Path

__all__ = ["digest", "path"]


def path() -> Path:
    """The folder of the packaged model: configuration, weights, tokenizer."""
    return Path(str(files(__name__)))


def digest() -> str:
    """The SHA-256 of the weights' file, 64 hexadecimal digits, as recorded at export.

    Every figure measured on the packaged model names it.
    """
    record = json.loads((path() / "digest.json").read_text(encoding="utf-8"))
    return str(record["sha256"])
