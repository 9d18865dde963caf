"""Step-Audio 2 mini: Whisper-type encoder, convolution and two layers, Qwen2 decoder.

Transformers has no class for it. What this module does follows the published
``modeling_step_audio_2.py`` and the inference code beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, Qwen2Config, WhisperFeatureExtractor

from hooked_alm.audio import Waveform
from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens

from ..blocks import decoders
from ..blocks.whisper_encoder import openai_encoder_config, openai_encoder_rules
from ..family import Card, Family
from ..rules import Rename
from ..strict_config import account_for

SECONDS_PER_TOKEN = 0.08
CHUNK_SECONDS = 25
"""Longer recordings are heard in chunks, each between markers of its own."""
CHUNK_FRAMES = 100 * CHUNK_SECONDS
MARGIN_FRAMES = 2
"""Frames behind the last that counts: they are heard by the convolutions alone."""
MARGIN_SAMPLES = 479
"""Silence that makes the margin."""
D_ADAPTER = 2048


TEXT_DEFAULTS: dict[str, Any] = dict(
    vocab_size=64012, hidden_size=4096, intermediate_size=11008, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=8192, rms_norm_eps=1e-6,
    rope_theta=1e6,
)  # fmt: skip
"""Defaults of the published class, for what a sparse ``text_config`` leaves out."""


TEXT_IRRELEVANT = {
    "num_attention_groups": "num_key_value_heads says it",
    "max_seq_len": "training only",
}


class StepAudio2EncoderConfig(PreTrainedConfig):
    """``audio_encoder_config`` of the published file."""

    model_type = "step_audio_2_encoder"

    def __init__(
        self,
        *,
        n_mels: int = 128,
        n_audio_ctx: int = 1500,
        n_audio_state: int = 512,
        n_audio_head: int = 8,
        n_audio_layer: int = 6,
        llm_dim: int = 4096,
        kernel_size: int = 3,
        adapter_stride: int = 2,
        **rest: Any,
    ) -> None:
        """Take the fields; defaults are those of the published class."""
        super().__init__(**rest)
        self.n_mels, self.n_audio_ctx, self.n_audio_state = n_mels, n_audio_ctx, n_audio_state
        self.n_audio_head, self.n_audio_layer, self.llm_dim = n_audio_head, n_audio_layer, llm_dim
        self.kernel_size, self.adapter_stride = kernel_size, adapter_stride


class StepAudio2Config(PreTrainedConfig):
    """The published ``config.json``, and the ids that the published code has as constants."""

    model_type = "step_audio_2"

    def __init__(
        self,
        *,
        audio_encoder_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        use_sliding_window: bool = False,
        tie_word_embeddings: bool = False,
        audio_start_id: int = 151688,
        audio_end_id: int = 151689,
        audio_patch_id: int = 151690,
        **rest: Any,
    ) -> None:
        """Take the fields; defaults are those of the published class."""
        super().__init__(tie_word_embeddings=tie_word_embeddings, **rest)
        self.audio_encoder_config = StepAudio2EncoderConfig(**(audio_encoder_config or {}))
        self.text_config = Qwen2Config(**{**TEXT_DEFAULTS, **(text_config or {})})
        self.use_sliding_window = use_sliding_window
        self.audio_start_id, self.audio_end_id = audio_start_id, audio_end_id
        self.audio_patch_id = audio_patch_id


class Adapter(nn.Module):
    """Convolution that halves the rate, and two layers."""

    def __init__(self, d_audio: int, d_model: int) -> None:
        """Allocate the convolution and the two layers."""
        super().__init__()
        self.conv = nn.Conv1d(d_audio, d_audio, kernel_size=3, stride=2, padding=1)
        self.linear1 = nn.Linear(d_audio, D_ADAPTER)
        self.linear2 = nn.Linear(D_ADAPTER, d_model)

    def forward(
        self, hidden: Float[Tensor, "window frame d_audio"]
    ) -> Float[Tensor, "window audio_pos d_model"]:
        """Adapt the encoder's output to the decoder."""
        hidden = F.gelu(self.conv(hidden.permute(0, 2, 1))).permute(0, 2, 1)
        return self.linear2(F.relu(self.linear1(hidden)))


