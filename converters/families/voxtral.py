"""Voxtral: Whisper encoder over 30 s windows, four frames a token, LLaMA decoder.

Source: transformers 5.23 ``VoxtralForConditionalGeneration``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers import VoxtralConfig
from transformers.models.voxtral.modeling_voxtral import VoxtralMultiModalProjector

from hooked_alm.audio import Waveform
from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.frontend import Windows
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens

from ..blocks import decoders
from ..blocks.whisper_encoder import encoder_config, encoder_rules
from ..blocks.whisper_windows import WindowedFrontEnd, note_silence
from ..family import Card, Family
from ..rules import Rename
from ..strict_config import account_for, account_for_encoder

SECONDS_PER_FRAME = 0.02
"""Duration of an encoder frame: the second convolution halves the rate of the spectrogram."""
POSITIONS = "encoder.embed_positions.weight"
"""Name of the table of positions, which transformers adds in float32, whatever the dtype."""
MAX_SECONDS = 2400.0
"""Longest recording that the publisher names (40 minutes); the code sets no limit."""
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}{{ item['text'] }}{% else %}[BEGIN_AUDIO][AUDIO]{% endif %}"
    "{% endfor %}{% endif %}[/INST]"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}</s>"
    "{% else %}{{ raise_exception('Voxtral has the roles user and assistant only.') }}{% endif %}"
    "{% endfor %}"
)
"""Template for what mistral_common makes of a conversation: the published folders have none."""


class VoxtralFrontEnd(WindowedFrontEnd):
    """Encoder and Hugging Face's projector, between our hook points.

    ``hook_encoder_out`` has four frames per audio position, ``hook_projector_in`` has them side by
    side. Windows are heard to their end: the silence that fills the last one has positions of its
    own, which ``AudioClip.notes`` counts.
    """

    in_float32 = (POSITIONS,)

    def __init__(self, config: VoxtralConfig, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; ``markers`` has the id before a clip."""
        encoder = config.audio_config
        super().__init__(
            AudioTokens(
                placeholder=config.audio_token_id,
                markers=markers,
                # Four frames, as published.
                seconds_per_token=SECONDS_PER_FRAME * encoder.intermediate_size / encoder.d_model,
                max_seconds=MAX_SECONDS,
            )
        )
        self.encoder = AudioEncoder(encoder_config(encoder))
        self.d_stacked = encoder.intermediate_size
        self.projector = VoxtralMultiModalProjector(config)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and two frames per encoder position: the second convolution halves the rate."""
        return self.encoder.window_shape

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions of a full window, because padding is heard."""
        return self.encoder.cfg.n_ctx * self.encoder.cfg.d_model // self.d_stacked

    def clip(
        self,
        features: Shaped[Tensor, "window feature frame"],
        n_frames: Sequence[int],
        **about: Any,
    ) -> AudioClip:
        """A clip, with a note on its silence."""
        return note_silence(super().clip(features, n_frames, **about), self.tokens)

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Windows of one spectrogram of the recording, the last one padded."""
        extracted = extractor(
            waveform.samples,
            sampling_rate=waveform.sampling_rate,
            padding=True,
            truncation=False,
            pad_to_multiple_of=extractor.n_samples,
            return_tensors="pt",
        )
        mel, frame = self.feature_shape
        features = extracted["input_features"].reshape(mel, -1, frame).transpose(0, 1)
        return features.contiguous(), [frame] * len(features)

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode the windows of all clips in one batch, as Hugging Face does."""
        features = self.hook_encoder_in(windows.features)
        hidden = self.hook_encoder_out(self.encoder(features))
        hidden = self.hook_projector_in(hidden.reshape(len(hidden), -1, self.d_stacked))
        projected = self.projector(hidden.reshape(-1, self.d_stacked))
        return self.hook_projector_out(projected.reshape(*hidden.shape[:2], -1))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        input_features: Float[Tensor, "window mel frame"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``."""
        ids, mask = ids_and_mask(input_ids, attention_mask, refused, "input_features")
        clips: list[AudioClip] = []
        if input_features is not None:
            n_frames = [input_features.shape[-1]] * len(input_features)
            clips = self.clips_in(ids, input_features, n_frames)
        return self.input_from_features(ids, mask, position_ids, clips)

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Any]:
        """Windows of all clips."""
        return {"input_features": self.features_and_mask(clips)[0]}


def decoder_config(
    config: VoxtralConfig, published: dict[str, Any], **identity: Any
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
    account_for_encoder(
        config.audio_config,
        published.get("audio_config", {}),
        irrelevant={
            "head_dim": "not read: heads divide the width evenly",
            "num_key_value_heads": "not read: as many as heads",
        },
    )
    return decoders.decoder_config(
        config.text_config,
        published.get("text_config", {}),
        qkv_bias=False,
        qk_norm=False,
        # transformers' class ties nothing.
        tie_word_embeddings=False,
        **identity,
    )


FAMILY = Family(
    name="Voxtral",
    architectures=("VoxtralForConditionalGeneration",),
    config_class=VoxtralConfig,
    decoder_config=decoder_config,
    front_end=VoxtralFrontEnd,
    # On disk language_model.model, in memory model.language_model.
    rules=(
        *decoders.decoder_rules(
            r"(?:language_model\.model\.|model\.language_model\.)",
            head=r"(?:language_model\.)?lm_head",
        ),
        Rename(
            r"(?:model\.)?audio_tower\.embed_positions\.weight",
            f"audio.{POSITIONS}",
            dtype=torch.float32,
        ),
        *encoder_rules(r"(?:model\.)?audio_tower\."),
        Rename(r"(?:model\.)?multi_modal_projector\.(.+)", r"audio.projector.\1"),
    ),
    card=Card(
        audio="12.5/s, in whole windows of 30 s (375 positions)",
        readout="`[/INST]`",
        notes="A recording is padded with silence to a multiple of 30 s, and the silence is heard: "
        "of the 375 positions of a 1 s clip, 362 hear nothing else. `clip.notes` counts them, "
        "`x.spans.seconds(row, 0, clip.seconds)` are the others. Weights are read from "
        "`model*.safetensors`; `consolidated.safetensors` orders queries and keys differently and "
        "is left alone.",
    ),
    marker_tokens=("[BEGIN_AUDIO]",),
    chat_template=CHAT_TEMPLATE,
)
