"""Granite-Speech: Conformer encoder, Q-Former over windows of 15 frames, Granite decoder.

Granite is LLaMA with four multipliers. transformers 5.23 leaves the last one out (the logits of
``GraniteSpeechForConditionalGeneration`` are not divided by ``logits_scaling``); here logits are
those that the config describes, and that ``GraniteForCausalLM`` gives.

Neither encoder nor projector has a mask: what pads a short recording beside a longer one is
heard. ``encode`` takes a processor's batch with its padding; a clip of ``prepare`` is heard alone,
whatever stands beside it.

Source: transformers 5.23 ``GraniteSpeechForConditionalGeneration``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GraniteSpeechConfig
from transformers.models.granite_speech.modeling_granite_speech import (
    GraniteSpeechCTCEncoder,
    GraniteSpeechEncoderProjector,
)

from hooked_alm.audio import Waveform
from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens

from ..blocks import decoders
from ..blocks.log_mel import LogMel
from ..family import Card, Family
from ..rules import Rename
from ..strict_config import account_for, account_for_encoder

SECONDS_PER_FRAME = 0.02
"""Two mel frames of 10 ms side by side are one frame of the encoder."""


class GraniteSpeechFrontEnd(FrontEnd):
    """Hugging Face's encoder and projector, between our hook points."""

    def __init__(self, config: GraniteSpeechConfig, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; ``markers`` are the ids around a clip."""
        n_queries = config.window_size // config.downsample_rate
        seconds_per_token = SECONDS_PER_FRAME * config.window_size / n_queries
        super().__init__(
            AudioTokens(
                placeholder=config.audio_token_index,
                markers=markers,
                seconds_per_token=seconds_per_token,
                # Only the decoder's context ends a recording.
                max_seconds=config.text_config.max_position_embeddings * seconds_per_token,
            )
        )
        self.encoder = GraniteSpeechCTCEncoder(config.encoder_config)
        self.projector = GraniteSpeechEncoderProjector(config)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Features of a frame, and the frames of three blocks of attention: no length is fixed."""
        config = self.encoder.config
        return config.input_dim, 3 * config.context_size

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: a few queries for every window of frames, the last one padded."""
        return self.projector.num_queries * -(-n_frames // self.projector.window_size)

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window feature frame"], list[int]]:
        """Features of a recording as one window, without padding."""
        features = extractor(waveform.samples)
        return features[None], [features.shape[1]]

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode clips of one length in one batch, as Hugging Face does."""
        features = self.hook_encoder_in(windows.features).to(self.dtype)
        widths = windows.width.tolist()

        def encoder(frames: Tensor) -> Tensor:
            hidden: Tensor = self.encoder(frames).last_hidden_state
            return hidden

        hidden = _by_width(encoder, features.transpose(1, 2), widths)
        hidden = self.hook_projector_in(self.hook_encoder_out(hidden))
        return self.hook_projector_out(_by_width(self.projector, hidden, widths))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        input_features: Float[Tensor, "clip frame feature"] | None = None,
        input_features_mask: Bool[Tensor, "clip audio_pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        The mask is over audio positions, as in Hugging Face.
        """
        ids, mask = ids_and_mask(
            input_ids, attention_mask, refused, "input_features, input_features_mask"
        )
        clips = self._clips_of_positions(input_features, input_features_mask)
        return self.input_from_features(ids, mask, position_ids, clips)

    def _clips_of_positions(self, features: Tensor | None, heard: Tensor | None) -> list[AudioClip]:
        """A clip a row, of which the mask says how many positions are heard."""
        if features is None:
            if heard is not None:
                raise InputError(
                    "encoding a processor's output: got input_features_mask without "
                    "input_features. Pass both."
                )
            return []
        width, window = features.shape[1], self.projector.window_size
        n_positions = self.n_tokens(width)
        if heard is None:
            heard = torch.ones(len(features), n_positions, dtype=torch.bool)
        n_heard = heard.long().sum(-1).tolist()
        n_frames = [min(n // self.projector.num_queries * window, width) for n in n_heard]
        whole = (
            torch.arange(n_positions) < torch.tensor(list(map(self.n_tokens, n_frames)))[:, None]
        )
        if heard.shape != whole.shape or not torch.equal(heard.cpu().bool(), whole):
            raise InputError(
                f"encoding a processor's output: input_features_mask {list(heard.shape)} has "
                f"{n_heard} positions; expected [{len(features)}, {n_positions}], per clip ones "
                f"for whole windows ({self.projector.num_queries} positions each), then zeros."
            )
        return [
            self.clip(one.T.clone()[None], [n], name=f"clip {i}")
            for i, (one, n) in enumerate(zip(features, n_frames, strict=True))
        ]

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms, and which of the positions that they give are heard.

        Raises:
            InputError: clips of different lengths, which Hugging Face would pad and hear as padded.
        """
        if len({clip.features.shape[-1] for clip in clips}) > 1:
            raise InputError(
                "giving Hugging Face clips of different lengths: it has no mask for them and would "
                "hear the padding. Give them one at a time."
            )
        features = torch.cat([clip.features for clip in clips]).transpose(1, 2)
        n_heard = torch.tensor([clip.n_tokens for clip in clips])
        heard = torch.arange(self.n_tokens(features.shape[1])) < n_heard[:, None]
        return {"input_features": features, "input_features_mask": heard}


def _by_width(
    run: Callable[[Tensor], Tensor], rows: Float[Tensor, "row width d"], widths: Sequence[int]
) -> Float[Tensor, "row longest d_out"]:
    """Run rows of one width at a time, without their padding."""
    found: dict[int, Tensor] = {}
    for width in dict.fromkeys(widths):
        group = [row for row, w in enumerate(widths) if w == width]
        found |= zip(group, run(rows[group, :width].contiguous()), strict=True)
    return pad_sequence([found[row] for row in range(len(widths))], batch_first=True)


_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier",
                "logits_scaling")  # fmt: skip


def decoder_config(
    config: GraniteSpeechConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes and multipliers of the decoder, and every other field accounted for."""
    text = config.text_config
    _check(config)
    account_for(
        config,
        published,
        handled={"encoder_config", "projector_config", "text_config", "audio_token_index",
                 "audio_token_id", "downsample_rate", "window_size", "has_lora_adapter",
                 "tie_word_embeddings"},
    )  # fmt: skip
    account_for_encoder(config.encoder_config, published.get("encoder_config", {}))
    projector = {**published.get("projector_config", {})}
    if projector.get("position_embedding_type") == "absolute":  # which the class has no other of
        del projector["position_embedding_type"]
    account_for_encoder(config.projector_config, projector)
    return decoders.decoder_config(
        text,
        published.get("text_config", {}),
        qkv_bias=False,
        qk_norm=False,
        handled=frozenset(_MULTIPLIERS),
        tie_word_embeddings=config.tie_word_embeddings,
        **{name: float(getattr(text, name)) for name in _MULTIPLIERS},
        **identity,
    )


def _check(config: GraniteSpeechConfig) -> None:
    """Refuse what this converter does not do.

    Raises:
        ConversionError: a LoRA adapter, another decoder, a placeholder without an embedding, or
            windows that are not cut into whole parts.
    """
    text = config.text_config
    if config.has_lora_adapter:
        raise ConversionError(
            "reading a GraniteSpeechConfig: has_lora_adapter is true. The published model has its "
            "LoRA adapter on for prompts with audio and off for those without, which no one set of "
            "weights is. Use a 4.0 checkpoint, or merge the adapter with PEFT, save the model with "
            "has_lora_adapter false, and ask it about audio only."
        )
    if text.model_type != "granite":
        raise ConversionError(
            f"reading a GraniteSpeechConfig: its decoder is {text.model_type!r}, expected "
            "'granite', the only one that is supported."
        )
    if config.audio_token_index >= text.vocab_size:
        raise ConversionError(
            f"reading a GraniteSpeechConfig: audio_token_index = {config.audio_token_index} has no "
            f"embedding, expected less than vocab_size = {text.vocab_size}."
        )
    if config.window_size % config.downsample_rate:
        raise ConversionError(
            f"reading a GraniteSpeechConfig: window_size = {config.window_size} is not a multiple "
            f"of downsample_rate = {config.downsample_rate}. Take the published config."
        )


FAMILY = Family(
    name="Granite-Speech",
    architectures=("GraniteSpeechForConditionalGeneration",),
    config_class=GraniteSpeechConfig,
    decoder_config=decoder_config,
    front_end=GraniteSpeechFrontEnd,
    rules=(
        *decoders.decoder_rules(
            r"(?:language_model\.model\.|model\.language_model\.)",
            head=r"(?:language_model\.)?lm_head",
        ),
        Rename(r"(?:model\.)?encoder\.(.+)", r"audio.encoder.\1"),
        Rename(r"(?:model\.)?projector\.(.+)", r"audio.projector.\1"),
    ),
    card=Card(
        is_encoder_hooked=False,
        audio="10/s, in windows of 0.3 s; the decoder's context is the limit",
        readout="`<|end_of_role|>` after `assistant`",
        notes="Logits are divided by `logits_scaling`, which transformers 5.23 forgets. "
        "Checkpoints with a LoRA adapter (3.x) are refused. The encoder has no mask: `prepare` "
        "hears every clip alone, a processor's batch is heard with its padding.",
    ),
    read_extractor=LogMel.from_folder,
    audio_text="<|audio|>",
    hf_logits=lambda logits, cfg: logits / cfg.logits_scaling,
)
