"""deploy/: the options that its files give exist, probes ask for what is there, and nothing stops before the server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from quire.cli.commands import app

DEPLOY = Path(__file__).parents[2] / "deploy"


def options(words: list[str]) -> dict[str, Any]:
    """What `quire serve` reads; an unknown option raises."""
    command: Any = typer.main.get_command(app)
    with command.commands["serve"].make_context("serve", words, resilient_parsing=True) as context:
        return dict(context.params)


def entry() -> list[str]:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    found = re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert found
    words: list[str] = json.loads(found[1])
    assert words[0].endswith("/quire")
    assert words[1] == "serve"
    return words[2:]


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    made = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    assert [(d["apiVersion"], d["kind"]) for d in made] == [
        ("apps/v1", "Deployment"),
        ("v1", "Service"),
    ]
    return made[0], made[1]


def test_the_image_and_the_manifest_agree() -> None:
    deployment, service = manifest()
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = options([*entry(), *container["args"]])
    assert given["host"] == "0.0.0.0"
    assert given["keys"].startswith(container["volumeMounts"][0]["mountPath"])
    assert pod["terminationGracePeriodSeconds"] > given["drain"] + 60
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    user = pod["securityContext"]["runAsUser"]
    assert f"USER {user}\n" in text
    assert f"--uid {user} " in text
    assert user > 1000, "Ubuntu's images have a user 1000 of their own"
    ports = {p["containerPort"] for p in container["ports"]}
    assert ports == {8000} == {service["spec"]["ports"][0]["targetPort"]}
    assert f"EXPOSE {ports.pop()}\n" in text
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["volumes"]}


def test_probes_ask_for_what_is_there_without_a_key(keyed: Any) -> None:
    (container,) = manifest()[0]["spec"]["template"]["spec"]["containers"]
    with keyed.http() as http:
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = container[name]["httpGet"]["path"]
            assert http.get(path).status_code == 200


def test_the_unit_starts_what_there_is() -> None:
    text = (DEPLOY / "quire.service").read_text(encoding="utf-8")
    lines = dict(x.split("=", 1) for x in text.splitlines() if "=" in x and x[0] not in "#[")
    words = shlex.split(lines["ExecStart"])
    given = options(words[2:])
    assert words[1] == "serve"
    assert int(lines["TimeoutStopSec"]) > given["drain"] + 60
    assert given["tiers"].endswith(f"@/var/cache/{lines['CacheDirectory']}")


def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("needs systemd-analyze")
    path = tmp_path / "quire.service"
    text = (DEPLOY / "quire.service").read_text(encoding="utf-8")
    path.write_text(text.replace("/opt/quire/bin/quire", "/bin/true"))
    done = subprocess.run([tool, "verify", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quire.service" not in done.stderr
