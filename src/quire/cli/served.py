"""From `quire serve`'s options to what is served: models and adapters by name, memory and tiers divided among them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.console import say
from quire.cli.options import AUTO, NO_CACHE
from quire.cli.prepare import load, look, open_cache
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.cli.serve import ServeOptions
    from quire.models.load import Loaded
    from quire.serve.admission import Gate
    from quire.serve.config import ServeConfig
    from quire.serve.house import House
    from quire.serve.service import Service
    from quire.serve.tracing import Tracing

__all__ = ["Named", "check_adapters", "named_models", "open_house"]

EXPLAINED = "prefix:explain=on"


@dataclass
class Named:
    """One model: what clients call it (None: as it is given), where it lies, and its adapters by name."""

    name: str | None
    path: str | None
    adapters: dict[str, Path] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """What clients call it."""
        from quire.models.load import PACKAGED

        return self.name or self.path or PACKAGED


def named_models(options: ServeOptions) -> list[Named]:
    """The models that the options name. Raises ConfigError: two have one name, or an adapter has no model."""
    if not options.models:
        found = [Named(options.name, options.model)]
    else:
        found = [Named(*_divided(text)) for text in options.models]
        if options.name is not None:
            if len(found) > 1 or found[0].name is not None:
                raise ConfigError(
                    "--name is for one model without a name; write NAME=MODEL instead"
                )
            found[0].name = options.name
    by_name = {model.shown: model for model in found}
    if len(by_name) < len(found):
        twice = next(m.shown for m in found if by_name[m.shown] is not m)
        raise ConfigError(f"two models are called {twice!r}; write NAME=MODEL for one of them")
    for text in options.adapter:
        name, base, folder = _adapter(text)
        if base is None and len(found) > 1:
            raise ConfigError(
                f"--adapter {text}: of which model? write {name}={folder},base={found[0].shown}"
            )
        if base is not None and base not in by_name:
            raise ConfigError(
                f"--adapter {text}: there is no model {base!r} here; there is {', '.join(map(repr, by_name))}"
            )
        if name in by_name or any(name in model.adapters for model in found):
            raise ConfigError(f"--adapter {text}: something else is called {name!r}")
        (found[0] if base is None else by_name[base]).adapters[name] = folder
    return found


def _divided(text: str) -> tuple[str | None, str | None]:
    """NAME=MODEL, or a MODEL whose own name has an = in it; the packaged one goes by its name, too."""
    from quire.models.load import PACKAGED

    name, equals, path = text.partition("=")
    if not equals or Path(text).is_dir():
        name, path = "", text
    elif not name or not path:
        raise ConfigError(f"{text!r} is neither MODEL nor NAME=MODEL")
    packaged = path == PACKAGED and not Path(path).exists()
    return name or None, None if packaged else path


def _adapter(text: str) -> tuple[str, str | None, Path]:
    name, equals, rest = text.partition("=")
    folder, _, base = rest.partition(",base=")
    if not (name and equals and folder):
        raise ConfigError(f"--adapter {text}: write NAME=DIR, or NAME=DIR,base=MODEL")
    return name, base or None, Path(folder).expanduser()


def check_adapters(named: list[Named]) -> None:
    """Raises ConfigError, before a model is read, where an adapter cannot be served."""
    for model in named:
        if model.adapters:
            from quire.models.adapters import check_adapter_folder

            for name, folder in model.adapters.items():
                check_adapter_folder(name, folder)


def open_house(
    options: ServeOptions, named: list[Named], settled: ServeConfig, tracing: Tracing | None
) -> House:
    """Loads all models, then gives each its part of the memory, an engine and a service.

    Raises:
        ConfigError, CapacityError: see `load` and `open_cache`; nothing stays open then.
    """
    from quire.models.memory import arena_bytes
    from quire.serve.admission import Gate
    from quire.serve.house import House

    loaded = [_load(options, model) for model in named]
    memory = options.memory
    if len(named) > 1 and options.kv != NO_CACHE:
        memory = arena_bytes(memory, loaded[0].model.device) // len(named)
    gate, services = Gate(settled), list[Any]()
    try:
        for model, one in zip(named, loaded, strict=True):
            tiers = _own_tiers(options.tiers, model.shown, len(named))
            own = replace(options, memory=memory, tiers=tiers)
            services.append(_serve(own, model.shown, one, settled, gate, tracing))
        return House(services)
    except BaseException:
        for service in services:
            service.close()
            service.engine.runner.close()
        raise


def _load(options: ServeOptions, model: Named) -> Loaded:
    off = replace(options, share="off", model=model.path)
    source = look(off if options.share == AUTO else replace(options, model=model.path))
    loaded = load(source, off, [])
    if loaded.tokenizer is None:
        raise ConfigError(f"{loaded.name} comes without a tokenizer, so it cannot read text")
    if model.adapters:
        from quire.models.adapters import load_adapters

        loaded = replace(loaded, model=load_adapters(loaded.model, model.adapters))
    return loaded


def _own_tiers(text: str, name: str, models: int) -> str:
    """A model's part of the tiers: an equal share of the host's memory and of disks, there in a folder of its own."""
    if models == 1 or not text:
        return text
    from quire.store.tiers.recipe import divided

    return divided(text, re.sub(r"[^\w.-]", "_", name).strip("."), models)


def _serve(
    options: ServeOptions,
    name: str,
    loaded: Loaded,
    settled: ServeConfig,
    gate: Gate,
    tracing: Tracing | None,
) -> Service:
    from quire.engine import Engine, SchedulerConfig
    from quire.serve.service import Service

    runner = _open(loaded, options)
    try:
        engine = Engine(
            runner,
            loaded.tokenizer,
            config=SchedulerConfig(
                step_tokens=options.step_tokens,
                beside_tokens=options.beside_tokens,
                max_running=options.max_running,
            ),
            eos_token_ids=loaded.eos_token_ids,
        )
        tiering = getattr(runner, "tiering", None)
        return Service(
            engine,
            settled,
            name,
            kv=options.kv,
            keep=options.keep,
            secret=None if tiering is None else tiering.secret(),  # names outlive the process too
            gate=gate,
            tracing=tracing,
        )
    except BaseException:
        runner.close()
        raise


def _open(loaded: Loaded, options: ServeOptions) -> Any:
    """A runner that shares prefixes where it can and nothing else was asked."""
    if options.share != AUTO:
        if "share" not in options.given:  # --tiers wants prefixes
            options = replace(options, share=EXPLAINED)
        return open_cache(loaded, options)
    if options.kv != NO_CACHE:
        try:
            return open_cache(loaded, replace(options, share=EXPLAINED))
        except ConfigError as e:
            refused = e
        runner = open_cache(loaded, replace(options, share="off"))
        if not options.quiet:
            say(f"no prefixes are shared: {refused}", "yellow")
        return runner
    return open_cache(loaded, replace(options, share="off"))
