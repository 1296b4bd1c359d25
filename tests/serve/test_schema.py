"""schemathesis over the server's own document: whatever is sent, no 5xx and no hang."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from quire.serve.config import ServeConfig
from served import serving


@pytest.mark.slow
def test_nothing_that_is_sent_breaks_the_server(tiny_folder: Path) -> None:
    config = ServeConfig(port=0, max_output_tokens=32, max_samples=4)
    with serving(str(tiny_folder), config, name="tiny") as served:
        # One worker each: in two threads CPython 3.11 fails to parse ("AST constructor recursion depth mismatch").
        commands = [
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
                *("--checks", "not_a_server_error", "--request-timeout", "20", "--seed", seed),
                *("--phases", "coverage,fuzzing", "--max-examples", "60", "--max-time", "120"),
                *("--mode", "all", "--no-color", "--workers", "1"),
            ]
            for seed in ("1", "2")
        ]
        running = [
            subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for c in commands
        ]
        told = [process.communicate(timeout=400)[0] for process in running]
        total = 0
        for process, said in zip(running, told, strict=True):
            assert process.returncode == 0, said[-5000:]
            passed = re.search(r"(\d+) generated, (\d+) passed", said)
            assert passed is not None
            assert int(passed[1]) == int(passed[2]), said[-5000:]
            total += int(passed[1])
        assert total > 1000
        served.wait_idle()
        assert served.engine.stats().finished["length"] > 20, "nothing reached the model"
