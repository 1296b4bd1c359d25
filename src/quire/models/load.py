"""From a name to a model in memory. What the config can tell is told before a weight is read.

    check_source("folder or hub id")   config.json, the list of files, the tokenizer: seconds
    load_model(source)                 the weights

Without a name both mean the small model that travels with the package.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from quire.errors import CapacityError, ConfigError
from quire.models.files import (
    WEIGHTS,
    check_weights,
    has_tokenizer,
    parse_config,
    read_config,
    short_line,
)

__all__ = ["DEVICES", "DTYPES", "Loaded", "Source", "check_source", "load_model"]

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
"""What a model may compute in; auto is what its file holds."""

DEVICES = ("cpu", "cuda")

PACKAGED = "packaged"

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_TIMEOUT_S = 10.0
_SAMPLES = 256
"""Elements of each weight that its fingerprint reads."""


@dataclass(frozen=True)
class Source:
    """A model that has been looked at and not loaded.

    Args:
        name: as the user wrote it; "packaged" for the one in the package.
        location: a folder or a hub id.
        folder: None for a hub id.
        config: config.json.
        dtype: one of `DTYPES`.
        device: "cpu", "cuda", "cuda:1"; "auto" is cuda where there is one.
        offline: all files are here; the hub need not be asked.
    """

    name: str
    location: str
    folder: Path | None
    config: Mapping[str, Any]
    dtype: str = "auto"
    device: str = "auto"
    offline: bool = True

    @property
    def architecture(self) -> str:
        """The model's class, or its type where the config names none."""
        named = self.config.get("architectures") or [self.config.get("model_type", "unknown")]
        return str(named[0])

    @cached_property
    def hf_config(self) -> Any:
        """transformers' reading of the config. Raises ConfigError when it cannot read it."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.location, local_files_only=self.offline)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConfigError(
                f"{self.name}: its config.json cannot be used ({short_line(e)})"
            ) from e

    @property
    def max_context_tokens(self) -> int | None:
        """The longest sequence that the config allows; None where it sets no limit."""
        config = self.hf_config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or getattr(
            config, "n_positions", None
        )
        return int(limit) if limit else None

    @property
    def chosen_device(self) -> str:
        """`device`, with auto resolved."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None when it comes without one."""
        from transformers import AutoTokenizer

        if self.folder is not None and not has_tokenizer(self.folder):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.location, local_files_only=self.offline)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
            raise ConfigError(
                f"{self.name}: its tokenizer cannot be loaded ({short_line(e)})"
            ) from e


