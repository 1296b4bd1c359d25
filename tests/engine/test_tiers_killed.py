"""`kill -9` of an engine that writes to a disk tier: the next one's tokens are those of an engine without tiers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quire.engine import Engine, SamplingParams
from quire.models.load import load_model
from quire.models.open import open_runner
from tiny_model import make_model

SERVING = """
import random, sys
from quire.engine import Engine, SamplingParams
from quire.models.load import load_model
from quire.models.open import open_runner

loaded = load_model(sys.argv[1])
runner = open_runner(loaded.model, memory="160KiB", share="prefix", tiers=f"disk:1MiB@{sys.argv[2]}")
draw = random.Random(int(sys.argv[3]))
with Engine(runner, loaded.tokenizer) as engine:
    print("ready", flush=True)
    for turn in range(1 << 30):
        prompt = [3 + (draw.randrange(3) * i) % 90 for i in range(150)]
        engine.generate([prompt], SamplingParams(max_tokens=2, ignore_eos=True))
        print(turn, flush=True)
"""


@pytest.mark.slow
def test_an_engine_killed_while_it_writes(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    loaded = load_model(folder)
    prompts = [[3 + (k * i) % 90 for i in range(150)] for k in range(3)]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    runner = open_runner(loaded.model, memory="8MiB")
    with Engine(runner, loaded.tokenizer) as engine:
        want = [o.token_ids for o in engine.generate(prompts, params)]
    runner.close()
    for turn in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", SERVING, str(folder), str(tmp_path / "tier"), str(turn)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        for _ in range(4 + 3 * turn):
            assert child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        runner = open_runner(
            loaded.model, memory="8MiB", share="prefix", tiers=f"disk:1MiB@{tmp_path}/tier"
        )
        with Engine(runner, loaded.tokenizer) as engine:
            assert [o.token_ids for o in engine.generate(prompts, params)] == want
        runner.close()
