"""All that one server serves: a service for each model, and what they have in common.

    name ── find ──> service of a model (its engine, cache, tokenizer, meters), adapter
    key  ── gate ──> one, for all models together

Each model has an engine with a thread and an arena of its own: their steps run side by side, none waits for another.
What a key may use, it may use of all of them together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest

from quire.errors import ConfigError
from quire.serve.config import ServeConfig
from quire.serve.errors import ApiError
from quire.serve.service import Run, Service

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["House"]


class House:
    """Services under one roof.

    Args:
        services: at least one, made with one config, one gate and one tracing. Who names no model has the first.

    Raises:
        ConfigError: two models or adapters have one name.
    """

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = list(services)
        self.first = self.services[0]
        self.config: ServeConfig = self.first.config
        self.gate = self.first.gate
        self.models: dict[str, tuple[Service, str | None]] = {}
        for service in self.services:
            assert service.gate is self.gate, "limits are of all models together"
            for name, adapter in service.models.items():
                if name in self.models:
                    raise ConfigError(
                        f"two models or adapters are called {name!r}; write NAME=PATH"
                    )
                self.models[name] = service, adapter
        for service in self.services:
            service.served = tuple(self.models)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def find(self, name: str | None) -> tuple[Service, str | None]:
        """The service behind a model's name, and the adapter; of no name, the first. Raises ApiError: 404."""
        if name is None:
            return self.first, None
        if name in self.models:
            return self.models[name]
        raise ApiError(
            404,
            f"there is no model {name[:100]!r} here; there is {', '.join(map(repr, self.models))}",
            code="model_not_found",
            param="model",
        )

    @property
    def runs(self) -> list[Run]:
        """Requests in flight."""
        return [run for service in self.services for run in service.runs]

    async def health(self) -> None:
        """Returns when every model's decode loop has been seen to work. Raises ApiError 503 otherwise."""
        await asyncio.gather(*(service.health() for service in self.services))

    def drain(self) -> None:
        """No new requests from now on."""
        for service in self.services:
            service.drain()

    def abort(self) -> None:
        """End every request with an error that its client is told."""
        for service in self.services:
            service.abort()

    def close(self) -> None:
        """End everything."""
        for service in self.services:
            service.close()
        if self.first.tracing is not None:
            self.first.tracing.close()

    def metrics(self) -> bytes:
        """For Prometheus; each metric once, with a label for the model."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Everything, now."""
        families: dict[str, Metric] = {}
        for service in self.services:
            for family in service.meters.collect():
                if family.name in families:
                    families[family.name].samples += family.samples
                else:
                    families[family.name] = family
        yield from families.values()
