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
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
            *("--checks", "not_a_server_error", "--request-timeout", "20", "--seed", "1"),
            *("--phases", "coverage,fuzzing", "--max-examples", "60", "--max-time", "150"),
            *("--mode", "all", "--no-color", "--workers", "4"),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-5000:]
        passed = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        assert passed is not None
        assert int(passed[1]) == int(passed[2]) > 1000
        served.wait_idle()
        assert served.engine.stats().finished["length"] > 20, "nothing reached the model"
