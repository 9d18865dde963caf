"""Qwen3-ASR: convolutional encoder with windowed attention, two-layer projector, Qwen3 decoder.

The feature extractor pads a batch before it takes spectrograms, so that what Hugging Face hears of
a clip depends on the clips beside it; ``prepare`` takes every clip by itself.

Source: transformers 5.23 ``Qwen3ASRForConditionalGeneration``.
"""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers import Qwen3ASRConfig, Qwen3ASRFeatureExtractor
from transformers.models.qwen3_asr.modeling_qwen3_asr import (
    Qwen3ASREncoder,
    Qwen3ASRMultiModalProjector,
)

from hooked_alm.audio import Waveform
from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import ConversionError
from hooked_alm.frontend import FrontEnd, Windows, frame_mask, pack, unpack
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens

from ..blocks import decoders
from ..blocks.whisper_windows import note_silence
from ..family import Card, Family
from ..rules import Rename
from ..strict_config import account_for, account_for_encoder

SECONDS_PER_TOKEN = 1 / 13
"""A chunk of one second gives 13 positions."""
MAX_SECONDS = 1200.0
"""Longest recording that the published inference code takes at once (``MAX_ASR_INPUT_SECONDS``)."""


class Qwen3ASRFrontEnd(FrontEnd):
    """Hugging Face's encoder and projector, between our hook points.

    The encoder packs the frames of all clips into one sequence; at our points they are apart, and
    padded to the longest.
    """

    def __init__(self, config: Qwen3ASRConfig, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; ``markers`` are the ids around a clip."""
        super().__init__(
            AudioTokens(
                placeholder=config.audio_token_id,
                markers=markers,
                seconds_per_token=SECONDS_PER_TOKEN,
                max_seconds=MAX_SECONDS,
            )
        )
        self.audio_tower = Qwen3ASREncoder(config.audio_config)
        self.projector = Qwen3ASRMultiModalProjector(config)

    @property
    def chunk(self) -> int:
        """Mel frames that the convolutions see at a time."""
        return 2 * int(self.audio_tower.config.n_window)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and the frames of three chunks: windows are padded to whole chunks."""
        return self.audio_tower.config.num_mel_bins, 3 * self.chunk

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: three convolutions of stride 2, in every chunk anew."""
        whole, rest = divmod(n_frames, self.chunk)

        def after(n: int) -> int:
            for _ in range(3):
                n = (n + 1) // 2
            return n

        return whole * after(self.chunk) + after(rest)

    def clip(
        self,
        features: Shaped[Tensor, "window feature frame"],
        n_frames: Sequence[int],
        **about: Any,
    ) -> AudioClip:
        """A clip, with a note on its silence: the extractor fills it up to half a second."""
        return note_silence(super().clip(features, n_frames, **about), self.tokens)

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Features of a recording as one window, padded to whole chunks."""
        extracted = extractor(
            [waveform.samples],
            sampling_rate=waveform.sampling_rate,
            padding=True,
            return_attention_mask=True,
            n_window=self.audio_tower.config.n_window,
        )
        return extracted["input_features"], [int(extracted["attention_mask"].sum())]

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all clips in one packed sequence, as Hugging Face does."""
        features = self.hook_encoder_in(windows.features).to(self.dtype)
        sizes = [self.n_tokens(n) for n in windows.n_frames.tolist()]
        mask = frame_mask(windows.n_frames, features.shape[-1])
        hidden = self.audio_tower(features, input_features_mask=mask).last_hidden_state
        hidden = pack(self.hook_projector_in(self.hook_encoder_out(unpack(hidden, sizes))), sizes)
        return self.hook_projector_out(unpack(self.projector(hidden), sizes))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        input_features: Float[Tensor, "clip mel frame"] | None = None,
        input_features_mask: Int[Tensor, "clip frame"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``."""
        ids, mask = ids_and_mask(
            input_ids, attention_mask, refused, "input_features, input_features_mask"
        )
        clips = self.clips_of(input_features, input_features_mask)
        return self.input_from_features(ids, mask, position_ids, clips)

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms, padded to the longest, and which of their frames are no padding."""
        features, mask = self.features_and_mask(clips)
        return {"input_features": features, "input_features_mask": mask}


_EXPERTS = frozenset({
    "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
    "num_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef",
})  # fmt: skip
"""Fields that the first release has from Qwen3-Omni, and that its own class does not read."""
_AXES = frozenset({"interleaved", "mrope_interleaved", "mrope_section", "type"})
"""Fields of a rotation along three axes, which agree where there is nothing but audio and text."""


class FlatConfig:
    """transformers' config, also from a file of the first release."""

    @staticmethod
    def from_dict(published: dict[str, Any]) -> Qwen3ASRConfig:
        """Make transformers' config, with what a sparse file leaves out."""
        return Qwen3ASRConfig.from_dict(flat(published))


def flat(published: dict[str, Any]) -> dict[str, Any]:
    """A config of the first release, which nests everything, in the form of the -hf folders.

    Source: transformers' conversion script for these checkpoints.
    """
    if "thinker_config" not in published:
        return published
    thinker = published["thinker_config"]
    text, audio = ({**thinker.get(part, {})} for part in ("text_config", "audio_config"))
    for part in (text, audio):
        part.pop("model_type", None)  # names of classes that transformers does not have
    if rope := text.get("rope_scaling"):
        text["rope_scaling"] = {name: v for name, v in rope.items() if name not in _AXES}
    config = {**thinker, **published, "text_config": text, "audio_config": audio}
    del config["thinker_config"]
    if "tie_word_embeddings" in text:
        config["tie_word_embeddings"] = text["tie_word_embeddings"]
    return config


def decoder_config(
    config: Qwen3ASRConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for.

    Raises:
        ConversionError: an encoder whose windows do not fit, or fields that are not accounted for.
    """
    published = flat(published)
    account_for(
        config,
        published,
        handled={"audio_config", "text_config", "audio_token_id", "tie_word_embeddings"},
        irrelevant={
            "timestamp_token_id": "for the forced aligner's labels",
            "token_classification_bias": "for the forced aligner's head",
            **dict.fromkeys(
                ("audio_start_token_id", "audio_end_token_id", "user_token_id"),
                "belongs to the tokenizer",
            ),
            "support_languages": "names of the languages that it was trained on",
        },
    )
    account_for_encoder(
        config.audio_config,
        published.get("audio_config", {}),
        irrelevant={
            "conv_chunksize": "memory only: how many chunks are convolved at a time",
            "max_source_positions": "longer than a chunk, whose positions are all that is read",
        },
    )
    audio = config.audio_config
    chunk = 2 * audio.n_window
    n_positions = math.ceil(chunk / 8)  # after three convolutions of stride 2
    if n_positions > audio.max_position_embeddings or audio.n_window_infer < chunk:
        raise ConversionError(
            f"reading the encoder of a Qwen3-ASR: got n_window = {audio.n_window}, which needs "
            f"n_window_infer = {chunk} or more, got {audio.n_window_infer}, and {n_positions} "
            f"positions or more, got {audio.max_position_embeddings}."
        )
    return decoders.decoder_config(
        config.text_config,
        published.get("text_config", {}),
        qkv_bias=False,
        qk_norm=True,
        handled=_EXPERTS,
        tie_word_embeddings=config.tie_word_embeddings,
        **identity,
    )


FAMILY = Family(
    name="Qwen3-ASR",
    architectures=("Qwen3ASRForConditionalGeneration",),
    config_class=FlatConfig,
    decoder_config=decoder_config,
    front_end=Qwen3ASRFrontEnd,
    # The first release keeps everything under `thinker`, the -hf folders under `model`.
    rules=(
        *decoders.decoder_rules(
            r"(?:model\.language_model\.|thinker\.model\.)", head=r"(?:thinker\.)?lm_head"
        ),
        Rename(r"model\.audio_tower\.(.+)", r"audio.audio_tower.\1"),
        Rename(r"model\.multi_modal_projector\.(.+)", r"audio.projector.\1"),
        Rename(r"thinker\.audio_tower\.proj1\.(.+)", r"audio.projector.linear_1.\1"),
        Rename(r"thinker\.audio_tower\.proj2\.(.+)", r"audio.projector.linear_2.\1"),
        Rename(r"thinker\.audio_tower\.(.+)", r"audio.audio_tower.\1"),
    ),
    card=Card(
        is_encoder_hooked=False,
        audio="13/s, at most 1200 s",
        readout="`\\n` after `assistant`",
        notes="The template shows no words of the user: context goes into a `system` message. "
        "Clips under 0.5 s are filled with silence. Hugging Face pads a batch before its "
        "spectrogram; `prepare` hears each clip alone.",
    ),
    marker_tokens=("<|audio_start|>", "<|audio_end|>"),
    # The first release names Whisper's, whose place transformers' class has taken.
    read_extractor=Qwen3ASRFeatureExtractor.from_pretrained,
)
