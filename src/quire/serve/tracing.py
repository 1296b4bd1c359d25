"""OpenTelemetry: one span per request, with its figures and never its words. Needs the extra `quire[otel]`.

    chat packaged    gen_ai.* as OpenTelemetry names them, quire.* for what the cache did
        event "first token"                                          the only event: tokens are not traced

A request that says where it comes from (`traceparent`) continues that trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quire import __version__
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.engine.request import RequestFigures

__all__ = ["ASKED", "Tracing", "exporting"]

ASKED: ContextVar[tuple[str, Mapping[str, str]]] = ContextVar("ASKED", default=("", {}))
"""Path of the HTTP request that is served, and its headers that say which trace it belongs to."""

CARRIED = (b"traceparent", b"tracestate")
NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}


class Tracing:
    """Makes spans.

    Args:
        provider: OpenTelemetry's; closed with this.
    """

    def __init__(self, provider: Any) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("quire.serve", __version__)

    def begin(self, model: str, tenant: str, **asked: Any) -> Any:
        """The span of the request that is served now; `ended` closes it."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        path, carried = ASKED.get()
        operation = _OPERATIONS.get(path, "generate")
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "quire",
            "gen_ai.request.model": model,
            "enduser.id": tenant,
            "url.path": path,
            **{f"gen_ai.request.{k}": v for k, v in asked.items() if v is not None},
        }
        return self._tracer.start_span(
            f"{operation} {model}",
            context=TraceContextTextMapPropagator().extract(dict(carried)),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )

    def ended(
        self,
        span: Any,
        figures: Sequence[RequestFigures],
        reasons: Sequence[str],
        error: str | None,
    ) -> None:
        """Closes a span.

        Args:
            figures: of each of its prompts.
            reasons: why its samples ended, of those that have.
            error: what kept it from its end; None where it was answered.
        """
        from opentelemetry.trace import Status, StatusCode

        first = [f.ttft_s for f in figures if f.ttft_s is not None]
        queue = [f.queue_s for f in figures if f.queue_s is not None]
        prompt_tokens = sum(f.prompt_tokens for f in figures)
        cached_tokens = sum(f.cached_tokens for f in figures)
        span.set_attributes(
            {
                "gen_ai.usage.input_tokens": prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": cached_tokens,
                "gen_ai.usage.output_tokens": sum(f.output_tokens for f in figures),
                "gen_ai.response.finish_reasons": tuple(reasons),
                "quire.preemptions": sum(f.preemptions for f in figures),
                "quire.recomputed_tokens": sum(f.recomputed_tokens for f in figures),
                "quire.kv_peak_bytes": sum(f.kv_bytes_peak for f in figures),
                **({"quire.queue_s": max(queue)} if queue else {}),
                **({"quire.first_token_s": min(first)} if first else {}),
            }
        )
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR, error))
        span.end()

    def close(self) -> None:
        """Sends what is left."""
        self.provider.shutdown()


def exporting(url: str) -> Tracing:
    """Spans to a collector, in batches, by OTLP over HTTP.

    Args:
        url: where it takes them, as http://127.0.0.1:4318/v1/traces.

    Raises:
        ConfigError: OpenTelemetry is not installed, or that is no address.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--otlp {url!r} is no address; as http://127.0.0.1:4318/v1/traces")
    if any(_missing(name) for name in NEEDED):
        raise ConfigError("--otlp needs OpenTelemetry; pip install 'quire[otel]'")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(
        resource=Resource.create({"service.name": "quire", "service.version": __version__}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return Tracing(provider)


def _missing(name: str) -> bool:
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:  # nor its parent
        return True
