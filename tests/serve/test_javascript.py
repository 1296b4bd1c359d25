"""OpenAI's JavaScript client, from the npm registry, against a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

VERSION = "7.59.0"
SCRIPT = Path(__file__).with_name("openai_client.mjs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which node finds the client; skips where it cannot be had."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("javascript")
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", "--ignore-scripts"]
    try:
        done = subprocess.run(
            [*command, "--prefix", str(folder), f"openai@{VERSION}"],
            check=False,
            capture_output=True,
            text=True,
            timeout=180,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("the npm registry does not answer")
    if done.returncode:
        pytest.skip(f"npm cannot install openai@{VERSION}: {done.stderr.strip()[-200:]}")
    shutil.copy(SCRIPT, folder)
    return folder


@pytest.mark.slow
def test_the_javascript_client_works_unchanged(packaged: Any, installed: Path) -> None:
    cancelled = packaged.engine.stats().finished.get("cancelled", 0)
    done = subprocess.run(
        ["node", SCRIPT.name, packaged.url, "packaged"],
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
        cwd=installed,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["models"] == ["packaged"]
    assert seen["text"]
    assert seen["streamed"] == seen["text"]
    assert seen["streamUsage"]["completion_tokens"] == 12
    assert seen["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    assert seen["cancelledAfter"] <= 4
    packaged.wait_idle()
    assert packaged.engine.stats().finished.get("cancelled", 0) == cancelled + 1
    assert seen["call"]["function"]["name"] == "set_lamp"
    assert set(json.loads(seen["call"]["function"]["arguments"])) == {"on"}
    assert set(seen["formed"]) == {"colour", "n"}
    assert seen["formed"]["n"] in range(10)
    assert seen["response"]
    assert seen["refusal"] == {"status": 404, "type": "not_found_error", "name": "NotFoundError"}
