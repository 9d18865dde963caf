"""Qwen3-ASR: the worked example of CONTRIBUTING.md."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ASRConfig, Qwen3ASRFeatureExtractor, Qwen3ASRForConditionalGeneration

from family_case import Case, HuggingFace, Inputs, heard, left_padded, rows_of, save_hf
from hooked_alm import HookedALM
from hooked_alm.converters.families.qwen3_asr import Qwen3ASRFrontEnd
from tiny import AUDIO_BOS, AUDIO_EOS, MELS, PLACEHOLDER, VOCAB

CHUNK = 100
CONFIG: dict[str, Any] = dict(
    text_config=dict(
        model_type="qwen3", hidden_size=54, intermediate_size=34, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, vocab_size=VOCAB,
        max_position_embeddings=211, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    audio_config=dict(
        model_type="qwen3_asr_encoder", num_mel_bins=MELS, encoder_layers=2, d_model=24,
        encoder_attention_heads=3, encoder_ffn_dim=38, n_window=CHUNK // 2, output_dim=54,
        n_window_infer=2 * CHUNK, downsample_hidden_size=7, max_position_embeddings=13,
    ),
    audio_token_id=PLACEHOLDER,
)  # fmt: skip


def n_tokens(frames: int) -> int:
    """Three reductions by two of every chunk; a chunk of 100 frames gives 13."""
    rest = frames % CHUNK
    for _ in range(3):
        rest = -(-rest // 2)
    return frames // CHUNK * 13 + rest


def save(folder: Path, dtype: torch.dtype) -> None:
    save_hf(Qwen3ASRForConditionalGeneration(Qwen3ASRConfig(**CONFIG)), folder, dtype)


def reference(folder: Path, dtype: torch.dtype, attention: str) -> HuggingFace:
    return HuggingFace(
        Qwen3ASRForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
    )


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    rows, frames = rows_of(
        clips, n_text, lambda n: [AUDIO_BOS, *[PLACEHOLDER] * n_tokens(n), AUDIO_EOS]
    )
    batch: Inputs = left_padded(rows)
    if frames:
        width = -(-max(frames) // CHUNK) * CHUNK
        generator = torch.Generator().manual_seed(2)
        batch["input_features"] = torch.randn(len(frames), MELS, width, generator=generator)
        batch["input_features_mask"] = (torch.arange(width) < torch.tensor(frames)[:, None]).long()
    return batch


@cache
def published() -> Qwen3ASRFrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        return Qwen3ASRFrontEnd(Qwen3ASRConfig(), frozenset())


def swap_projector(model: HookedALM) -> None:
    """Take the wrong activation between the projector's layers."""
    model.audio.projector.act = torch.nn.ReLU()


def in_first_release(name: str) -> str:
    name = name.replace("model.language_model.", "thinker.model.")
    name = name.replace("model.multi_modal_projector.linear_1", "thinker.audio_tower.proj1")
    name = name.replace("model.multi_modal_projector.linear_2", "thinker.audio_tower.proj2")
    return name.replace("model.audio_tower", "thinker.audio_tower")


CASE = Case(
    name="Qwen3-ASR",
    save=save,
    reference=reference,
    inputs=inputs,
    clips=(63, 147, 260),
    layouts={"first release": in_first_release},
    is_tied=True,
    bias="model.language_model.layers.1.self_attn.q_norm.weight",
    faults={"activation": swap_projector},
    seconds={0.05: 7, 1: 13, 5: 65, 10: 130, 29.99: 390, 30: 390, 30.05: 391, 60: 780},
    tokens_of=lambda seconds: heard(published(), Qwen3ASRFeatureExtractor(), seconds),
)
