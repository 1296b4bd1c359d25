"""Tokens, health, metrics, and the end of a server."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire.serve.config import ServeConfig
from quire.serve.service import Service
from served import API_KEY, Command, serving, wait_for


@pytest.mark.parametrize("text", ["hello", "h\u00e9 \U0001f98a\n", ""])
def test_tokens_and_back(packaged: Any, text: str) -> None:
    with packaged.http() as http:
        body = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        found = http.post("/tokenize", json=body).json()
        assert found["tokens"] == packaged.engine.tokenizer.encode(text, add_special_tokens=False)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert found["max_model_len"] == 4096
        back = http.post("/detokenize", json={"tokens": found["tokens"]}).json()
        assert back == {"prompt": text}


def test_messages_as_tokens(packaged: Any) -> None:
    turns = [{"role": "user", "content": "hello"}]
    with packaged.http() as http:
        found = http.post("/tokenize", json={"messages": turns}).json()["tokens"]
    text = packaged.engine.tokenizer.decode(found)
    assert text == "<s>hello\n"


def test_the_bytes_of_part_of_a_character_are_told(packaged: Any) -> None:
    prompts = packaged.service.prompts
    tokens = packaged.engine.tokenizer.encode("\U0001f98a", add_special_tokens=False)
    assert len(tokens) > 1
    raw = [byte for token in tokens for byte in prompts.token_text(token)[1]]
    assert bytes(raw).decode() == "\U0001f98a"


def test_health_runs_a_step(packaged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = packaged.engine.stats().steps
    monkeypatch.setattr(packaged.service, "last_token_s", float("-inf"))
    with packaged.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
    assert packaged.engine.stats().steps > steps
    monkeypatch.setattr(packaged.service, "last_token_s", float("-inf"))
    submitted = packaged.engine.stats().requests

    async def many() -> list[int]:
        async with httpx.AsyncClient(base_url=packaged.url, timeout=30) as http:
            answers = await asyncio.gather(*(http.get("/health") for _ in range(12)))
        return [answer.status_code for answer in answers]

    assert asyncio.run(many()) == [200] * 12
    assert packaged.engine.stats().requests == submitted + 1
    monkeypatch.setattr(packaged.service, "last_token_s", float("-inf"))

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no forward today")

    with monkeypatch.context() as patch:
        patch.setattr(packaged.engine.runner, "forward", broken)
        with packaged.http() as http:
            answer = http.get("/health")
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert "today" not in answer.text
    with packaged.http() as http:
        assert http.get("/health").status_code == 200


def test_what_fails_inside_is_told_without_details(
    packaged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("secret of the house")

    client = packaged.client()
    wanted = {"model": "packaged", "prompt": "a", "max_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(packaged.engine.runner, "forward", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**wanted)
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.APIError, match="its log says why"):
            list(client.completions.create(stream=True, **wanted))
    assert client.completions.create(**wanted).choices
    packaged.wait_idle()


def metrics(served: Any) -> dict[str, float]:
    with served.http() as http:
        text = http.get("/metrics").text
    rows = re.findall(r"^([a-z0-9_:]+)(?:\{[^}]*\})? (\S+)$", text, flags=re.MULTILINE)
    found: dict[str, float] = {}
    for name, value in rows:
        found[name] = found.get(name, 0.0) + float(value)
    return found


def test_metrics_count_what_happened(packaged: Any) -> None:
    prompt = "Once a metric was counted, and " * 8
    ask = {"model": "packaged", "prompt": prompt, "max_tokens": 7}
    before = metrics(packaged)
    client = packaged.client()
    usages = [client.completions.create(**ask).usage for _ in range(2)]
    after = metrics(packaged)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    n_prompt = sum(usage.prompt_tokens for usage in usages)
    cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert cached > usages[0].prompt_tokens // 2
    assert grown["quire_prompt_tokens_total"] == grown["vllm:prompt_tokens_total"] == n_prompt
    assert grown["quire_cached_prompt_tokens_total"] == cached
    assert grown["vllm:prefix_cache_hits_total"] >= cached
    assert grown["quire_output_tokens_total"] == grown["vllm:generation_tokens_total"] == 14
    assert grown["vllm:time_to_first_token_seconds_count"] == 2
    assert grown["vllm:inter_token_latency_seconds_count"] == 12
    assert grown["vllm:e2e_request_latency_seconds_count"] == 2
    assert grown["vllm:request_success_total"] == 2
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert after["quire_kv_total_bytes"] > 0


def test_the_document_of_the_interface_is_there(packaged: Any) -> None:
    with packaged.http() as http:
        document = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(
        document["paths"]
    )


def test_a_process_serves_tls_and_lets_running_answers_end(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """`quire serve` with a key and a certificate; SIGTERM while an answer is written."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files],
        check=True,
        capture_output=True,
    )
    with Command(
        tiny_folder, "--name", "tiny", "--memory", "64MiB", "--tls-cert", cert, "--tls-key", key
    ) as command:
        trusting = ssl.create_default_context(cafile=str(cert))
        assert command.url.startswith("https")
        with httpx.Client(verify=trusting) as http:
            assert http.get(f"{command.url}/health").json() == {"status": "ok"}
            client = openai.OpenAI(
                base_url=f"{command.url}/v1", api_key=API_KEY, max_retries=0, http_client=http
            )
            more = {"ignore_eos": True}
            stream = client.completions.create(
                model="tiny", prompt="a", max_tokens=1900, stream=True, extra_body=more
            )
            reasons, refused = [], 0
            for n, chunk in enumerate(stream):
                if n == 3:
                    command.process.send_signal(signal.SIGTERM)
                if n > 3 and n % 50 == 0 and not refused:  # the server looks up ten times a second
                    try:
                        httpx.get(f"{command.url}/v1/models", verify=trusting)
                    except httpx.ConnectError:
                        refused = n
                reasons.append(chunk.choices[0].finish_reason)
        assert 0 < refused < len(reasons), "while an answer was written"
        assert reasons[-1] == "length"
        code, rest = command.end()
        assert code == 0
        assert "all requests have ended" in rest


def test_what_does_not_end_in_time_is_told(tiny_folder: Path) -> None:
    with serving(str(tiny_folder), ServeConfig(port=0, drain_s=0.4), name="tiny") as served:
        stream = served.client().completions.create(
            model="tiny",
            prompt="a",
            max_tokens=1900,
            n=8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = iter(stream)
        for _ in range(3):
            next(chunks)
        served.stop()
        wait_for(lambda: served.service.gate.draining)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)


def test_a_service_knows_its_models(packaged: Any) -> None:
    service: Service = packaged.service
    assert json.dumps(service.models) == '{"packaged": null}'
