"""GLM-ASR: Whisper-type encoder with rotary positions, four frames a token, LLaMA decoder.

Source: transformers 5.23 ``GlmAsrForConditionalGeneration``.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import GlmAsrConfig, GlmAsrEncoder
from transformers.models.glmasr.modeling_glmasr import GlmAsrMultiModalProjector

from hooked_alm.config import HookedALMConfig
from hooked_alm.frontend import Windows
from hooked_alm.spans import AudioTokens

from ..blocks import decoders
from ..blocks.whisper_windows import WindowedFrontEnd
from ..family import Card, Family
from ..rules import Rename
from ..strict_config import account_for

SECONDS_PER_TOKEN = 0.08
"""Eight mel frames of 10 ms: the second convolution halves the rate, then four are one token."""
MAX_SECONDS = 630.0
"""Seconds at which the published processor cuts: whole windows of 30 s within its 655 s."""


class GlmAsrFrontEnd(WindowedFrontEnd):
    """Hugging Face's encoder and projector, between our hook points.

    ``hook_encoder_out`` has four frames per audio position, ``hook_projector_in`` has them side by
    side.
    """

    def __init__(self, config: GlmAsrConfig, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; ``markers`` are the ids around a clip."""
        super().__init__(
            AudioTokens(
                placeholder=config.audio_token_id,
                markers=markers,
                seconds_per_token=SECONDS_PER_TOKEN,
                max_seconds=MAX_SECONDS,
            )
        )
        self.audio_tower = GlmAsrEncoder(config.audio_config)
        self.projector = GlmAsrMultiModalProjector(config)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and two frames per encoder position: the second convolution halves the rate."""
        config = self.audio_tower.config
        return config.num_mel_bins, 2 * config.max_position_embeddings

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: a convolution of stride 2, then whole groups of four."""
        return ((n_frames - 1) // 2 + 1) // 4

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode the windows of all clips in one batch, padding included, as Hugging Face does."""
        features = self.hook_encoder_in(windows.features).to(self.dtype)
        hidden = self.hook_encoder_out(self.audio_tower(features).last_hidden_state)
        d_stacked = self.audio_tower.config.intermediate_size
        hidden = self.hook_projector_in(hidden.reshape(len(hidden), -1, d_stacked))
        return self.hook_projector_out(self.projector(hidden))


def decoder_config(
    config: GlmAsrConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for."""
    account_for(
        config,
        published,
        handled={
            "audio_config", "text_config", "audio_token_id", "projector_hidden_act",
            "tie_word_embeddings",
        },
        irrelevant=dict.fromkeys(("hidden_size", "vocab_size"), "a copy of the text config's"),
    )  # fmt: skip
    account_for(
        config.audio_config,
        published.get("audio_config", {}),
        # Hugging Face's encoder reads these two beside what its config class lists.
        handled={*type(config.audio_config)().to_dict(), "head_dim", "partial_rotary_factor"},
    )
    return decoders.decoder_config(
        config.text_config,
        published.get("text_config", {}),
        qkv_bias=False,
        qk_norm=False,
        # Hugging Face reads it at the top; the text config says the contrary.
        tie_word_embeddings=config.tie_word_embeddings,
        **identity,
    )


FAMILY = Family(
    name="GLM-ASR",
    architectures=("GlmAsrForConditionalGeneration",),
    config_class=GlmAsrConfig,
    decoder_config=decoder_config,
    front_end=GlmAsrFrontEnd,
    # On disk language_model.model, in memory model.language_model.
    rules=(
        *decoders.decoder_rules(
            r"(?:language_model\.model\.|model\.language_model\.)",
            head=r"(?:language_model\.)?lm_head",
        ),
        Rename(r"(?:model\.)?audio_tower\.(.+)", r"audio.audio_tower.\1"),
        Rename(r"(?:model\.)?multi_modal_projector\.(.+)", r"audio.projector.\1"),
    ),
    card=Card(
        is_encoder_hooked=False,
        audio="12.5/s, at most 630 s, one clip a prompt",
        readout="`\\n` after `<|assistant|>`",
        notes="The encoder has no mask: a last window is heard with its padding to 30 s, which "
        "fills no position. It hears windows of 30 s apart from each other (`audio.*` points have "
        "one row per window).",
    ),
    marker_tokens=("<|begin_of_audio|>", "<|end_of_audio|>"),
)
