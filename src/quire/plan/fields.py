"""A config.json's fields under the many names that they go by, with an account of what was missing.

Nothing is ever taken for zero: a number that decides bytes is there, or follows from others and is noted as assumed,
or the config is refused with the names of the fields that would answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.errors import ConfigError

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
DECODER_LAYERS = ("decoder_layers", "num_decoder_layers")
HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "num_decoder_attention_heads",
    "attention_heads",
)
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels", "head_size", "d_kv", "d_head")
CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "context_length",
    "max_target_positions",
    "n_ctx",
)
WINDOW = ("sliding_window", "sliding_window_size", "attention_window_size")
CHUNK = ("attention_chunk_size",)

MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What reading raises where a field holds something else than its name says."""

_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
"""Where composites keep their language model, in the order in which they are looked for."""


class Fields:
    """One model's config, the text part of a composite before its outer part.

    Args:
        config: a parsed config.json.
        name: of the model, for messages.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.name = name
        self.whole = config
        text: Mapping[str, Any] = config
        while inner := next((text[p] for p in _PARTS if isinstance(text.get(p), Mapping)), None):
            text = inner
        self.text = text
        self.assumed: list[str] = []
        self.last = ""
        """The field that was read last: the one to name when what it holds makes no sense."""

    @property
    def kind(self) -> str:
        """The language model's `model_type`; of a composite whose part names none, the whole's."""
        found = self.text.get("model_type") or self.whole.get("model_type")
        return str(found or "unknown")

    def get(self, *names: str) -> Any:
        """The first of these fields that is there and not null, else None."""
        for name in names:
            value = self.text.get(name)
            if value is not None:
                self.last = name
                return value
        return None

    def outer(self, *names: str) -> Any:
        """The same, looking into the whole of a composite too."""
        found = self.get(*names)
        if found is not None:
            return found
        return next((self.whole[n] for n in names if self.whole.get(n) is not None), None)

    def count(self, *names: str) -> int | None:
        """A whole number above zero, or None where no such field is there.

        Raises:
            ConfigError: the field holds something else.
        """
        for name in names:
            value = self.text.get(name)
            if value is None:
                continue
            self.last = name
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{self.name}: {name} must be a whole number above zero, not {value!r}"
                )
            return value
        return None

    def need(self, what: str, *names: str) -> int:
        """The same, where nothing can stand in for it.

        Raises:
            ConfigError: which names were looked for.
        """
        found = self.count(*names)
        if found is None:
            raise ConfigError(
                f"{self.name}: the config of this {self.kind} lacks {what}: none of {', '.join(names)} is there; "
                "add the one that its model type uses"
            )
        return found

    def assume(self, text: str) -> None:
        """Notes once what was not in the config and what stands in for it."""
        if text not in self.assumed:
            self.assumed.append(text)

    def senseless(self, e: Exception) -> ConfigError:
        """For one of MALFORMED: the field that was read last holds what no such model has there."""
        held = " ".join(repr(self.outer(self.last)).split())
        held = held if len(held) < 60 else f"{held[:57]}..."
        return ConfigError(f"{self.name}: {self.last} cannot be {held} in a {self.kind} ({e})")
