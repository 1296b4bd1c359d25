"""A span per request: its figures, whose trace it continues, how it ended; never a word of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from quire.errors import ConfigError
from quire.serve.config import ServeConfig
from quire.serve.tracing import Tracing, exporting
from served import serving, wait_for

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.fixture(scope="module")
def traced(tiny_folder: Path) -> Iterator[tuple[Any, Any]]:
    """A server, and the exporter that holds its spans."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra quire[otel]")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    config = ServeConfig(port=0, drain_s=5)
    with serving(str(tiny_folder), config, name="tiny", tracing=Tracing(provider)) as served:
        yield served, exporter


def the_span(exporter: Any, work: Callable[[], object]) -> Any:
    exporter.clear()
    work()
    wait_for(lambda: len(exporter.get_finished_spans()) >= 1)
    (span,) = exporter.get_finished_spans()
    return span


def test_a_request_is_one_span_without_its_words(traced: Any) -> None:
    served, exporter = traced
    client = served.client()
    prompt = "unmistakable words of a prompt " * 4
    wanted = {"model": "tiny", "prompt": prompt, "max_tokens": 5, "temperature": 0}
    client.completions.create(**wanted)
    done: list[Any] = []
    span = the_span(
        exporter, lambda: done.append(client.completions.create(**wanted, extra_headers=PARENT))
    )
    usage = done[0].usage
    said = dict(span.attributes)
    assert span.name == "text_completion tiny"
    assert said["gen_ai.request.model"] == "tiny"
    assert said["gen_ai.request.max_tokens"] == 5
    assert said["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert said["gen_ai.usage.output_tokens"] == 5
    cached = usage.prompt_tokens_details.cached_tokens
    assert said["gen_ai.usage.cache_read.input_tokens"] == cached > 0
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    assert 0 <= said["quire.queue_s"] <= said["quire.first_token_s"]
    assert said["quire.kv_peak_bytes"] > 0
    assert said["enduser.id"] == "anybody"
    assert [event.name for event in span.events] == ["first token"]
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.status.is_ok
    assert "unmistakable" not in span.to_json()
    assert done[0].choices[0].text not in span.to_json()


def test_a_chat_without_a_parent_begins_a_trace(traced: Any) -> None:
    served, exporter = traced
    turns = [{"role": "user", "content": "a question"}]

    def chat() -> None:
        stream = served.client().chat.completions.create(
            model="tiny", messages=turns, max_tokens=6, n=2, stream=True
        )
        assert sum(1 for _ in stream) > 2

    span = the_span(exporter, chat)
    assert span.name == "chat tiny"
    assert span.parent is None
    assert span.attributes["gen_ai.usage.output_tokens"] == 12
    assert len(span.events) == 1, "tokens are not traced"


def test_how_a_request_ended_is_told(traced: Any) -> None:
    served, exporter = traced
    wanted = {"model": "tiny", "prompt": "x" * 40, "max_tokens": 1500, "temperature": 0}

    def leave() -> None:
        stream = served.client().completions.create(**wanted, stream=True)
        next(iter(stream))
        stream.close()

    span = the_span(exporter, leave)
    assert span.attributes["error.type"] == "cancelled"
    assert not span.status.is_ok
    with pytest.raises(openai.BadRequestError):
        served.client().completions.create(**(wanted | {"prompt": "x" * 4000}))
    exporter.clear()
    served.service.engine.between(lambda: None).result()
    assert not exporter.get_finished_spans(), "what was never let in is no span"


def test_nothing_is_traced_unless_asked(packaged: Any) -> None:
    assert packaged.service.tracing is None
    run: list[Any] = []
    before = packaged.service.open_run
    packaged.service.open_run = lambda *a, **k: run.append(before(*a, **k)) or run[-1]
    try:
        packaged.client().completions.create(model="packaged", prompt="x", max_tokens=2)
    finally:
        packaged.service.open_run = before
    assert run[0].span is None


def test_spans_reach_a_collector() -> None:
    pytest.importorskip(
        "opentelemetry.exporter.otlp.proto.http", reason="needs the extra quire[otel]"
    )
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.handle_request)
        thread.start()
        tracing = exporting(f"http://127.0.0.1:{collector.server_port}/v1/traces")
        tracing.ended(tracing.begin("a-model", "alice"), [], [], None)
        tracing.close()
        thread.join(30)
    ((path, body),) = got
    assert path == "/v1/traces"
    assert b"generate a-model" in body
    assert b"alice" in body


def test_the_flag_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        exporting("collector:4318")
    monkeypatch.setattr("quire.serve.tracing.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"quire\[otel\]"):
        exporting("http://127.0.0.1:4318/v1/traces")
