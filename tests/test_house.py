"""The house around the code: what is shipped, what is pinned, and that no rule is switched off silently."""

from __future__ import annotations

import re
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


def test_the_wheel_holds_the_whole_package_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "--target",
            "wheel",
            "--directory",
            str(tmp_path),
        ],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        meta = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    listed = subprocess.run(
        ["git", "ls-files", "src/quire"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    tracked = {line.removeprefix("src/") for line in listed.stdout.splitlines()}
    there = {name for name in tracked if (ROOT / "src" / name).is_file()}
    assert "quire/py.typed" in shipped
    assert there <= shipped, sorted(there - shipped)
    assert all(name.startswith("quire/") for name in shipped)
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
