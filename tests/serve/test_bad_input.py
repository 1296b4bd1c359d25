"""What is wrong is answered with the right 4xx, in the dialect's form, at once, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
TURN = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def text(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", "max_tokens": 2} | more


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": TURN, "max_tokens": 2} | more


def schema(found: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": found}}


def deep(n: int) -> Any:
    return json.loads('{"a":' * n + "1" + "}" * n)


WRONG: dict[str, tuple[str, Any, int, str]] = {
    "no JSON": (TEXT, b"{", 400, "not JSON"),
    "no UTF-8": (TEXT, b'{"model": "\xff\xfe", "prompt": "x"}', 400, "UTF-8"),
    "half a character": (TEXT, b'{"model": "tiny", "prompt": "\\ud800"}', 400, "Unicode"),
    "half a character in a turn": (
        CHAT,
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\udfff"}]}',
        400,
        "Unicode",
    ),
    "half a character in a name": (TEXT, b'{"model": "\\ud800", "prompt": "x"}', 404, "model"),
    "half a character in a schema": (
        CHAT,
        json.dumps(chat(response_format=schema({"const": "\ud800"}))).encode(),
        400,
        "Unicode",
    ),
    "half a character in a field's name": (
        TEXT,
        b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
        400,
        "object",
    ),
    "too deep": (TEXT, b"[" * 100_000, 400, "JSON"),
    "a list": (TEXT, [1], 400, "object"),
    "nothing": (TEXT, b"", 400, "missing"),
    "a number of 5,000 digits": (
        TEXT,
        b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        400,
        "JSON",
    ),
    "infinity": (TEXT, b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', 400, "finite"),
    "NaN": (TEXT, b'{"model": "tiny", "prompt": "x", "top_p": NaN}', 400, "finite"),
    "10 MB": (TEXT, text(prompt="x" * (10 << 20)), 413, "1,048,576 bytes"),
    "unknown model": (TEXT, text(model="gpt-9"), 404, "'gpt-9'"),
    "unknown field": (TEXT, text(suffix="x"), 400, "suffix"),
    "no model": (TEXT, {"prompt": "x"}, 400, "model is missing"),
    "empty prompt": (TEXT, text(prompt=[]), 400, "prompt"),
    "a prompt that is no text": (TEXT, text(prompt={"a": 1}), 400, "prompt"),
    "negative token": (TEXT, text(prompt=[-1]), 400, "prompt"),
    "token beyond the vocabulary": (TEXT, text(prompt=[10**9]), 400, "vocabulary"),
    "too many prompts": (TEXT, text(prompt=["x"] * 40), 400, "40 prompts"),
    "too many samples": (TEXT, text(n=33), 400, "n=33"),
    "a prompt beyond the context": (TEXT, text(prompt="x" * 3000), 400, "3000 tokens"),
    "negative max_tokens": (TEXT, text(max_tokens=-1), 400, "max_tokens"),
    "max_tokens of 0": (TEXT, text(max_tokens=0), 400, "max_tokens=0"),
    "max_tokens as text": (TEXT, text(max_tokens="5"), 400, "max_tokens"),
    "max_tokens as a Boolean": (TEXT, text(max_tokens=True), 400, "max_tokens"),
    "negative temperature": (TEXT, text(temperature=-0.1), 400, "temperature"),
    "tiny temperature": (TEXT, text(temperature=1e-9), 400, "temperature"),
    "top_p of 0": (TEXT, text(top_p=0), 400, "top_p"),
    "top_k beyond any vocabulary": (TEXT, text(top_k=2**63), 400, "top_k"),
    "negative seed": (TEXT, text(seed=-5), 400, "seed"),
    "negative n": (TEXT, text(n=-1), 400, "n:"),
    "best_of": (TEXT, text(best_of=3), 400, "best_of"),
    "empty stop": (TEXT, text(stop=[""]), 400, "stop"),
    "bias of a word": (TEXT, text(logit_bias={"word": 1}), 400, "logit_bias"),
    "bias of a token that is none": (TEXT, text(logit_bias={"99999": 1}), 400, "vocabulary"),
    "bias too large": (TEXT, text(logit_bias={"5": 1000}), 400, "logit_bias"),
    "too many logprobs": (TEXT, text(logprobs=1000), 400, "logprobs"),
    "streamed echo": (TEXT, text(stream=True, echo=True), 400, "echo"),
    "options of no stream": (TEXT, text(stream_options={"include_usage": True}), 400, "stream"),
    "no turns": (CHAT, chat(messages=[]), 400, "messages"),
    "turns without text": (
        "/v1/messages",
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": ""}]}]),
        400,
        "hold no text",
    ),
    "unknown role": (CHAT, chat(messages=[{"role": "king", "content": "x"}]), 400, "role"),
    "no content": (CHAT, chat(messages=[{"role": "user"}]), 400, "content"),
    "an image": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "messages.0.content",
    ),
    "two limits": (CHAT, chat(max_completion_tokens=3), 400, "max_completion_tokens"),
    "top_logprobs alone": (CHAT, chat(top_logprobs=2), 400, "logprobs"),
    "a tool's answer to nothing": (
        CHAT,
        chat(messages=[{"role": "tool", "content": "x"}]),
        400,
        "tool_call_id",
    ),
    "tools that it cannot choose": (CHAT, chat(tools=[TOOL]), 400, "required"),
    "an unknown tool": (
        CHAT,
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        400,
        "'g'",
    ),
    "a choice without tools": (CHAT, chat(tool_choice="required"), 400, "tools"),
    "two tools of one name": (CHAT, chat(tools=[TOOL, TOOL]), 400, "same name"),
    "tools and a schema": (
        CHAT,
        chat(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"}),
        400,
        "exclude",
    ),
    "no schema": (CHAT, chat(response_format={"type": "json_schema"}), 400, "schema"),
    "a schema that is none": (
        CHAT,
        chat(response_format=schema({"type": "objekt"})),
        400,
        "objekt",
    ),
    "a schema without solutions": (
        CHAT,
        chat(response_format=schema(False)),
        400,
        "schema",
    ),
    "a deep schema": (CHAT, chat(response_format=schema(deep(300))), 400, ""),
    "two grammars": (
        CHAT,
        chat(structured_outputs={"regex": "a", "choice": ["b"]}),
        400,
        "one grammar",
    ),
    "a regex that is none": (CHAT, chat(structured_outputs={"regex": "(a"}), 400, "unclosed"),
    "a grammar and min_tokens": (
        CHAT,
        chat(structured_outputs={"regex": "a"}, min_tokens=1),
        400,
        "min_tokens",
    ),
    "another recipe": (TEXT, text(cache={"kv": "int4"}), 400, "kv='fp32'"),
    "an unknown policy": (TEXT, text(cache={"keep": "h3o"}), 400, "unknown policy 'h3o'"),
    "a budget below what is protected": (TEXT, text(cache={"keep": "h2o:9"}), 400, "is below the"),
    "a policy from a file": (TEXT, text(cache={"keep": "duo:map=/etc/x"}), 400, "reads no files"),
    "a codec from a file": (
        TEXT,
        text(cache={"yields": "kv=cq:form=8c8b,file=/etc/x"}),
        400,
        "reads no files",
    ),
    "a map to yield to": (TEXT, text(cache={"yields": "kv=map:/etc/x"}), 400, "reads no files"),
    "foreign code to yield to": (
        TEXT,
        text(cache={"yields": "press:os.system,budget=0.5"}),
        400,
        "os.system",
    ),
    "a context of which nothing goes": (
        TEXT,
        text(cache={"context_tokens": 1}),
        400,
        "keep by score, as keep='kvzip:budget=0.5'cache.context_tokens",
    ),
    "a context longer than the prompt": (
        TEXT,
        text(cache={"context_tokens": 1 << 20, "keep": "keydiff:budget=0.5"}),
        400,
        "counts themcache.context_tokens",
    ),
    "an unknown codec to yield to": (TEXT, text(cache={"yields": "kv=int9"}), 400, "int9"),
    "yielding twice": (
        TEXT,
        text(cache={"yields": "kv=int8", "keep": "keydiff:budget=0.5"}),
        400,
        "drop one of them",
    ),
    "unknown sharing": (TEXT, text(cache={"share": "all"}), 400, "cache.share"),
    "a priority above the operator's": (TEXT, text(cache={"priority": 3}), 400, "at most 1"),
    "kept too long": (TEXT, text(cache={"keep_for_s": 1e6}), 400, "at most 3600"),
    "kept, and not shared": (
        TEXT,
        text(cache={"keep_for_s": 1, "share": "off"}),
        400,
        "shared blocks",
    ),
    "an unknown wish": (TEXT, text(cache={"tier": "disk"}), 400, "cache.tier"),
    "nothing to tokenize": ("/tokenize", {}, 400, "prompt"),
    "a negative id": ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
    "an id beyond": ("/detokenize", {"tokens": [10**6]}, 400, "vocabulary"),
    "no page": ("/v1/nothing", {}, 404, "/v1/nothing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_requests_are_refused_in_one_line(keyed: Any, case: str) -> None:
    path, body, status, said = WRONG[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with keyed.http("alice") as http:
        answer = http.post(path, content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    anthropic = path == "/v1/messages"
    assert set(error) == {"message", "type"} | (set() if anthropic else {"param", "code"})
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert said in error["message"] + str(error.get("param"))
    assert "\n" not in error["message"]
    assert len(error["message"]) < 700
    assert not keyed.service.gate.live


def test_a_body_without_a_length_is_counted(keyed: Any) -> None:
    def body() -> Any:
        yield b'{"model": "tiny", "prompt": "'
        for _ in range(20):
            yield b"x" * (1 << 17)

    with keyed.http("alice") as http:
        answer = http.post(TEXT, content=body(), headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_a_form_of_a_web_page_is_refused(keyed: Any) -> None:
    with keyed.http("alice") as http:
        content = json.dumps(text()).encode()
        answer = http.post(TEXT, content=content, headers={"content-type": "text/plain"})
        assert answer.status_code == 400
        assert "application/json" in answer.json()["error"]["message"]
        assert http.get(TEXT).status_code == 405


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "no_api_key"),
        ({"authorization": "Bearer wrong"}, "invalid_api_key"),
        ({"authorization": "Basic wrong"}, "no_api_key"),
        ({"authorization": "Bearer"}, "no_api_key"),
        ({"x-api-key": "wrong"}, "invalid_api_key"),
        ({"authorization": b"Bearer \xff\xfe"}, "invalid_api_key"),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", TEXT),
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("POST", "/tokenize"),
    ],
)
def test_without_a_key_there_is_nothing(
    keyed: Any, method: str, path: str, headers: dict[str, Any], code: str
) -> None:
    with keyed.http() as http:
        answer = http.request(method, path, headers=headers, content=b"\xff" * 100)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["type"] == "authentication_error"


def test_every_key_of_the_file_opens(keyed: Any) -> None:
    for who in ("alice", "bob", "root"):
        with keyed.http(who) as http:
            assert http.get("/v1/models").status_code == 200
    with keyed.http() as http:
        key = keyed.keys["bob"]
        assert http.get("/v1/models", headers={"x-api-key": key}).status_code == 200
        assert http.get("/health").json() == {"status": "ok"}


def test_metrics_are_for_operators(keyed: Any) -> None:
    with keyed.http("alice") as http:
        assert http.get("/metrics").status_code == 403
    with keyed.http("root") as http:
        assert http.get("/metrics").status_code == 200


def test_a_keyless_server_answers_to_localhost_only(packaged: Any) -> None:
    with packaged.http() as http:
        for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("evil.example", 403)):
            assert http.get("/v1/models", headers={"host": host}).status_code == status
