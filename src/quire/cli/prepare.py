"""From options to a model that runs, refusing on the way whatever can be refused before its weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.cli.console import quiet_transformers, say, spinner
from quire.cli.options import NO_CACHE, Options, tiers_of
from quire.codecs.recipe import parse_recipe
from quire.errors import CapacityError, ConfigError
from quire.models.load import Loaded, Source, check_source, load_model
from quire.plan.layout import build_layout, check_config
from quire.plan.shape import ModelShape
from quire.spec import CacheSpec, KVConfig

__all__ = ["check_shape", "depends_on_shape", "load", "look", "open_cache", "vocabulary"]


def look(options: Options) -> Source:
    """Checks the cache's choices and the model's files.

    Raises:
        ConfigError: an unknown codec, policy or backend; a model that cannot run here.
    """
    if options.kv != NO_CACHE:
        check_config(KVConfig(options.kv, options.keep, options.block_tokens, share_of(options)))
    with spinner("looking at the model …", shown=not options.quiet):
        source = check_source(options.model, dtype=options.dtype, device=options.device)
        quiet_transformers()
        from quire.models.bridge import make_backend
        from quire.models.compiled import check_compile
        from quire.models.memory import arena_bytes
        from quire.models.prepack import check_weights

        make_backend(options.attention, source.chosen_device)
        check_weights(options.weights)
        if options.compile:
            check_compile()
        arena_bytes(options.memory, source.chosen_device)
    return source


def share_of(options: Options) -> str:
    """Whether prefixes are shared; commands without the option share none."""
    return str(getattr(options, "share", "off"))


def vocabulary(source: Source) -> int:
    """How many tokens the model knows."""
    return int(source.hf_config.get_text_config(decoder=True).vocab_size)


def load(source: Source, options: Options, lengths: Sequence[tuple[str, int]]) -> Loaded:
    """Loads the weights, after making sure that every sequence would fit the cache.

    Args:
        source: what `look` found.
        lengths: of each request: what names it in a message, and the tokens that it will put into the cache.
    """
    with spinner("loading the model …", shown=not options.quiet):
        _fit(source, options, lengths)
        loaded = load_model(source)
    if loaded.missing:
        shown = ", ".join(loaded.missing[:3]) + (", …" if len(loaded.missing) > 3 else "")
        say(
            f"warning: the file lacks {len(loaded.missing)} of the model's weights ({shown}); "
            "they are random, and so is the text",
            "yellow",
        )
    return loaded


def open_cache(loaded: Loaded, options: Options) -> Any:
    """A runner over the loaded model."""
    from quire.models.open import open_runner

    with spinner("joining model and cache …", shown=not options.quiet):
        return open_runner(
            loaded.model,
            kv=options.kv,
            keep=options.keep,
            memory=options.memory,
            block_tokens=options.block_tokens,
            attention=options.attention,
            weights=options.weights,
            share=share_of(options),
            tiers=tiers_of(str(getattr(options, "tiers", ""))),
            compile=options.compile,
        )


def check_shape(source: Source, config: KVConfig) -> CacheSpec | None:
    """The cache's groups on the model's shape, found without weights: torch's meta device holds none.

    Returns:
        None for a model that does not run there: it is judged when it is loaded.

    Raises:
        ConfigError: the configuration cannot serve this model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from quire.models.probe import probe

    dtype = source.dtype
    if dtype == "auto":
        dtype = str(getattr(source.hf_config, "dtype", None) or "float32").removeprefix("torch.")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(source.hf_config, dtype=getattr(torch, dtype))
        shape = probe(model.eval())
    except Exception:  # noqa: BLE001 - data-dependent models raise many kinds on the meta device
        return None
    return build_layout(shape.layers, config, dtype=dtype, shared=shape.shared).spec


def depends_on_shape(kv: str) -> bool:
    """Whether a recipe can fail on one model and work on another: worth the seconds that a shape takes to find."""
    recipe = parse_recipe(kv)
    return bool(recipe.skip_layers or recipe.map or any(not c.plain for c in recipe.loaded()))


def _fit(source: Source, options: Options, lengths: Sequence[tuple[str, int]]) -> None:
    """The planner's arithmetic, before the weights are read."""
    from quire.models.memory import arena_bytes, free_bytes
    from quire.plan.refuse import check_cache, check_weights_fit
    from quire.store.tiers.recipe import parse_tiers

    weights = _weight_bytes(source)
    if weights is not None:
        device = source.chosen_device
        check_weights_fit(source.name, weights, free_bytes(device), device)
    if options.kv == NO_CACHE:
        return
    if parse_tiers(getattr(options, "tiers", "")).offload:
        lengths = ()  # the engine says which requests fit with their cold blocks below
    config = KVConfig(options.kv, options.keep, options.block_tokens)
    total_bytes = arena_bytes(options.memory, source.chosen_device)
    shape = _planned(source)
    if shape is None:
        _fit_as_run(source, options, config, total_bytes, lengths)
        return
    for where, n_tokens in lengths or [("", 1)]:
        check_cache(
            shape,
            config,
            n_tokens,
            total_bytes,
            where=where,
            memory=f"--memory {options.memory}",
        )


def _weight_bytes(source: Source) -> int | None:
    """Of the files, in the dtype that they will be loaded in; None for what is not here yet."""
    from quire.plan.weights import BITS, file_bytes

    found = None if source.folder is None else file_bytes(source.folder)
    filed = str(source.config.get("dtype") or source.config.get("torch_dtype") or "")
    if found is None or source.dtype == "auto" or filed not in BITS:
        return found
    return int(found * BITS[source.dtype] / BITS[filed])


def _planned(source: Source) -> ModelShape | None:
    """The model's layers from its config alone; None where the planner cannot read it."""
    from quire.plan.shape import read_shape

    dtype = None if source.dtype == "auto" else source.dtype
    try:
        return read_shape(source.config, source.name, dtype=dtype)
    except ConfigError:
        return None


def _fit_as_run(
    source: Source,
    options: Options,
    config: KVConfig,
    total_bytes: int,
    lengths: Sequence[tuple[str, int]],
) -> None:
    """The same for a config that only transformers can read: seconds, so only where a choice could fail."""
    if not ("memory" in options.given or options.keep != "full" or depends_on_shape(options.kv)):
        return
    from quire.store.store import BlockStore

    spec = check_shape(source, config)
    if spec is None:
        return
    store = BlockStore(spec, total_bytes)
    for where, n_tokens in lengths:
        if not store.fits(n_tokens):
            raise CapacityError(
                f"{where}{n_tokens} tokens need {spec.bytes_for(n_tokens):,} bytes of cache and --memory "
                f"{options.memory} gives {store.arena.total_bytes:,}; give more, ask for fewer tokens, or choose a "
                "smaller codec"
            )
