"""Qwen2.5-Omni's thinker: encoder with attention in blocks of two seconds, Qwen2 decoder.

The part that hears and writes text. What speaks (talker, token2wav) reads the thinker and writes
nothing back, and without pictures nothing of the vision tower reaches it; both are left out.

Source: transformers 5.23 ``Qwen2_5OmniThinkerForConditionalGeneration``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerConfig

from hooked_alm.audio import Waveform
from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import ChunkedEncoder
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.frontend import FrontEnd, Windows, pack, unpack
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens

from ..blocks import decoders
from ..blocks.whisper_encoder import encoder_config, encoder_rules
from ..family import Card, Family
from ..rules import Drop, Rename
from ..strict_config import account_for

SECONDS_PER_TOKEN = 0.04
"""Four mel frames of 10 ms: the second convolution and the pooling each halve the rate."""
MAX_SECONDS = 300.0
"""Longest recording that the published feature extractor keeps (its ``chunk_length``)."""
SECTIONS = [16, 24, 24]
"""Frequencies of the three rotary axes where a config names none, as in Hugging Face."""


class Qwen25OmniFrontEnd(FrontEnd):
    """Encoder in chunks, and its last layer, between our hook points.

    The encoder packs the frames of all clips into one sequence; at the points around it they are
    apart, and padded to the longest.
    """

    def __init__(self, config: Qwen2_5OmniThinkerConfig, markers: frozenset[int]) -> None:
        """Lay the encoder out; ``markers`` are the ids around a clip."""
        super().__init__(
            AudioTokens(
                placeholder=config.audio_token_index,
                markers=markers,
                seconds_per_token=SECONDS_PER_TOKEN,
                max_seconds=MAX_SECONDS,
            )
        )
        encoder = config.audio_config
        self.encoder = ChunkedEncoder(replace(
            encoder_config(encoder), n_ctx=encoder.n_window, scales_queries=False,
            softmax_in_float32=True,
        ))  # fmt: skip
        self.projector = nn.Linear(encoder.d_model, encoder.output_dim)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and the frames of three blocks of attention: windows have no fixed length."""
        mel, frame = self.encoder.window_shape
        return mel, 3 * frame

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: a convolution of stride 2, then means of pairs."""
        return ((n_frames - 1) // 2 + 1 - 2) // 2 + 1

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Features of a recording as one window, without the silence that the extractor adds.

        Raises:
            InputError: longer than the extractor's own limit, where that is below ``MAX_SECONDS``.
        """
        if len(waveform.samples) > extractor.n_samples:
            raise InputError(
                f"hearing {waveform.name}: it lasts {waveform.seconds:.1f} s, and the checkpoint's "
                f"feature extractor keeps {extractor.chunk_length} s. Cut the recording."
            )
        features, (n_frames,) = super().windows_of(waveform, extractor)
        return features[..., :n_frames].clone(), [n_frames]

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all clips in one packed sequence, as Hugging Face does."""
        features, n_frames = self.hook_encoder_in(windows.features), windows.n_frames.tolist()
        sizes = [self.n_tokens(n) for n in n_frames]
        clips = self.encoder([one[:, :n] for one, n in zip(features, n_frames, strict=True)])
        hidden = self.hook_encoder_out(pad_sequence(clips, batch_first=True))
        hidden = pack(self.hook_projector_in(hidden), sizes)
        return self.hook_projector_out(unpack(self.projector(hidden), sizes))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        input_features: Float[Tensor, "clip mel frame"] | None = None,
        feature_attention_mask: Int[Tensor, "clip frame"] | None = None,
        position_ids: Int[Tensor, "*axis batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        Position ids may have three axes; pictures are refused.
        """
        ids, mask = ids_and_mask(
            input_ids, attention_mask, refused, "input_features, feature_attention_mask"
        )
        clips = self.clips_of(input_features, feature_attention_mask)
        return self.input_from_features(ids, mask, position_ids, clips)

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms, padded to the longest, and which of their frames are no padding."""
        features, mask = self.features_and_mask(clips)
        return {"input_features": features, "feature_attention_mask": mask}


class ThinkerConfig:
    """The thinker's part of a config, whether of the whole model or of the thinker alone."""

    @staticmethod
    def from_dict(published: dict[str, Any]) -> Qwen2_5OmniThinkerConfig:
        """Transformers' config, with what a sparse file leaves out."""
        if "thinker_config" in published:
            return Qwen2_5OmniConfig.from_dict(published).thinker_config
        return Qwen2_5OmniThinkerConfig.from_dict(published)


