"""Random adapters, as PEFT makes and saves them."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]


def adapted(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """Hugging Face's model under a random adapter, as PEFT makes it."""
    from transformers import Qwen2AudioForConditionalGeneration

    base = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    decoder = r".*language_model\..*\.(" + "|".join(TARGETS) + ")"
    return under_adapter(base, decoder, **options)


def under_adapter(base: Any, modules: str, **options: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=modules, **options)
    with warnings.catch_warnings():  # it asks transformers for a property under its old name
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(base, config).eval()
    randomise_adapter(model)
    return model


@torch.no_grad()
def randomise_adapter(model: Any) -> None:
    """B starts at zero, and would hide everything."""
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=draw))
