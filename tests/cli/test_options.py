"""Where an option's value comes from, without a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quire import cli
from quire.cli.options import ChatOptions, RunOptions
from quire.errors import ConfigError


def resolve(**flags: object) -> RunOptions:
    return RunOptions.resolve("run", flags)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_MODEL", raising=False)


def test_a_flag_that_was_not_given_leaves_the_default() -> None:
    options = resolve(kv=None, stop=None, json=False, prompt=["x"])
    assert options == RunOptions()
    assert options.given == frozenset()
    assert options.max_tokens == 128
    assert ChatOptions.resolve("chat", {}).max_tokens == 256


def test_zero_is_a_value() -> None:
    assert resolve(temperature=0.0, seed=0).given == {"temperature", "seed"}
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        resolve(max_tokens=0)


def test_flags_over_file_over_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_MODEL", "from-environment")
    assert resolve().model == "from-environment"
    assert resolve().given == frozenset()
    file = tmp_path / "q.toml"
    file.write_text("model = 'from-file'\nseed = 1\nmemory = 0.25\n[run]\nseed = 2\nstop = 'x'\n")
    options = resolve(config=str(file), stop=["a", "b"])
    assert (options.model, options.seed, options.memory) == ("from-file", 2, 0.25)
    assert options.stop == ("a", "b")
    assert resolve(config=str(file)).stop == ("x",)
    assert resolve(config=str(file), model="from-flag").model == "from-flag"


def test_another_command_s_table_is_its_own(tmp_path: Path) -> None:
    file = tmp_path / "q.toml"
    file.write_text("[chat]\nsystem = 'be brief'\n[eval]\nseed = 3\n[run]\nignore_eos = true\n")
    assert resolve(config=str(file)).ignore_eos
    assert ChatOptions.resolve("chat", {"config": str(file)}).system == "be brief"


def test_a_prompt_s_own_parameters_are_checked_like_flags() -> None:
    assert resolve(temperature=1.0).sampling(top_p=0.5).top_p == 0.5
    with pytest.raises(ConfigError, match="no effect at temperature 0"):
        resolve().sampling(top_p=0.5)
    assert resolve(top_k=1).sampling().top_k == 1, "the best token is what greedy takes"


@pytest.mark.parametrize("policy", [None, "passive"])
def test_threads_that_wait_sleep_soon_unless_told_otherwise_and_pages_are_huge(
    monkeypatch: pytest.MonkeyPatch, policy: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", cli.HUGE_PAGES):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr("sys.argv", ["quire", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ.get("GOMP_SPINCOUNT") == (None if policy else cli.SPINS)
    assert os.environ[cli.HUGE_PAGES] == "1"
