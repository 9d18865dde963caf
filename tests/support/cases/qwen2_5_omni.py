"""Qwen2.5-Omni: the whole model as it is published, and the thinker alone, tied."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from family_case import Case, HuggingFace, Inputs, heard, left_padded, rows_of, save_hf
from hooked_alm import HookedALM
from hooked_alm.converters.families.qwen2_5_omni import Qwen25OmniFrontEnd
from hooked_alm.encoder import ChunkedEncoder
from tiny import AUDIO_BOS, AUDIO_EOS, MELS, PLACEHOLDER, VOCAB, n_audio_tokens

HALF_BLOCK = 7
"""Half the mel frames of a block of attention; odd, so that pairs to be averaged span two."""
SECTIONS = [1, 2, 2]


def thinker_config(*, heads: tuple[int, int] = (6, 2), tied: bool = False) -> dict[str, Any]:
    """The tower for pictures is there because the published files have it."""
    n_heads, n_kv_heads = heads
    return dict(
        text_config=dict(
            hidden_size=10 * n_heads, intermediate_size=34, num_hidden_layers=4,
            num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, vocab_size=VOCAB,
            max_position_embeddings=211, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0,
                             "mrope_section": SECTIONS},
        ),
        audio_config=dict(
            num_mel_bins=MELS, encoder_layers=2, d_model=24, encoder_attention_heads=3,
            encoder_ffn_dim=38, n_window=HALF_BLOCK, output_dim=10 * n_heads,
            max_source_positions=50,
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=18, num_heads=2,
            out_hidden_size=10 * n_heads,
        ),
        audio_token_index=PLACEHOLDER, image_token_index=334, video_token_index=335,
        vision_start_token_id=333, tie_word_embeddings=tied,
    )  # fmt: skip


WHOLE: dict[str, Any] = dict(
    thinker_config=thinker_config(),
    talker_config=dict(
        hidden_size=16, intermediate_size=18, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=40, embedding_size=60,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 1, 2]},
    ),
    token2wav_config=dict(
        dit_config=dict(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, emb_dim=8,
            num_embeds=9, mel_dim=8, enc_emb_dim=6, enc_dim=8, enc_channels=[8, 8, 8, 8, 24],
            enc_attention_channels=4, enc_se_channels=4, enc_res2net_scale=2,
        ),
        bigvgan_config=dict(
            mel_dim=8, upsample_initial_channel=8, resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 1, 1]], upsample_rates=[2], upsample_kernel_sizes=[4],
        ),
    ),
)  # fmt: skip


def save_whole(folder: Path, dtype: torch.dtype) -> None:
    save_hf(Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(**WHOLE)), folder, dtype)


def save_thinker(folder: Path, dtype: torch.dtype) -> None:
    config = Qwen2_5OmniThinkerConfig(**thinker_config(heads=(5, 1), tied=True))
    save_hf(Qwen2_5OmniThinkerForConditionalGeneration(config), folder, dtype)


def reference(folder: Path, dtype: torch.dtype, attention: str) -> HuggingFace:
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    )
    return HuggingFace(model, model.model.language_model)


def inputs(clips: Sequence[Sequence[int]], n_text: Sequence[int]) -> Inputs:
    rows, frames = rows_of(
        clips, n_text, lambda n: [AUDIO_BOS, *[PLACEHOLDER] * n_audio_tokens(n), AUDIO_EOS]
    )
    batch: Inputs = left_padded(rows)
    if frames:
        width = max(frames) + 3
        generator = torch.Generator().manual_seed(2)
        batch["input_features"] = torch.randn(len(frames), MELS, width, generator=generator)
        batch["feature_attention_mask"] = (
            torch.arange(width) < torch.tensor(frames)[:, None]
        ).long()
    return batch


@cache
def published() -> Qwen25OmniFrontEnd:
    """The front-end at its published sizes, without weights."""
    with torch.device("meta"):
        return Qwen25OmniFrontEnd(Qwen2_5OmniThinkerConfig(), frozenset())


def one_block(model: HookedALM) -> None:
    """Let the encoder attend to everything, its positions run on."""
    encoder = model.audio.encoder
    wider = ChunkedEncoder(replace(encoder.cfg, n_ctx=25))
    encoder.cfg, encoder.positions = wider.cfg, wider.positions


def skip_norm(model: HookedALM) -> None:
    """Leave the norm before the projection out."""
    model.audio.encoder.ln_final = torch.nn.Identity()


def in_thinker(name: str, *, decoder: str = "model.", model: str = "") -> str:
    """Names of the thinker alone: as it is saved, or as it is in memory."""
    name = name.removeprefix("thinker.")
    if name.startswith("model."):
        return decoder + name.removeprefix("model.")
    return model + name if name.startswith(("audio_tower.", "visual.")) else name


def in_whole(name: str) -> str:
    return f"thinker.{name}"


in_memory = partial(in_thinker, decoder="model.language_model.", model="model.")

COMMON: dict[str, Any] = dict(
    reference=reference,
    inputs=inputs,
    clips=(11, 29, 47),
    faults={"attention without blocks": one_block, "norm skipped": skip_norm},
    seconds={0.05: 1, 1: 25, 5: 125, 10: 250, 29.99: 750, 30: 750, 30.05: 751, 60: 1500},
    tokens_of=lambda seconds: heard(
        published(), WhisperFeatureExtractor(chunk_length=300, feature_size=128), seconds
    ),
)
CASES = (
    Case(
        name="Qwen2.5-Omni",
        save=save_whole,
        layouts={
            "thinker alone": in_thinker,
            "thinker in memory": in_memory,
            "whole in memory": lambda name: (
                f"thinker.{in_memory(name)}" if name.startswith("thinker.") else name
            ),
        },
        head="thinker.lm_head.weight",
        bias="thinker.model.layers.1.self_attn.q_proj.bias",
        **COMMON,
    ),
    Case(
        name="Qwen2.5-Omni thinker",
        save=save_thinker,
        layouts={"as published": in_whole, "in memory": in_memory},
        is_tied=True,
        bias="model.layers.2.self_attn.v_proj.bias",
        **COMMON,
    ),
)
