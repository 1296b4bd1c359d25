"""What may be read without torch, and that every public name is there.

Each case runs in a fresh interpreter in which importing torch raises: a planner on a laptop, `--help` in a shell and a
documentation build must not wait seconds, or fail, for a library they do not use.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import subprocess
import sys

import pytest

import quire
import quire.errors

HEAVY = ("torch", "transformers", "triton")

BLOCK = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError("blocked by the test: " + name)

sys.meta_path.insert(0, Refuse())
"""

TORCH_FREE = [
    "quire",
    "quire.errors",
    "quire.spans",
    "quire.spec",
    "quire.store",
    "quire.codecs",
    "quire.plan",
    "quire.plan.answer",
    "quire.evaluate.claims.arithmetic",
    "quire.engine",
    "quire.cli",
]
"""What DESIGN promises to be readable without torch. A promise about a room not built yet skips, and says so."""

needs_cli = pytest.mark.skipif(
    importlib.util.find_spec("quire.cli") is None, reason="quire.cli is not written yet"
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that cannot import torch."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK + code],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )


def test_the_block_blocks() -> None:
    done = run("import torch")
    assert done.returncode != 0
    assert "blocked by the test: torch" in done.stderr


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_needs_no_torch(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    done = run(f"import {module}; assert not any(name in sys.modules for name in {HEAVY!r})")
    assert done.returncode == 0, done.stderr


def test_every_codec_can_be_read_without_torch() -> None:
    """Parameters and bytes of a codec are arithmetic; only encoding and decoding need tensors."""
    import quire.codecs

    names = sorted(m.name for m in pkgutil.iter_modules(quire.codecs.__path__))
    assert names, "the folder is the registry and it is empty"
    done = run("".join(f"import quire.codecs.{name}\n" for name in names))
    assert done.returncode == 0, done.stderr


def test_configurations_can_be_made_without_torch() -> None:
    done = run("from quire import CacheSpec, KVConfig, QuireError; KVConfig()")
    assert done.returncode == 0, done.stderr


@needs_cli
def test_every_help_works_without_torch() -> None:
    done = run(
        """
import contextlib, io
import typer.main
from quire.cli import app

def walk(command, path):
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, [*path, name])

root = typer.main.get_command(app)
for path in walk(root, []):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        root.main([*path, "--help"], prog_name="quire", standalone_mode=False)
    assert "Usage: quire" in out.getvalue(), path
    print(" ".join(path))
"""
    )
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout.split(), done.stdout


@needs_cli
def test_the_console_script_is_the_cli() -> None:
    done = run("sys.argv = ['quire', '--help']\nfrom quire.cli import main\nmain()")
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout


def test_public_names_are_listed_without_being_imported() -> None:
    done = run(
        f"import quire; assert set(quire.__all__) == set({quire.__all__!r}) <= set(dir(quire))"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", quire.__all__)
def test_every_public_name_resolves(name: str) -> None:
    home = quire._HOMES.get(name, "quire")
    if importlib.util.find_spec(home) is None:
        pytest.skip(f"{home} is not written yet")
    value = getattr(quire, name)
    assert value is not None
    assert getattr(value, "__name__", name) == name


def test_names_and_homes_agree() -> None:
    assert sorted(quire._HOMES) == sorted(set(quire.__all__) - {"__version__"})
    assert sorted(quire.__all__) == quire.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Cache'"):
        quire.Cache  # noqa: B018
