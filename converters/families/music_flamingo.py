"""Music Flamingo: Audio Flamingo 3, whose encoder states are rotated by their time.

Source: transformers 5.23 ``MusicFlamingoForConditionalGeneration``.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import MusicFlamingoConfig
from transformers.models.musicflamingo.modeling_musicflamingo import (
    MusicFlamingoMultiModalProjector,
    MusicFlamingoRotaryEmbedding,
    apply_rotary_time_emb,
)

from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.errors import ConversionError
from hooked_alm.frontend import Windows
from hooked_alm.inputs import AudioClip
from hooked_alm.spans import AudioTokens

from ..blocks import decoders
from ..blocks.whisper_encoder import encoder_config, encoder_rules
from ..blocks.whisper_windows import WindowedFrontEnd
from ..family import Card, Family
from ..rules import Drop, Rename
from ..strict_config import account_for, account_for_encoder

FRAMES_PER_TOKEN = 4
"""The second convolution and the pooling each halve the rate."""
MAX_SECONDS = 1200.0
"""Seconds at which the published processor cuts (``max_audio_len``)."""


class MusicFlamingoFrontEnd(WindowedFrontEnd):
    """Encoder, Hugging Face's rotary time embedding and projector, between our hook points.

    ``hook_encoder_out`` is before the rotation, ``hook_projector_in`` after it.
    """

    def __init__(self, config: MusicFlamingoConfig, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; the config names the ids around a clip."""
        ends = (config.audio_bos_token_id, config.audio_eos_token_id)
        super().__init__(
            AudioTokens(
                placeholder=config.audio_token_id,
                markers=markers | {*ends},
                seconds_per_token=FRAMES_PER_TOKEN * config.audio_frame_step,
                max_seconds=MAX_SECONDS,
            )
        )
        self.ends, self.frame_step = ends, config.audio_frame_step
        self.encoder = AudioEncoder(encoder_config(config.audio_config, pooling=2))
        self.rotary_time = MusicFlamingoRotaryEmbedding(config)
        # Two axes, window and place in it, of pairs each.
        turned, width = 4 * len(self.rotary_time.inv_freq), config.audio_config.hidden_size
        if turned > width:
            raise ConversionError(
                f"reading a {type(config).__name__}: its rope_parameters turn {turned} dimensions "
                f"of the encoder's states, which have {width}."
            )
        self.projector = MusicFlamingoMultiModalProjector(config)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and two frames per encoder position: the second convolution halves the rate."""
        return self.encoder.window_shape

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: a convolution of stride 2, then pooling by 2."""
        return ((n_frames - 1) // 2 + 1 - 2) // 2 + 1

    def prompt_ids(self, clip: AudioClip) -> list[int]:
        """Ids that stand for a clip: the template's placeholders, and both ends around them."""
        begin, end = self.ends
        return [begin, *super().prompt_ids(clip), end]

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode the windows of all clips in one batch, as Hugging Face does."""
        features = self.hook_encoder_in(windows.features)
        is_real = self.encoder.real_positions(windows.n_frames, features.shape[-1])
        hidden = self.encoder(features, is_real)
        hidden = self.rotate(self.hook_encoder_out(hidden), windows.place)
        return self.hook_projector_out(self.projector(self.hook_projector_in(hidden)))

    def rotate(
        self, hidden: Float[Tensor, "window audio_pos d_audio"], place: Int[Tensor, " window"]
    ) -> Float[Tensor, "window audio_pos d_audio"]:
        """Turn pairs of the first dimensions by window, position in it, and seconds.

        Args:
            hidden: encoder states of full windows.
            place: index of each window in its clip.
        """
        n_pos, step = hidden.shape[1], FRAMES_PER_TOKEN * self.frame_step
        within = torch.arange(n_pos, device=hidden.device, dtype=torch.float32) * step
        timestamps = place[:, None] * n_pos * step + within
        cos, sin = self.rotary_time(timestamps, seq_len=n_pos)
        rotated: Tensor = apply_rotary_time_emb(hidden, cos, sin)
        return rotated


def decoder_config(
    config: MusicFlamingoConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for."""
    account_for(
        config,
        published,
        handled={
            "audio_config", "text_config", "audio_token_id", "audio_bos_token_id",
            "audio_eos_token_id", "audio_frame_step", "projector_hidden_act", "projector_bias",
            "rope_parameters", "partial_rotary_factor", "tie_word_embeddings",
        },
        irrelevant={
            "head_dim": "transformers takes the encoder's width instead",
            "max_position_embeddings": "transformers takes the rotary base instead",
        },
    )  # fmt: skip
    account_for_encoder(config.audio_config, published.get("audio_config", {}))
    return decoders.decoder_config(
        config.text_config,
        published.get("text_config", {}),
        qkv_bias=True,
        qk_norm=False,
        # Of the tokenizer: positions reach further, and batches are padded on the left.
        handled={"model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"},
        # transformers' class ties nothing.
        tie_word_embeddings=False,
        **identity,
    )


FAMILY = Family(
    name="Music Flamingo",
    architectures=("MusicFlamingoForConditionalGeneration",),
    config_class=MusicFlamingoConfig,
    decoder_config=decoder_config,
    front_end=MusicFlamingoFrontEnd,
    # On disk language_model.model, in memory model.language_model; llm, sound_tower and
    # sound_mm_projector are the parts of the first release.
    rules=(
        *decoders.decoder_rules(
            r"(?:language_model\.model\.|model\.language_model\.|llm\.model\.)",
            head=r"(?:language_model\.|llm\.)?lm_head",
        ),
        *encoder_rules(r"(?:(?:model\.)?audio_tower|sound_tower)\."),
        Rename(r"(?:model\.)?multi_modal_projector\.(.+)", r"audio.projector.\1"),
        Drop(
            r"sound_tower\.(?:sound_tower\.)?pos_emb\.freqs",
            "rotary frequencies, computed from the config",
        ),
        Rename(r"sound_mm_projector\.layers\.0\.(.+)", r"audio.projector.linear_1.\1"),
        Rename(r"sound_mm_projector\.layers\.2\.(.+)", r"audio.projector.linear_2.\1"),
    ),
    card=Card(
        audio="25/s, at most 1200 s, one clip a prompt",
        readout="`\\n` after `assistant`",
        notes="The encoder hears windows of 30 s apart from each other (`audio.*` points have one "
        "row per window); their states are rotated by absolute time between `hook_encoder_out` and "
        "`hook_projector_in`, so audio moved to another window is another input.",
    ),
    marker_tokens=("<|sound_bos|>", "<|sound_eos|>"),
)
