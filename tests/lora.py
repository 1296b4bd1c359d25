"""LoRA adapters that the tests make themselves, as loud as the weights, so that no text survives the wrong one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

TARGETS = ("q_proj", "k_proj", "v_proj", "down_proj")


def make_adapter(
    base: Path, folder: Path, *, seed: int, targets: tuple[str, ...] = TARGETS
) -> Path:
    """An adapter of the model in `base`."""
    peft = pytest.importorskip("peft", reason="adapters need the peft package")
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own calls
        config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(folder)
    return folder


def merged(base: Path, folder: Path | None) -> Any:
    """The model as plain weights, the adapter added."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    if folder is None:
        return model.eval()
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
