"""Audio Flamingo 3: Whisper-type encoder over 30 s windows, two-layer projector, Qwen2 decoder.

Source: transformers 5.23 ``AudioFlamingo3ForConditionalGeneration``.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import AudioFlamingo3Config
from transformers.models.audioflamingo3.modeling_audioflamingo3 import (
    AudioFlamingo3MultiModalProjector,
)

from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.frontend import Windows
from hooked_alm.spans import AudioTokens

from ..blocks import decoders
from ..blocks.whisper_encoder import encoder_config, encoder_rules
from ..blocks.whisper_windows import WindowedFrontEnd
from ..family import Card, Family
from ..rules import Rename
from ..strict_config import account_for, account_for_encoder

SECONDS_PER_TOKEN = 0.04
"""Four mel frames of 10 ms: the second convolution and the pooling each halve the rate."""
MAX_SECONDS = 600.0
"""Seconds at which the published processor cuts (``max_audio_len``)."""


class AudioFlamingo3FrontEnd(WindowedFrontEnd):
    """Encoder and Hugging Face's projector, between our hook points."""

    reads_padding = False

    def __init__(self, config: AudioFlamingo3Config, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; nothing marks the ends of a clip."""
        super().__init__(
            AudioTokens(
                placeholder=config.audio_token_id,
                markers=markers,
                seconds_per_token=SECONDS_PER_TOKEN,
                max_seconds=MAX_SECONDS,
            )
        )
        self.encoder = AudioEncoder(encoder_config(config.audio_config, pooling=2))
        self.projector = AudioFlamingo3MultiModalProjector(config)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and two frames per encoder position: the second convolution halves the rate."""
        return self.encoder.window_shape

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: a convolution of stride 2, then pooling by 2."""
        return ((n_frames - 1) // 2 + 1 - 2) // 2 + 1

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode the windows of all clips in one batch, as Hugging Face does."""
        features = self.hook_encoder_in(windows.features)
        is_real = self.encoder.real_positions(windows.n_frames, features.shape[-1])
        hidden = self.encoder(features, is_real)
        hidden = self.hook_projector_in(self.hook_encoder_out(hidden))
        return self.hook_projector_out(self.projector(hidden))


def decoder_config(
    config: AudioFlamingo3Config, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for."""
    account_for(
        config,
        published,
        handled={
            "audio_config", "text_config", "audio_token_id", "projector_hidden_act",
            "projector_bias", "tie_word_embeddings",
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
    name="Audio Flamingo 3",
    architectures=("AudioFlamingo3ForConditionalGeneration",),
    config_class=AudioFlamingo3Config,
    decoder_config=decoder_config,
    front_end=AudioFlamingo3FrontEnd,
    # On disk language_model.model, in memory model.language_model; llm, sound_tower and
    # sound_mm_projector are the parts of the first release.
    rules=(
        *decoders.decoder_rules(
            r"(?:language_model\.model\.|model\.language_model\.|llm\.model\.)",
            head=r"(?:language_model\.|llm\.)?lm_head",
        ),
        *encoder_rules(r"(?:(?:model\.)?audio_tower|sound_tower)\."),
        Rename(r"(?:model\.)?multi_modal_projector\.(.+)", r"audio.projector.\1"),
        Rename(r"sound_mm_projector\.layers\.0\.(.+)", r"audio.projector.linear_1.\1"),
        Rename(r"sound_mm_projector\.layers\.2\.(.+)", r"audio.projector.linear_2.\1"),
    ),
    card=Card(
        audio="25/s, at most 600 s, one clip a prompt",
        readout="`\\n` after `assistant`",
        notes="No tokens around the audio. The encoder hears windows of 30 s apart from each other "
        "(`audio.*` points have one row per window). The LoRA weights of the `think` mode are not "
        "read.",
    ),
)
