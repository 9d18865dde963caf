"""Granite-Speech, as 4.0 checkpoints are: no LoRA adapter, four multipliers, a head of its own."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration

from family_case import Case, HuggingFace, Inputs, heard, left_padded, rows_of, save_hf
from hooked_alm import HookedALM
from hooked_alm.converters.blocks.log_mel import LogMel
from hooked_alm.converters.families.granite_speech import GraniteSpeechFrontEnd
from tiny import MELS, PLACEHOLDER, VOCAB

WINDOW, N_QUERIES = 6, 2
CONFIG: dict[str, Any] = dict(
    text_config=dict(
        model_type="granite", hidden_size=54, intermediate_size=34, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, vocab_size=VOCAB,
        max_position_embeddings=211, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        embedding_multiplier=3.1, residual_multiplier=0.23, attention_multiplier=0.37,
        logits_scaling=5.3,
    ),
    encoder_config=dict(
        input_dim=2 * MELS, num_layers=3, hidden_dim=24, feedforward_mult=2, num_heads=3,
        output_dim=13, context_size=10, max_pos_emb=12, conv_kernel_size=5,
        conv_expansion_factor=2,
    ),
    projector_config=dict(
        model_type="blip_2_qformer", hidden_size=20, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=22, cross_attention_frequency=1, encoder_hidden_size=24,
    ),
    audio_token_index=PLACEHOLDER, has_lora_adapter=False, downsample_rate=WINDOW // N_QUERIES,
    window_size=WINDOW, tie_word_embeddings=False,
)  # fmt: skip


def n_tokens(frames: int) -> int:
    """Two queries for every window of six frames."""
    return N_QUERIES * -(-frames // WINDOW)


def batch_norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


@torch.no_grad()
def save(folder: Path, dtype: torch.dtype) -> None:
    """The statistics of the batch norms are no parameters, and randomised here."""
    model = GraniteSpeechForConditionalGeneration(GraniteSpeechConfig(**CONFIG))
    generator = torch.Generator().manual_seed(3)
    for norm in batch_norms(model):
        norm.running_mean.copy_(0.2 * torch.randn(norm.num_features, generator=generator))
        norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
        norm.num_batches_tracked.fill_(7)
    save_hf(model, folder, dtype)


def reference(folder: Path, dtype: torch.dtype, attention: str) -> HuggingFace:
    model = GraniteSpeechForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    )
    return HuggingFace(model, model.model.language_model)


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    """The width of a batch is its longest clip's, as the processor makes it."""
    rows, frames = rows_of(clips, n_text, lambda n: [PLACEHOLDER] * n_tokens(n))
    batch: Inputs = left_padded(rows)
    if frames:
        generator = torch.Generator().manual_seed(2)
        batch["input_features"] = torch.randn(
            len(frames), max(frames), 2 * MELS, generator=generator
        )
        heard = torch.tensor([n_tokens(n) for n in frames])
        batch["input_features_mask"] = torch.arange(n_tokens(max(frames))) < heard[:, None]
    return batch


@cache
def published() -> GraniteSpeechFrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        return GraniteSpeechFrontEnd(GraniteSpeechConfig(), frozenset())


def divided(logits: Tensor, model: HookedALM) -> Tensor:
    """What ``GraniteForCausalLM`` does, and the class with audio leaves out."""
    return logits / CONFIG["text_config"]["logits_scaling"]


def forget_statistics(model: HookedALM) -> None:
    """Leave a batch norm as it is before training."""
    batch_norms(model.audio)[1].reset_running_stats()


def forget_multiplier(model: HookedALM) -> None:
    model.blocks[2].cfg.residual_multiplier = 1.0


def forget_scale(model: HookedALM) -> None:
    """Scale one block's scores by the root of the head's width, as other decoders do."""
    model.blocks[2].attn.scaling = 10**-0.5


def forget_mid_layer(model: HookedALM) -> None:
    """Leave out what the encoder's middle layer feeds back."""
    model.audio.encoder.num_layers = 99


def in_memory(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head", "lm_head")
    return f"model.{name}" if name.startswith(("encoder.", "projector.")) else name


CASE = Case(
    name="Granite-Speech",
    save=save,
    reference=reference,
    inputs=inputs,
    clips=(11, 29, 47),
    layouts={"in memory": in_memory},
    logits=divided,
    head="language_model.lm_head.weight",
    bias="encoder.layers.1.conv.batch_norm.running_var",
    faults={
        "statistics forgotten": forget_statistics,
        "residual multiplier forgotten": forget_multiplier,
        "attention multiplier forgotten": forget_scale,
        "middle layer forgotten": forget_mid_layer,
    },
    seconds={0.05: 3, 1: 12, 5: 51, 10: 102, 29.99: 300, 30: 300, 30.05: 303, 60: 600},
    tokens_of=lambda seconds: heard(published(), LogMel(), seconds),
)
