"""`quire serve`: a model behind OpenAI's and Anthropic's interfaces. --help needs neither torch nor the extra."""

# ruff: noqa: ARG001 - typer makes the flags from the signature; their values travel in `context.params`

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.cli.console import interruptible, say, write
from quire.cli.options import AUTO, NO_CACHE, Options, check_tiers
from quire.codecs.recipe import available
from quire.errors import ConfigError
from quire.spec import DEFAULT_BLOCK_TOKENS

if TYPE_CHECKING:
    from quire.serve.config import ServeConfig
    from quire.serve.house import House

__all__ = ["ServeOptions", "command"]

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")


def _option(panel: str, name: str, metavar: str, text: str) -> Any:
    """An option whose default is told in its text, so that a config file can speak."""
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=panel, show_default=False)


_MODEL, _CACHE, _WHO, _MUCH, _OUTPUT = "Model", "Cache", "Who may come in", "How much", "Output"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """What `quire serve` does."""

    models: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()
    share: str = AUTO
    tiers: str = ""
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: str | None = None
    new_key: str | None = None
    operator: bool = False
    insecure: bool = False
    tls_cert: str | None = None
    tls_key: str | None = None
    cors: tuple[str, ...] = ()
    max_requests: int = 256
    max_running: int = 64
    step_tokens: int = 512
    beside_tokens: int = 64
    max_body: int = 4 << 20
    max_samples: int = 32
    max_output_tokens: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    max_cache_priority: int = 1
    max_keep: float = 3600.0
    fixed_keep: bool = False
    queue_timeout: float = 120.0
    timeout: float = 900.0
    drain: float = 30.0
    no_dashboard: bool = False
    otlp: str | None = None

    def check(self) -> None:
        """See `Options.check`."""
        super().check()
        for name in sorted(self.given & set(_SAMPLING)):
            raise ConfigError(f"{name} belongs to each request, not to the server; drop it here")
        check_tiers(self.tiers, self.share, self.kv)
        if self.share not in (AUTO, "off") and self.kv == NO_CACHE:
            raise ConfigError(
                "--share finds cached prefixes and --kv none caches nothing; drop one of them"
            )
        if self.new_key is not None and self.keys is None:
            raise ConfigError("--new-key writes to a file of keys; name it with --keys FILE")
        if self.operator and self.new_key is None:
            raise ConfigError("--operator says what a new key may do; add --new-key NAME")


