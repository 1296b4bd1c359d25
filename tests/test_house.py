"""The house around the code: what is shipped, what is pinned, and that no rule is switched off silently."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import quire

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()
    ]
    return {name: Version(v) for name, v in (line.split("==") for line in lines if line)}


def test_every_pin_is_within_the_range_that_the_package_accepts(
    project: dict[str, Any], pins: dict[str, Version]
) -> None:
    extras = project["project"]["optional-dependencies"]
    wanted = [
        *project["project"]["dependencies"],
        *(line for lines in extras.values() for line in lines),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name == "quire":
            continue  # `dev` holds what `serve` needs
        assert requirement.name in pins, f"{requirement.name} is installed but not pinned"
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_installed_torch_and_transformers_are_accepted(project: dict[str, Any]) -> None:
    from importlib.metadata import version

    for requirement in map(Requirement, project["project"]["dependencies"]):
        assert requirement.specifier.contains(version(requirement.name)), requirement


def test_every_lint_exception_gives_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    start, stop = text.index("[tool.ruff.lint]"), text.index("[tool.mypy]")
    rules = re.findall(r'^    "[A-Z]+[0-9]*",(?! ").*$', text[start:stop], flags=re.MULTILINE)
    bare = [line for line in rules if "#" not in line]
    assert len(rules) > 20
    assert not bare


def test_the_version_is_said_once_and_is_in_the_changelog() -> None:
    assert quire.__version__ == "0.1.0"
    assert quire.__version__ in (ROOT / "CHANGELOG.md").read_text()


COMPILERS = {
    "none": "#!/bin/sh\nexit 1\n",
    "one": '#!/bin/sh\nfor last; do :; done\n: > "$last"\n',  # writes an empty file where -o says
}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_wheel_holds_the_whole_package_and_nothing_else(tmp_path: Path, compiler: str) -> None:
    """With a compiler it is of one platform and holds the library; what that compiles to is for tests/attention."""
    tree, cxx = tmp_path / "tree", tmp_path / "cxx"
    shutil.copytree(
        ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "libquire_cpu.*")
    )
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    cxx.write_text(COMPILERS[compiler], encoding="utf-8")
    cxx.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path],
        cwd=tree,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CXX": str(cxx)},
    )
    assert done.returncode == 0, done.stderr
    assert ("attention will run on torch" in done.stderr) == (compiler == "none")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        meta = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    libraries = {name for name in shipped if "libquire_cpu" in name}
    assert len(libraries) == (compiler == "one")
    assert wheel.name.endswith("-py3-none-any.whl") == (compiler == "none")
    assert "-py3-none-" in wheel.name
    there = {
        str(path.relative_to(tree / "src"))
        for path in (tree / "src").rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "libquire_cpu" not in path.name
    }
    assert "quire/py.typed" in shipped
    assert there == shipped - libraries
    assert {"LICENSE", "METADATA", "entry_points.txt"} <= meta
    assert wheel.stat().st_size < 16 << 20, (
        "the packaged model may take 14 MB, the code a few hundred kB"
    )


def test_make_help_lists_every_public_target() -> None:
    text = (ROOT / "Makefile").read_text()
    described = set(re.findall(r"^#   make ([a-z-]+)  ", text, flags=re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split())  # type: ignore[index]
    inner = {"help", "install", "test-slow", "sweep-only"}
    assert described == phony - inner


def test_ci_runs_the_three_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "for phase in check test test-long" in script
    assert 'make "$phase"' in script
    readme = (ROOT / "README.md").read_text()
    assert all(f"make {name}" in readme for name in ("run", "check", "test", "test-long"))
