"""Tiny random text models: LLaMA, Qwen2 and Qwen3, each with what the others lack."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import positions_from_mask
from tiny import randomise

N_LAYERS, VOCAB, N_POS = 3, 97, 13
SIZES: dict[str, Any] = dict(
    hidden_size=56, intermediate_size=34, num_hidden_layers=N_LAYERS, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, vocab_size=VOCAB, max_position_embeddings=211,
    rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA_SIZES = {**SIZES, "hidden_size": 60}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        **LLAMA_SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True
    ),
    "qwen2": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, rope_theta=1e6),
}
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
}
FAMILIES = tuple(CONFIGS)


def text_batch() -> dict[str, Tensor]:
    """Three left-padded rows of unequal length, with their positions."""
    ids = torch.randint(1, VOCAB, (3, N_POS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :1] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions_from_mask(mask),
    }


class TextModels:
    """One randomised checkpoint per family, as Hugging Face saves it, and models loaded from it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, family: str) -> Path:
        folder = self.root / family
        if not folder.exists():
            model = CLASSES[family](CONFIGS[family]).eval()
            randomise(model)
            model.tie_weights()  # acts on LLaMA, whose config declares it
            model.save_pretrained(folder)
        return folder

    def hooked(
        self, family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
    ) -> HookedALM:
        return HookedALM.from_pretrained(
            self.folder(family), dtype=dtype, attn_implementation=attention
        )

    def hf(self, family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
        model = CLASSES[family].from_pretrained(
            self.folder(family), dtype=dtype, attn_implementation=attention
        )
        return model.eval()