def command(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL…",
            show_default=False,
            help="Model folders, or hub ids, with what clients call each. Without any the model that QUIRE_MODEL "
            "names, else the packaged one.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        _option(
            _MODEL, "--name", "NAME", "What clients call the only model; default: as it is given."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        _option(
            _MODEL,
            "--adapter",
            "NAME=DIR",
            "A LoRA adapter that clients name as a model; may be repeated. Of several models: NAME=DIR,base=MODEL.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, _option(_MODEL, "--dtype", "NAME", "float32, bfloat16, …; default: the file's.")
    ] = None,
    device: Annotated[
        str | None,
        _option(_MODEL, "--device", "cpu|cuda", "Where it runs; default: cuda where there is one."),
    ] = None,
    weights: Annotated[
        str | None,
        _option(_MODEL, "--weights", "FORM", "auto (default), plain, prepacked, int8 or int4."),
    ] = None,
    compile: Annotated[  # noqa: A002 - the option's name
        bool, _option(_MODEL, "--compile", " ", "Decode steps as code made by torch.compile.")
    ] = False,
    kv: Annotated[
        str | None,
        _option(
            _CACHE,
            "--kv",
            "RECIPE",
            f"How keys and values are stored: auto (default), {', '.join(available())}; or none.",
        ),
    ] = None,
    keep: Annotated[
        str | None, _option(_CACHE, "--keep", "POLICY", "Which tokens are kept; default: full.")
    ] = None,
    memory: Annotated[
        str | None,
        _option(
            _CACHE,
            "--memory",
            "SIZE",
            "Memory for the cache, of all models together: 8GiB, or a share of what is free; default: 0.5.",
        ),
    ] = None,
    block_tokens: Annotated[
        int | None,
        _option(
            _CACHE, "--block-tokens", "N", f"Tokens per block; default: {DEFAULT_BLOCK_TOKENS}."
        ),
    ] = None,
    attention: Annotated[
        str | None,
        _option(_CACHE, "--attention", "NAME", "auto (default), cpu, torch or reference."),
    ] = None,
    share: Annotated[
        str | None,
        _option(
            _CACHE,
            "--share",
            "MODE",
            "auto (default): prefix:explain=on where the model allows it; prefix, prefix:evict=lru|cost, or off.",
        ),
    ] = None,
    tiers: Annotated[
        str | None,
        _option(
            _CACHE,
            "--tiers",
            "TIERS",
            "Memory below the cache, as host:8GiB,disk:100GiB@DIR or redis:8GiB@HOST:PORT; "
            "with a disk or a server the cache survives a restart.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        _option(
            _WHO, "--host", "ADDRESS", "Where it listens; default: 127.0.0.1. Others need keys."
        ),
    ] = None,
    port: Annotated[
        int | None, _option(_WHO, "--port", "N", "Default: 8000; 0: any that is free.")
    ] = None,
    keys: Annotated[
        str | None,
        _option(
            _WHO,
            "--keys",
            "FILE",
            "Hashed API keys, each a tenant with a cache of its own. One key may also be given as QUIRE_API_KEY.",
        ),
    ] = None,
    new_key: Annotated[
        str | None,
        _option(
            _WHO, "--new-key", "NAME", "Make a key, add its hash to --keys, print it, and end."
        ),
    ] = None,
    operator: Annotated[
        bool, _option(_WHO, "--operator", " ", "The new key may also read /metrics.")
    ] = False,
    insecure: Annotated[
        bool, _option(_WHO, "--insecure", " ", "Listen elsewhere than on loopback without keys.")
    ] = False,
    tls_cert: Annotated[
        str | None, _option(_WHO, "--tls-cert", "FILE", "PEM certificate, with its chain.")
    ] = None,
    tls_key: Annotated[str | None, _option(_WHO, "--tls-key", "FILE", "Its PEM key.")] = None,
    cors: Annotated[
        list[str] | None,
        _option(
            _WHO, "--cors", "ORIGIN", "Let this web page call; may be repeated. Default: none."
        ),
    ] = None,
    no_dashboard: Annotated[
        bool, _option(_WHO, "--no-dashboard", " ", "Serve no page at /.")
    ] = False,
    max_requests: Annotated[
        int | None,
        _option(_MUCH, "--max-requests", "N", "Running and waiting; more get 429. Default: 256."),
    ] = None,
    max_running: Annotated[
        int | None, _option(_MUCH, "--max-running", "N", "Samples in a step; default: 64.")
    ] = None,
    step_tokens: Annotated[
        int | None,
        _option(
            _MUCH,
            "--step-tokens",
            "N",
            "Tokens computed in a step; default: 512.",
        ),
    ] = None,
    beside_tokens: Annotated[
        int | None,
        _option(
            _MUCH,
            "--beside-tokens",
            "N",
            "Of these, prompt tokens beside samples that decode: fewer keep their tokens coming; default: 64.",
        ),
    ] = None,
    max_body: Annotated[
        int | None, _option(_MUCH, "--max-body", "BYTES", "Of a request; default: 4194304.")
    ] = None,
    max_samples: Annotated[
        int | None,
        _option(_MUCH, "--max-samples", "N", "Prompts × n of one request; default: 32."),
    ] = None,
    max_output_tokens: Annotated[
        int | None,
        _option(_MUCH, "--max-output-tokens", "N", "Of one sample; default: what fits."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, _option(_MUCH, "--requests-per-minute", "N", "Of each key; default: any.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        _option(
            _MUCH,
            "--tokens-per-minute",
            "N",
            "Of each key, prompt tokens that are not cached and output tokens; default: any.",
        ),
    ] = None,
    concurrent: Annotated[
        int | None, _option(_MUCH, "--concurrent", "N", "Requests at a time of each key.")
    ] = None,
    max_cache_priority: Annotated[
        int | None,
        _option(
            _MUCH, "--max-cache-priority", "N", "Highest cache.priority of a request; default: 1."
        ),
    ] = None,
    max_keep: Annotated[
        float | None,
        _option(_MUCH, "--max-keep", "SECONDS", "Longest cache.keep_for_s; default: 3600."),
    ] = None,
    fixed_keep: Annotated[
        bool, _option(_MUCH, "--fixed-keep", " ", "Refuse requests that ask for another --keep.")
    ] = False,
    queue_timeout: Annotated[
        float | None,
        _option(_MUCH, "--queue-timeout", "SECONDS", "Until the first token; default: 120."),
    ] = None,
    timeout: Annotated[
        float | None, _option(_MUCH, "--timeout", "SECONDS", "Of a request; default: 900.")
    ] = None,
    drain: Annotated[
        float | None,
        _option(_MUCH, "--drain", "SECONDS", "For running requests after SIGTERM; default: 30."),
    ] = None,
    otlp: Annotated[
        str | None,
        _option(
            _OUTPUT,
            "--otlp",
            "URL",
            "Send a span of each request to OpenTelemetry's collector, as http://127.0.0.1:4318/v1/traces.",
        ),
    ] = None,
    quiet: Annotated[
        bool, _option(_OUTPUT, "--quiet", " ", "Nothing on stderr but errors.")
    ] = False,
    config: Annotated[
        str | None,
        _option(
            _OUTPUT, "--config", "FILE.toml", "The same options from a file, in [serve]; flags win."
        ),
    ] = None,
) -> None:
    """Serve models: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages.

    Prefixes that prompts have in common are computed once, for each key apart; answers say how many tokens were cached.

    [dim]quire serve --port 8000[/dim]
    """
    options = ServeOptions.resolve("serve", context.params)
    raise typer.Exit(interruptible(lambda: _serve(options)))


def _serve(options: ServeOptions) -> int:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"quire serve needs {', '.join(missing)}; pip install 'quire[serve]'")
    if options.new_key is not None:
        from quire.serve.keys import new_key

        write(new_key(Path(str(options.keys)), options.new_key, operator=options.operator) + "\n")
        return 0
    from quire.cli.served import check_adapters, named_models, open_house

    named = named_models(options)
    check_adapters(named)
    settled = _config(options)
    tracing = None
    if options.otlp is not None:
        from quire.serve.tracing import exporting

        tracing = exporting(options.otlp)
    from quire.serve.server import bind

    listening = bind(settled)
    try:
        house = open_house(options, named, settled, tracing)
        _serve_house(options, house, listening)
    finally:
        listening.close()
    return 0


