"""Qwen2-Audio: Whisper-type encoder, one linear projector, Qwen2 decoder.

Source: transformers 5.23 ``Qwen2AudioForConditionalGeneration``.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import Qwen2AudioConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioMultiModalProjector

from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens

from ..blocks import decoders
from ..blocks.whisper_encoder import encoder_config, encoder_rules
from ..family import Card, Family
from ..rules import Rename
from ..strict_config import account_for, account_for_encoder

SECONDS_PER_TOKEN = 0.04
"""Four mel frames of 10 ms: the second convolution and the pooling each halve the rate."""


class Qwen2AudioFrontEnd(FrontEnd):
    """Encoder and Hugging Face's projector, between our hook points."""

    reads_padding = False

    def __init__(self, config: Qwen2AudioConfig, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; ``markers`` are the ids around a clip."""
        encoder = config.audio_config
        super().__init__(
            AudioTokens(
                placeholder=config.audio_token_index,
                markers=markers,
                seconds_per_token=SECONDS_PER_TOKEN,
                max_seconds=2 * encoder.max_source_positions / 100,  # two frames of 10 ms each
            )
        )
        self.encoder = AudioEncoder(encoder_config(encoder, pooling=2))
        self.projector = Qwen2AudioMultiModalProjector(config)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and two frames per encoder position: the second convolution halves the rate."""
        return self.encoder.window_shape

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: a convolution of stride 2, then pooling by 2."""
        return ((n_frames - 1) // 2 + 1 - 2) // 2 + 1

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all clips in one batch, as Hugging Face does."""
        features = self.hook_encoder_in(windows.features)
        is_real = self.encoder.real_positions(windows.n_frames, features.shape[-1])
        hidden = self.hook_projector_in(self.hook_encoder_out(self.encoder(features, is_real)))
        return self.hook_projector_out(self.projector(hidden))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        input_features: Float[Tensor, "clip mel frame"] | None = None,
        feature_attention_mask: Int[Tensor, "clip frame"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``."""
        ids, mask = ids_and_mask(
            input_ids, attention_mask, refused, "input_features, feature_attention_mask"
        )
        clips = self.clips_of(input_features, feature_attention_mask)
        return self.input_from_features(ids, mask, position_ids, clips)

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms, and which of their frames are no padding."""
        features, mask = self.features_and_mask(clips)
        return {"input_features": features, "feature_attention_mask": mask}


_PUBLISHED_FIELDS = frozenset(
    {"audio_config", "text_config", "audio_token_index", "audio_token_id", "tie_word_embeddings",
     "vocab_size", "hidden_size"}
)  # fmt: skip


def decoder_config(
    config: Qwen2AudioConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder. The published text config is sparse: transformers fills it in."""
    account_for(config, published, handled=_PUBLISHED_FIELDS)
    account_for_encoder(config.audio_config, published.get("audio_config", {}))
    return decoders.decoder_config(
        config.text_config,
        published.get("text_config", {}),
        qkv_bias=True,
        qk_norm=False,
        # Published files leave it out at the top, where Hugging Face reads it.
        tie_word_embeddings=getattr(config, "tie_word_embeddings", False),
        **identity,
    )


FAMILY = Family(
    name="Qwen2-Audio",
    architectures=("Qwen2AudioForConditionalGeneration",),
    config_class=Qwen2AudioConfig,
    decoder_config=decoder_config,
    front_end=Qwen2AudioFrontEnd,
    # Older files keep the decoder under language_model.model, in memory it is model.language_model.
    rules=(
        *decoders.decoder_rules(
            r"(?:language_model\.model\.|model\.language_model\.)",
            head=r"(?:language_model\.)?lm_head",
        ),
        *encoder_rules(r"(?:model\.)?audio_tower\."),
        Rename(r"(?:model\.)?multi_modal_projector\.(.+)", r"audio.projector.\1"),
    ),
    card=Card(
        audio="25/s, at most 30 s",
        readout="`\\n` after `assistant`",
    ),
    marker_tokens=("<|audio_bos|>", "<|audio_eos|>"),
)