class StepAudio2FrontEnd(FrontEnd):
    """Encoder and adapter, between our hook points; a window is a chunk of 25 seconds.

    The encoder masks every second frame, counted from the end of the longest chunk, and convolves
    over what is masked: the last position of a chunk depends on the length of the chunks that are
    encoded together with it.
    """

    depends_on_longest = True

    def __init__(self, config: StepAudio2Config, markers: frozenset[int]) -> None:
        """Lay encoder and adapter out; ``markers`` are the ids around a chunk."""
        encoder = config.audio_encoder_config
        self.start, self.end = config.audio_start_id, config.audio_end_id
        per_chunk = self.n_tokens(CHUNK_FRAMES) + 2
        super().__init__(
            AudioTokens(
                placeholder=config.audio_patch_id,
                markers=markers | {self.start, self.end},
                seconds_per_token=SECONDS_PER_TOKEN,
                # What fits the decoder's context, in whole chunks.
                max_seconds=float(
                    config.text_config.max_position_embeddings // per_chunk * CHUNK_SECONDS
                ),
            )
        )
        self.encoder = AudioEncoder(openai_encoder_config(
            n_mels=encoder.n_mels, n_ctx=encoder.n_audio_ctx, n_state=encoder.n_audio_state,
            n_head=encoder.n_audio_head, n_layer=encoder.n_audio_layer,
            attention=config._attn_implementation,
        ))  # fmt: skip
        self.projector = Adapter(encoder.n_audio_state, encoder.llm_dim)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and the frames of a whole chunk."""
        return self.encoder.cfg.n_mels, CHUNK_FRAMES

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: convolution, pooling and the adapter's convolution each halve them."""
        return ((n_frames + 1) // 2 // 2 - 1) // 2 + 1

    def prompt_ids(self, clip: AudioClip) -> list[int]:
        """Ids that stand for a clip: a placeholder per position, every chunk between markers."""
        assert self.tokens.placeholder is not None
        return [
            i
            for n in clip.n_frames
            for i in (self.start, *[self.tokens.placeholder] * self.n_tokens(n), self.end)
        ]

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Chunks of 25 seconds, each with its margin; the last one padded to the others' length."""
        size = CHUNK_SECONDS * waveform.sampling_rate
        chunks = [
            np.pad(waveform.samples[at : at + size], (0, MARGIN_SAMPLES))
            for at in range(0, len(waveform.samples), size)
        ]
        mels = [
            extractor(
                [chunk],
                sampling_rate=waveform.sampling_rate,
                padding="do_not_pad",
                return_tensors="pt",
            )["input_features"][0].T
            for chunk in chunks
        ]
        features = pad_sequence(mels, batch_first=True).transpose(1, 2).contiguous()
        return features, [len(mel) - MARGIN_FRAMES for mel in mels]

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all chunks in one batch, as the published code does."""
        mel = self.hook_encoder_in(windows.features)
        length = mel.shape[-1]
        frame = torch.arange((length + 1) % 2, length, 2, device=mel.device)
        hidden = self.encoder(mel, frame < windows.n_frames[:, None])
        hidden = self.hook_projector_in(self.hook_encoder_out(hidden))
        return self.hook_projector_out(self.projector(hidden))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        wavs: Float[Tensor, "chunk mel frame"] | None = None,
        wav_lens: Int[Tensor, " length"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        A whole chunk and the one that follows at once are one clip.

        Raises:
            InputError: chunks without their lengths, or in another number than start tokens.
        """
        ids, mask = ids_and_mask(input_ids, attention_mask, refused, "wavs, wav_lens")
        if (wavs is None) != (wav_lens is None):
            raise InputError(
                "encoding a processor's output: wavs and wav_lens belong together; without "
                "lengths, padding would be heard as silence."
            )
        clips = [] if wavs is None or wav_lens is None else self._clips(ids, wavs, wav_lens)
        return self.input_from_features(ids, mask, position_ids, clips)

    def _clips(
        self,
        ids: Int[Tensor, "batch pos"],
        wavs: Float[Tensor, "chunk mel frame"],
        wav_lens: Int[Tensor, " length"],
    ) -> list[AudioClip]:
        starts = (ids == self.start).nonzero().tolist()
        if not len(starts) == len(wavs) == len(wav_lens):
            raise InputError(
                f"encoding a processor's output: the prompts have {len(starts)} audio start "
                f"tokens ({self.start}), wavs {len(wavs)} chunks and wav_lens {len(wav_lens)} "
                "lengths. Give one of each per chunk."
            )
        groups: list[list[int]] = []
        after: tuple[int, int] | None = None  # where a chunk that goes on with the clip would start
        lengths = wav_lens.tolist()
        for chunk, (row, pos) in enumerate(starts):
            if (row, pos) == after:
                groups[-1].append(chunk)
            else:
                groups.append([chunk])
            is_whole = lengths[chunk] == CHUNK_FRAMES
            after = (row, pos + self.n_tokens(CHUNK_FRAMES) + 2) if is_whole else None
        clips = []
        for i, group in enumerate(groups):
            n_frames = [lengths[chunk] for chunk in group]
            features = wavs[group][..., : max(n_frames) + MARGIN_FRAMES].clone()
            clips.append(self.clip(features, n_frames, name=f"clip {i}"))
        return clips

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms of all chunks, padded to the longest, and their lengths."""
        features, mask = self.features_and_mask(clips)
        return {"wavs": features, "wav_lens": mask.sum(-1)}


def decoder_config(
    config: StepAudio2Config, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for.

    Raises:
        ConversionError: adapter and decoder differ in width, or fields are not accounted for.
    """
    account_for(
        config,
        published,
        handled={"audio_encoder_config", "text_config", "tie_word_embeddings", "audio_start_id",
                 "audio_end_id", "audio_patch_id"},
        irrelevant={
            "auto_map": "names code that is never run",
            "sliding_window": "the decoder's is in text_config",
            "max_window_layers": "the decoder's is in text_config",
        },
    )  # fmt: skip
    encoder, text = config.audio_encoder_config, config.text_config
    account_for(
        encoder,
        published.get("audio_encoder_config", {}),
        handled={"n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer",
                 "llm_dim"},
        irrelevant={"n_codebook_size": "for a tokenizer of speech; the encoder has no codes"},
    )  # fmt: skip
    if encoder.llm_dim != text.hidden_size:
        raise ConversionError(
            f"reading a {type(config).__name__}: the adapter is {encoder.llm_dim} wide (llm_dim), "
            f"the decoder {text.hidden_size} (hidden_size); expected the same."
        )
    return decoders.decoder_config(
        text,
        {
            name: value
            for name, value in published.get("text_config", {}).items()
            if name not in TEXT_IRRELEVANT
        },
        qkv_bias=True,
        qk_norm=False,
        tie_word_embeddings=config.tie_word_embeddings,
        **identity,
    )


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|BOT|>' + ('human' if message.role == 'user' else message.role) + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'text' -%}{{- item.text -}}{%- else -%}{{- '<audio_patch>' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|EOT|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|BOT|>assistant\\n' -}}{%- endif -%}"""
"""Template of the published code; a clip stands for its chunks, markers included."""


FAMILY = Family(
    name="Step-Audio 2 mini",
    architectures=("StepAudio2ForCausalLM",),
    config_class=StepAudio2Config,
    decoder_config=decoder_config,
    front_end=StepAudio2FrontEnd,
    rules=(
        *decoders.decoder_rules(r"model\."),
        *openai_encoder_rules(
            r"encoder\.",
            positions=r"positional_embedding\.weight",
            norm="after_norm",
        ),
        Rename(r"adapter\.(.+)", r"audio.projector.\1"),
    ),
    card=Card(
        audio="12.5/s in chunks of 25 s, at most what fits the context (1300 s)",
        readout="`\\n` after `assistant`",
        reference="composed",
        notes="every chunk of 25 s has markers of its own; the last position of a chunk depends on "
        "the length of the chunks encoded with it; text and speech come out of one head",
    ),
    chat_template=CHAT_TEMPLATE,
    feature_extractor=lambda config: WhisperFeatureExtractor(
        feature_size=config.audio_encoder_config.n_mels
    ),
)