def _serve_house(options: ServeOptions, house: House, listening: Any) -> None:
    """Until SIGTERM."""
    from quire.serve.server import make_server

    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    scheme = "http" if house.config.tls_cert is None else "https"

    def started() -> None:
        # What is there now stays as long as the server. A full collection would look through all of it, some 400,000
        # objects, while every stream waits for a fifth of a second.
        gc.collect()
        gc.freeze()
        if not options.quiet:
            keys = len(house.config.keys.by_digest)
            who = f"{keys} key{'s' * (keys != 1)}" if keys else "no keys"
            cache = "prefixes shared" if any(s.shares for s in house.services) else "nothing shared"
            names = ", ".join(map(repr, house.models))
            say(f"serving {names} at {scheme}://{shown}:{port}/v1 ({who}, {cache})")
            if house.config.dashboard:
                say(f"dashboard: {scheme}://{shown}:{port}/")

    make_server(house, started).run(sockets=[listening])
    for service in house.services:
        service.engine.runner.close()  # type: ignore[attr-defined]
    if not options.quiet:
        say("all requests have ended")


def _config(options: ServeOptions) -> ServeConfig:
    """The server's part of the options. Raises ConfigError."""
    from quire.serve.config import ServeConfig
    from quire.serve.keys import Caller, Keys, Limits

    keys = Keys() if options.keys is None else Keys.read(Path(options.keys))
    if options.keys is not None and not keys:
        raise ConfigError(f"--keys {options.keys} holds no key; make one with --new-key NAME")
    alone = os.environ.get("QUIRE_API_KEY")
    if alone:
        keys.by_digest |= Keys.of([(alone, Caller("default", operator=True))]).by_digest
    return ServeConfig(
        host=options.host,
        port=options.port,
        keys=keys,
        insecure=options.insecure,
        tls_cert=None if options.tls_cert is None else Path(options.tls_cert),
        tls_key=None if options.tls_key is None else Path(options.tls_key),
        cors_origins=options.cors,
        max_body_bytes=options.max_body,
        max_requests=options.max_requests,
        limits=Limits(options.requests_per_minute, options.tokens_per_minute, options.concurrent),
        max_samples=options.max_samples,
        max_output_tokens=options.max_output_tokens,
        max_cache_priority=options.max_cache_priority,
        max_keep_s=options.max_keep,
        fixed_keep=options.fixed_keep,
        queue_timeout_s=options.queue_timeout,
        request_timeout_s=options.timeout,
        drain_s=options.drain,
        dashboard=not options.no_dashboard,
    )