@dataclass(frozen=True)
class Loaded:
    """A model in memory, in eval mode, on its device.

    Args:
        model: a causal transformers model.
        tokenizer: None when it comes without one.
        name: as the user wrote it.
        eos_token_ids: what ends its texts, by its generation config, its config and its tokenizer.
        config: config.json.
        missing: weights that the file lacks and that were drawn at random: the text will be noise.
    """

    model: Any
    tokenizer: Any
    name: str
    eos_token_ids: tuple[int, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weights as loaded: names, shapes, dtypes and up to 256 elements of each.

        Tells models, fine-tunes and dtypes apart in milliseconds. It is no proof against a forger.
        """
        return fingerprint(self.model.named_parameters())


# -- looking -----------------------------------------------------------------------------------------------------


def check_source(
    source: str | PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
) -> Source:
    """Everything that can be known about a model without loading it.

    Args:
        source: a folder, a hub id, or None for the packaged model.
        dtype: one of `DTYPES`, or fp32, bf16, fp16.
        device: cpu or cuda (cuda:1, …); None chooses.

    Raises:
        ConfigError: no such folder or id; no config or no weights in it; not a causal language model; an unknown dtype;
            a device that is not here. One line that says what would work.
    """
    dtype, device = _dtype(dtype), _device(device)
    name = PACKAGED if source is None else str(source)
    folder = _packaged() if source is None else Path(source).expanduser()
    if folder.is_dir():
        config = read_config(folder, name)
        check_weights(folder, name)
        found = Source(name, str(folder), folder, config, dtype, device)
    else:
        found = replace(_from_hub(name, folder), dtype=dtype, device=device)
    _check_kind(found)
    return found


def _dtype(name: str | None) -> str:
    name = _SHORT.get(name or "auto", name or "auto").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return name


def _device(name: str | None) -> str:
    if name in (None, "auto", "cpu"):
        return name or "auto"
    kind, colon, number = str(name).partition(":")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise ConfigError(f"unknown device {name!r}; known: {', '.join(DEVICES)}")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError(f"device {name!r}: this machine has no CUDA device; device 'cpu' works")
    if colon and int(number) >= count:
        raise ConfigError(f"device {name!r}: there are {count}, the last is cuda:{count - 1}")
    return str(name)


def _packaged() -> Path:
    from quire import packaged

    folder = packaged.path()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "this installation carries no packaged model; name one: a model folder or a hub id"
        )
    return folder


def _check_kind(source: Source) -> None:
    """Only what writes text token by token from a decoder goes on."""
    config, name = source.config, source.name
    kind = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        raise ConfigError(
            f"{name}: {source.architecture} is an encoder-decoder model; Quire runs decoder-only (causal) models"
        )
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    if kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ConfigError(
                f"{name}: {kind} needs code from its own repository, which Quire does not run; "
                "choose a model whose type transformers knows"
            )
        raise ConfigError(f"{name}: transformers knows no model_type {kind!r}; a newer version may")
    classes = {c for v in CAUSAL.values() for c in ((v,) if isinstance(v, str) else v)}
    known = [a for a in config.get("architectures") or () if a in classes]
    both_ways = kind in MASKED and not config.get("is_decoder")
    if (
        kind not in CAUSAL
        or (config.get("architectures") and not known)
        or (both_ways and not config.get("architectures"))
        or (both_ways and known and known[0].endswith("LMHeadModel") and _is_encoder(kind))
    ):
        what = (
            source.architecture
            if source.architecture == kind
            else f"{kind} ({source.architecture})"
        )
        raise ConfigError(
            f"{name}: {what} is no causal language model and cannot write text token by token; "
            "choose a decoder, whose architecture ends in ForCausalLM or LMHeadModel"
        )


def _is_encoder(kind: str) -> bool:
    """BERT and its kin attend both ways unless their config says is_decoder."""
    return kind.endswith(("bert", "roberta", "electra", "ernie")) or kind in ("roformer", "xlm")


# -- the hub -----------------------------------------------------------------------------------------------------


def _from_hub(name: str, folder: Path) -> Source:
    """A hub id: from the local cache where it is whole, else by asking the hub, once and briefly."""
    if folder.is_file():
        raise ConfigError(f"{name} is a file; give the folder that holds config.json and weights")
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"there is no folder {name}; give a model folder or a hub id (owner/name)"
        )
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        snapshot = Path(cached).parent
        try:
            check_weights(snapshot, name)
        except ConfigError:
            pass  # not all of it was fetched; ask the hub
        else:
            return Source(name, name, None, parse_config(Path(cached), name))
    try:
        info = HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
        files = {s.rfilename for s in info.siblings or ()}
        if "config.json" not in files:
            raise ConfigError(f"{name}: this hub repository holds no config.json; it is no model")
        if not any(f in files or f"{f}.index.json" in files for f in WEIGHTS):
            raise ConfigError(f"{name}: this hub repository holds no safetensors weights")
        path = hf_hub_download(name, "config.json")
    except ConfigError:
        raise
    except Exception as e:  # the hub's client and its HTTP library raise a dozen unrelated kinds
        raise ConfigError(
            f"there is no folder {name}, and the hub gives no such model ({short_line(e)}); "
            "give a model folder, or a hub id that can be reached"
        ) from e
    return Source(name, name, None, parse_config(Path(path), name), offline=False)


# -- loading -----------------------------------------------------------------------------------------------------


def load_model(
    source: Source | str | PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
) -> Loaded:
    """Loads weights and tokenizer.

    Args:
        source: what `check_source` returned, or its first argument.
        dtype, device: as for `check_source`; they override the ones of a `Source`.

    Raises:
        ConfigError: see `check_source`; or the files cannot be loaded, in one line.
        CapacityError: the weights do not fit the memory.
    """
    if not isinstance(source, Source):
        source = check_source(source, dtype=dtype, device=device)
    elif dtype is not None or device is not None:
        source = replace(
            source,
            dtype=source.dtype if dtype is None else _dtype(dtype),
            device=source.device if device is None else _device(device),
        )
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device = source.chosen_device
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype="auto" if source.dtype == "auto" else getattr(torch, source.dtype),
            local_files_only=source.offline,
            output_loading_info=True,
        )
        if str(model.device) != device:
            model = model.to(device)
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise CapacityError(
            f"{source.name}: its weights do not fit the memory of {device}; a smaller model or dtype may"
        ) from e
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as e:
        raise ConfigError(f"{source.name}: its weights cannot be loaded ({short_line(e)})") from e
    missing = tuple(sorted(str(k) for k in info.get("missing_keys", ())))
    _align(model)
    tokenizer = source.tokenizer
    eos = _eos(model, tokenizer)
    return Loaded(model.eval(), tokenizer, source.name, eos, source.config, missing)


def _align(model: Any, to_bytes: int = 64) -> None:
    """Copies CPU weights that do not begin on a cache line.

    Safetensors maps a file's bytes where they lie; torch's grouped products for experts want 16 bytes on CPUs (pytorch
    issue 172440), and every product is fastest on whole lines.
    """
    for p in model.parameters():
        if p.device.type == "cpu" and p.data_ptr() % to_bytes:
            p.data = p.data.clone()


def _eos(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that somebody declares to end a text."""
    named = [
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config.get_text_config(decoder=True), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ]
    ids: list[int] = []
    for x in named:
        ids += [] if x is None else [int(i) for i in x] if isinstance(x, list | tuple) else [int(x)]
    return tuple(dict.fromkeys(ids))


def fingerprint(parameters: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 over names, shapes, dtypes and a sample of the elements."""
    import torch

    found = hashlib.sha256()
    for name, p in parameters:
        found.update(f"{name} {tuple(p.shape)} {p.dtype}\n".encode())
        flat = _flat(p)
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().contiguous()
        found.update(some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def full_digest(parameters: Iterable[tuple[str, Any]]) -> bytes:
    """Over names, shapes, dtypes and every element: one changed weight changes it.

    Cost: the weights once; 37 GB/s where `xxhash` is installed, 0.9 otherwise.
    """
    import torch

    from quire.store.tiers.envelope import checksum

    found = hashlib.sha256()
    for name, p in parameters:
        found.update(f"{name} {tuple(p.shape)} {p.dtype}\n".encode())
        flat = _flat(p)
        found.update(checksum(flat.cpu().contiguous().view(torch.uint8).numpy().data))
    return found.digest()


def weights_digest(model: Any) -> str:
    """SHA-256 over the weights whatever they are computed in: names, shapes and a sample, as bfloat16 has it."""
    import torch

    found = hashlib.sha256()
    for name, p in model.named_parameters():
        found.update(f"{name} {tuple(p.shape)}\n".encode())
        flat = _flat(p)
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().contiguous()
        found.update(some.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _flat(p: Any) -> Any:
    """A parameter's elements in the order of its plain form, however `prepack` holds it."""
    return (p.detach().to_dense() if p.is_mkldnn else p.detach()).reshape(-1)
