"""Voxtral, as transformers has it."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import VoxtralConfig, VoxtralForConditionalGeneration, WhisperFeatureExtractor

from family_case import Case, HuggingFace, Inputs, heard, left_padded, rows_of, save_hf
from hooked_alm import HookedALM
from hooked_alm.converters.families.voxtral import VoxtralFrontEnd
from tiny import AUDIO_BOS, MELS, PLACEHOLDER, VOCAB
from window_features import WINDOW, windows

HIDDEN = 24
STACKED = 5
"""Frames that are one token; the published sizes have four, which would leave half a token over."""
CONFIG: dict[str, Any] = dict(
    text_config=dict(
        model_type="llama", hidden_size=54, intermediate_size=34, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, vocab_size=VOCAB,
        max_position_embeddings=411, rms_norm_eps=1e-5, sliding_window=None,
    ),
    audio_config=dict(
        model_type="voxtral_encoder", hidden_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=STACKED * HIDDEN, num_mel_bins=MELS,
        max_source_positions=WINDOW // 2, head_dim=8, num_key_value_heads=3,
    ),
    audio_token_id=PLACEHOLDER, hidden_size=54, vocab_size=VOCAB,
)  # fmt: skip


def n_tokens(frames: int) -> int:
    """Whole windows, silence included."""
    return -(-frames // WINDOW) * (WINDOW // 2 // STACKED)


def save(folder: Path, dtype: torch.dtype) -> None:
    save_hf(VoxtralForConditionalGeneration(VoxtralConfig(**CONFIG)), folder, dtype)


def reference(folder: Path, dtype: torch.dtype, attention: str) -> HuggingFace:
    return HuggingFace(
        VoxtralForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
    )


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    rows, frames = rows_of(clips, n_text, lambda n: [AUDIO_BOS, *[PLACEHOLDER] * n_tokens(n)])
    batch: Inputs = left_padded(rows)
    if frames:
        batch["input_features"], _ = windows(frames)
    return batch


@cache
def published() -> VoxtralFrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        return VoxtralFrontEnd(VoxtralConfig(audio_token_id=24), frozenset())


def tokens_of(seconds: float) -> int:
    """Of a recording, as the published extractor hears it."""
    return heard(published(), WhisperFeatureExtractor(chunk_length=30, feature_size=128), seconds)


def swap_activation(model: HookedALM) -> None:
    """Take the wrong one between the projector's layers."""
    model.audio.projector.act = torch.nn.ReLU()


def forget_positions(model: HookedALM) -> None:
    """Leave out what is added to the encoder's first states."""
    model.audio.encoder.embed_positions.weight.data.zero_()


def in_memory(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head", "lm_head")
    return f"model.{name}" if name.startswith(("audio_tower", "multi_modal_proj")) else name


CASE = Case(
    name="Voxtral",
    save=save,
    reference=reference,
    inputs=inputs,
    clips=(63, 147, 260),
    layouts={"in memory": in_memory},
    head="language_model.lm_head.weight",
    bias="language_model.model.layers.1.post_attention_layernorm.weight",
    faults={"activation": swap_activation, "no positions": forget_positions},
    seconds={0.05: 375, 1: 375, 5: 375, 10: 375, 29.99: 375, 30: 375, 30.05: 750, 60: 750},
    tokens_of=tokens_of,
)
