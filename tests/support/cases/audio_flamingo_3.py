"""Audio Flamingo 3, as transformers has it."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    WhisperFeatureExtractor,
)

from family_case import Case, HuggingFace, Inputs, heard, left_padded, rows_of, save_hf
from hooked_alm import HookedALM
from hooked_alm.converters.families.audio_flamingo_3 import AudioFlamingo3FrontEnd
from tiny import MAX_SOURCE_POSITIONS, MELS, PLACEHOLDER, VOCAB
from window_features import WINDOW, windows

CONFIG: dict[str, Any] = dict(
    text_config=dict(
        model_type="qwen2", hidden_size=54, intermediate_size=34, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, vocab_size=VOCAB,
        max_position_embeddings=411, rms_norm_eps=1e-5, model_max_length=97,
        tokenizer_model_max_length=97, tokenizer_padding_side="right",
    ),
    audio_config=dict(
        model_type="audioflamingo3_encoder", hidden_size=24, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=38, num_mel_bins=MELS,
        max_source_positions=MAX_SOURCE_POSITIONS,
    ),
    audio_token_id=PLACEHOLDER,
)  # fmt: skip


def n_tokens(frames: int) -> int:
    """Two reductions by two, counted over the whole clip as the processor does."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def save(folder: Path, dtype: torch.dtype) -> None:
    model = AudioFlamingo3ForConditionalGeneration(AudioFlamingo3Config(**CONFIG))
    save_hf(model, folder, dtype)


def reference(folder: Path, dtype: torch.dtype, attention: str) -> HuggingFace:
    return HuggingFace(
        AudioFlamingo3ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
    )


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    rows, frames = rows_of(clips, n_text, lambda n: [PLACEHOLDER] * n_tokens(n))
    batch: Inputs = left_padded(rows)
    if frames:
        batch["input_features"], batch["input_features_mask"] = windows(frames)
    return batch


@cache
def published() -> AudioFlamingo3FrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        return AudioFlamingo3FrontEnd(AudioFlamingo3Config(), frozenset())


def tokens_of(seconds: float) -> int:
    """Of a recording, as the published extractor hears it."""
    return heard(published(), WhisperFeatureExtractor(chunk_length=30, feature_size=128), seconds)


def swap_activation(model: HookedALM) -> None:
    """Take the wrong one between the projector's layers."""
    model.audio.projector.act = torch.nn.ReLU()


def count_padding(model: HookedALM) -> None:
    """Let the encoder attend to a frame beyond the end of every window."""
    encode = model.audio.encode
    model.audio.encode = lambda w: encode(w._replace(n_frames=(w.n_frames + 2).clamp(max=WINDOW)))


def in_memory(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head", "lm_head")
    return f"model.{name}" if name.startswith(("audio_tower", "multi_modal_proj")) else name


def in_first_release(name: str) -> str:
    name = name.replace("language_model.", "llm.").replace("audio_tower.", "sound_tower.")
    name = name.replace("multi_modal_projector.linear_1", "sound_mm_projector.layers.0")
    return name.replace("multi_modal_projector.linear_2", "sound_mm_projector.layers.2")


CASE = Case(
    name="Audio Flamingo 3",
    save=save,
    reference=reference,
    inputs=inputs,
    clips=(63, 147, 260),
    layouts={"in memory": in_memory, "first release": in_first_release},
    head="language_model.lm_head.weight",
    bias="language_model.model.layers.1.self_attn.k_proj.bias",
    faults={"activation": swap_activation, "padding heard": count_padding},
    seconds={0.05: 1, 1: 25, 5: 125, 10: 250, 29.99: 750, 30: 750, 30.05: 751, 60: 1500},
    tokens_of=tokens_of,
)
