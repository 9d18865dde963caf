"""GLM-ASR, as transformers has it."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GlmAsrConfig, GlmAsrForConditionalGeneration, WhisperFeatureExtractor

from family_case import Case, HuggingFace, Inputs, heard, left_padded, rows_of, save_hf
from hooked_alm import HookedALM
from hooked_alm.converters.families.glm_asr import GlmAsrFrontEnd
from tiny import AUDIO_BOS, AUDIO_EOS, MELS, PLACEHOLDER, VOCAB
from window_features import windows

HIDDEN = 24
WINDOW = 200
"""Frames; half of them are whole tokens of four."""
CONFIG: dict[str, Any] = dict(
    text_config=dict(
        model_type="llama", hidden_size=54, intermediate_size=34, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, vocab_size=VOCAB,
        max_position_embeddings=411, rms_norm_eps=1e-5,
    ),
    audio_config=dict(
        model_type="glmasr_encoder", hidden_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=4 * HIDDEN, num_mel_bins=MELS,
        max_position_embeddings=WINDOW // 2, head_dim=12, partial_rotary_factor=0.5,
    ),
    audio_token_id=PLACEHOLDER, hidden_size=54, vocab_size=VOCAB,
)  # fmt: skip


def n_tokens(frames: int) -> int:
    """One reduction by two and one by four, counted over the whole clip as the processor does."""
    return ((frames - 1) // 2 + 1 - 4) // 4 + 1


def save(folder: Path, dtype: torch.dtype) -> None:
    save_hf(GlmAsrForConditionalGeneration(GlmAsrConfig(**CONFIG)), folder, dtype)


def reference(folder: Path, dtype: torch.dtype, attention: str) -> HuggingFace:
    return HuggingFace(
        GlmAsrForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
    )


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    rows, frames = rows_of(
        clips, n_text, lambda n: [AUDIO_BOS, *[PLACEHOLDER] * n_tokens(n), AUDIO_EOS]
    )
    batch: Inputs = left_padded(rows)
    if frames:
        batch["input_features"], batch["input_features_mask"] = windows(frames, WINDOW)
    return batch


@cache
def published() -> GlmAsrFrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        return GlmAsrFrontEnd(GlmAsrConfig(), frozenset())


def tokens_of(seconds: float) -> int:
    """Of a recording, as the published extractor hears it."""
    return heard(published(), WhisperFeatureExtractor(chunk_length=30, feature_size=128), seconds)


def swap_activation(model: HookedALM) -> None:
    """Take the wrong one between the projector's layers."""
    model.audio.projector.act = torch.nn.ReLU()


def forget_positions(model: HookedALM) -> None:
    """Turn no query and no key of the encoder."""
    model.audio.audio_tower.rotary_emb.inv_freq.zero_()


def in_memory(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.")
    return f"model.{name}" if name.startswith(("audio_tower", "multi_modal_proj")) else name


CASE = Case(
    name="GLM-ASR",
    save=save,
    reference=reference,
    inputs=inputs,
    clips=(63, 248, 460),
    layouts={"in memory": in_memory},
    is_tied=True,
    bias="multi_modal_projector.linear_1.bias",
    faults={"activation": swap_activation, "no rotary positions": forget_positions},
    seconds={0.07: 1, 1: 12, 5: 62, 10: 125, 29.99: 375, 30: 375, 30.05: 375, 60: 750},
    tokens_of=tokens_of,
)