_SPEECH = "for the talker, which is left out"
_VISION = "for pictures, which are left out"
_TRAINING = "training only"


def decoder_config(
    config: Qwen2_5OmniThinkerConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for."""
    if "thinker_config" in published:
        account_for(
            Qwen2_5OmniConfig(),
            published,
            handled={"thinker_config"},
            irrelevant=dict.fromkeys(
                ("talker_config", "token2wav_config", "enable_audio_output", "enable_talker"),
                _SPEECH,
            ),
        )
        published = published["thinker_config"]
    account_for(
        config,
        published,
        handled={"audio_config", "text_config", "audio_token_index", "audio_token_id",
                 "tie_word_embeddings"},
        irrelevant={
            **dict.fromkeys(
                ("vision_config", "image_token_index", "image_token_id", "video_token_index",
                 "video_token_id", "vision_start_token_id", "vision_end_token_id",
                 "vision_token_id", "position_id_per_seconds", "seconds_per_chunk"),
                _VISION,
            ),
            **dict.fromkeys(
                ("audio_start_token_id", "audio_end_token_id"), "only with the sound of a video"
            ),
            "user_token_id": _SPEECH,
            "init_std": _TRAINING,
        },
    )  # fmt: skip
    account_for(
        config.audio_config,
        published.get("audio_config", {}),
        handled=frozenset(type(config.audio_config)().to_dict()),
        irrelevant={"init_std": _TRAINING, "encoder_layerdrop": _TRAINING},
    )
    audio = config.audio_config
    if audio.n_window > audio.max_source_positions:
        raise ConversionError(
            f"reading the encoder of a Qwen2.5-Omni: got windows of n_window = {audio.n_window} "
            f"positions, expected at most max_source_positions = {audio.max_source_positions}."
        )
    return _text_config(config, published.get("text_config", {}), **identity)


def _text_config(
    config: Qwen2_5OmniThinkerConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    published = {name: value for name, value in published.items() if name != "init_std"}
    cfg = decoders.decoder_config(
        config.text_config,
        published,
        qkv_bias=True,
        qk_norm=False,
        # The decoder's own field says True by default, and is not what Hugging Face reads.
        tie_word_embeddings=config.tie_word_embeddings,
        **identity,
    )
    cfg.rope_parameters = {"mrope_section": SECTIONS, **cfg.rope_parameters}
    return cfg


FAMILY = Family(
    name="Qwen2.5-Omni",
    # The first release calls the whole model by the first name.
    architectures=(
        "Qwen2_5OmniModel",
        "Qwen2_5OmniForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",
    ),
    config_class=ThinkerConfig,
    decoder_config=decoder_config,
    front_end=Qwen25OmniFrontEnd,
    rules=(
        *decoders.decoder_rules(
            r"(?:thinker\.)?model\.(?:language_model\.)?", head=r"(?:thinker\.)?lm_head"
        ),
        Drop(
            r"(?:thinker\.)?(?:model\.)?audio_tower\.audio_bos_eos_token\.weight",
            "no forward reads it: the markers around a clip are ordinary tokens",
        ),
        Rename(r"(?:thinker\.)?(?:model\.)?audio_tower\.proj\.(.+)", r"audio.projector.\1"),
        *encoder_rules(r"(?:thinker\.)?(?:model\.)?audio_tower\.", norm="ln_post"),
        Drop(r"(?:thinker\.)?(?:model\.)?visual\..+", "sees pictures, which are left out"),
        Drop(r"(?:talker|token2wav)\..+", "speaks, and writes nothing back to the thinker"),
    ),
    card=Card(
        audio="25/s, at most 300 s",
        readout="`\\n` after `assistant`",
        notes="The thinker: what hears and writes text. Pictures are refused, speech is not made. "
        "The encoder hears chunks of 2 s apart from each other; at `audio.encoder.*` points those "
        "of all clips stand one behind the other, in a batch of one.",
    ),
    marker_tokens=("<|audio_bos|>", "<|audio_eos|>"),
    hf_class="Qwen2_5OmniThinkerForConditionalGeneration",
)
