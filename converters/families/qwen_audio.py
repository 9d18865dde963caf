"""Qwen-Audio and Qwen-Audio-Chat: Whisper-type encoder, one linear layer, Qwen decoder.

Transformers has no class for it. What this module does follows QwenLM/Qwen-Audio at 0b0e882. The
decoder is Qwen2's as long as a prompt stays within the length that it was trained on; beyond, the
published code changes rotation and queries, and this one refuses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
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
from ..rules import Drop, Frequencies, Rename, Split
from ..strict_config import account_for

SECONDS_PER_TOKEN = 0.04

AudioInfo = Mapping[str, Any]
"""Output of the published tokenizer for recordings: ``input_audios [clip, mel, frame]``,
``input_audio_lengths [clip, 2]`` (outputs of the convolutions, positions) and
``audio_span_tokens``, positions of each clip with its two tags."""


class QwenAudioConfig(PreTrainedConfig):
    """The published ``config.json``, and the id that the published tokenizer puts between tags."""

    model_type = "qwen"

    def __init__(
        self,
        *,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 22016,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        kv_channels: int = 128,
        layer_norm_epsilon: float = 1e-6,
        rotary_emb_base: float | int = 10000,
        rotary_pct: float | int = 1.0,
        seq_length: int = 2048,
        scale_attn_weights: bool = True,
        no_bias: bool = True,
        tie_word_embeddings: bool = False,
        audio: dict[str, Any] | None = None,
        audio_pad_id: int = 151851,
        **rest: Any,
    ) -> None:
        """Take the fields; defaults are those of the published class."""
        super().__init__(tie_word_embeddings=tie_word_embeddings, **rest)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.intermediate_size, self.num_hidden_layers = intermediate_size, num_hidden_layers
        self.num_attention_heads, self.kv_channels = num_attention_heads, kv_channels
        self.layer_norm_epsilon, self.seq_length = layer_norm_epsilon, seq_length
        self.rotary_emb_base, self.rotary_pct = rotary_emb_base, rotary_pct
        self.scale_attn_weights, self.no_bias = scale_attn_weights, no_bias
        self.audio, self.audio_pad_id = audio, audio_pad_id


class QwenAudioFrontEnd(FrontEnd):
    """Encoder and projector, between our hook points; the two tags have embeddings of their own.

    The encoder hears every clip to the end of the longest one, and masks what is padding: the last
    position of a clip depends on the length of the clips that are encoded together with it.
    """

    depends_on_longest = True

    def __init__(self, config: QwenAudioConfig, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; ``markers`` are the ids around a clip."""
        sizes: dict[str, Any] = config.audio or {}
        self.start = sizes["audio_start_id"]
        self.end = self.start + 1
        self.longest = config.seq_length
        super().__init__(
            AudioTokens(
                placeholder=config.audio_pad_id,
                markers=markers | {self.start, self.end},
                seconds_per_token=SECONDS_PER_TOKEN,
                max_seconds=2 * sizes["n_ctx"] / 100,  # two frames of 10 ms each
            )
        )
        names = ("n_mels", "n_ctx", "n_state", "n_head", "n_layer")
        self.encoder = AudioEncoder(openai_encoder_config(
            **{name: sizes[name] for name in names}, attention=config._attn_implementation
        ))  # fmt: skip
        self.tags = nn.Embedding(2, config.hidden_size)
        self.projector = nn.Linear(sizes["n_state"], config.hidden_size)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and two frames per encoder position: the second convolution halves the rate."""
        return self.encoder.window_shape

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: a convolution of stride 2, then pooling by 2."""
        return (n_frames + 1) // 2 // 2

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Features of a recording as one window of 30 seconds, heard in whole pairs of frames."""
        extracted = extractor(
            [waveform.samples],
            sampling_rate=waveform.sampling_rate,
            padding="max_length",
            max_length=self.feature_shape[1] * extractor.hop_length,
            return_tensors="pt",
        )
        half = (len(waveform.samples) // extractor.hop_length + 1) // 2
        return extracted["input_features"], [2 * half]

    def read_text(
        self,
        x: ALMInput,
        tokens: Int[Tensor, "batch pos"],
        embed: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Embeddings of the text; those of a clip's tags are the audio encoder's.

        Raises:
            InputError: the prompt is longer than the decoder's rotation is Qwen2's.
        """
        if x.shape[1] > self.longest:
            raise InputError(
                f"running Qwen-Audio on {x.shape[1]} positions: beyond {self.longest} its rotation "
                "and its attention change with the length of the prompt (dynamic NTK, log-n), "
                "which is not supported. Give shorter prompts, fewer rows of unequal length, or "
                "generate less."
            )
        heard = x.spans.heard.to(tokens.device)
        n_past = x.shape[1] - tokens.shape[1]
        opens = F.pad(heard[:, 1:], (0, 1))[:, n_past:] & (tokens == self.start)
        closes = F.pad(heard[:, :-1], (1, 0))[:, n_past:] & (tokens == self.end)
        for where, row in zip((opens, closes), self.tags.weight, strict=True):
            embed = torch.where(where.unsqueeze(-1), row.to(embed.device), embed)
        return embed

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all clips in one batch, as the published code does."""
        half = (windows.n_frames + 1) // 2
        most = int(half.max())
        mel = self.hook_encoder_in(windows.features)[..., : 2 * most]
        hidden = self.encoder(mel, torch.arange(most, device=mel.device) < half[:, None])
        hidden = self.hook_projector_in(self.hook_encoder_out(hidden))
        return self.hook_projector_out(self.projector(hidden))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        audio_info: AudioInfo | Sequence[AudioInfo] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        ``audio_info`` is one for all rows, or a list by row.

        Raises:
            InputError: tags in the prompt that do not enclose the positions of the clips.
        """
        ids, mask = ids_and_mask(input_ids, attention_mask, refused, "audio_info")
        parts = [audio_info] if isinstance(audio_info, Mapping) else list(audio_info or ())
        clips = [clip for part in parts for clip in self._clips(part)]
        opens, closes = (ids == self.start).nonzero(), (ids == self.end).nonzero()
        spans = [
            b - a + 1 if row == other else 0
            for (row, a), (other, b) in zip(opens.tolist(), closes.tolist(), strict=False)
        ]
        expected = [clip.n_tokens + 2 for clip in clips]
        if spans != expected or len(opens) != len(closes):
            raise InputError(
                f"encoding a tokenizer's output: the spans from <audio> ({self.start}) to </audio> "
                f"({self.end}) have {spans} positions, the clips {expected} with their two tags. "
                "Give every clip its span."
            )
        return self.input_from_features(ids, mask, position_ids, clips)

    def _clips(self, info: AudioInfo) -> list[AudioClip]:
        halves = info["input_audio_lengths"][:, 0].tolist()
        return [
            self.clip(mel.clone()[None], [2 * half], name=f"clip {i}")
            for i, (mel, half) in enumerate(zip(info["input_audios"], halves, strict=True))
        ]

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Any]:
        """The published tokenizer's ``audio_info``, one for all rows."""
        features, mask = self.features_and_mask(clips)
        halves = (mask.sum(-1) + 1) // 2
        info = {
            "input_audios": features,
            "input_audio_lengths": torch.stack([halves, halves // 2], dim=1),
            "audio_span_tokens": [clip.n_tokens + 2 for clip in clips],
        }
        return {"audio_info": info}


_HANDLED = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "kv_channels", "layer_norm_epsilon", "rotary_emb_base", "seq_length", "tie_word_embeddings",
    "audio", "audio_pad_id",
})  # fmt: skip
_AUDIO_FIELDS = frozenset(
    {"n_mels", "n_ctx", "n_state", "n_head", "n_layer", "output_dim", "audio_start_id"}
)
_BEYOND = "acts beyond seq_length alone, where prompts are refused"
_IRRELEVANT = {
    "auto_map": "names code that is never run",
    "use_dynamic_ntk": _BEYOND,
    "use_logn_attn": _BEYOND,
    "max_position_embeddings": "not read; seq_length is",
    "attn_dropout_prob": "training only",
    "emb_dropout_prob": "training only",
    "bf16": "the caller chooses the dtype",
    "fp16": "the caller chooses the dtype",
    "fp32": "the caller chooses the dtype",
    "use_flash_attn": "the caller chooses the kernel",
    "onnx_safe": "not read",
    "tokenizer_type": "the tokenizer files decide",
}


def _problems(config: QwenAudioConfig) -> list[str]:
    """Reasons why a config is not Qwen-Audio's."""
    audio = config.audio or {}
    expected = {**dict.fromkeys(_AUDIO_FIELDS), "avg_pool": True, "add_audio_bos_eos_token": True}
    problems = [f"audio.{name} is missing" for name in sorted({*expected} - {*audio})]
    problems += [f"audio.{name} is unknown" for name in sorted({*audio} - {*expected})]
    problems += [
        f"audio.{name} = {audio[name]!r}, expected {value!r}"
        for name, value in {**expected, "output_dim": config.hidden_size}.items()
        if value is not None and audio.get(name, value) != value
    ]
    if config.kv_channels * config.num_attention_heads != config.hidden_size:
        problems.append(
            f"kv_channels * num_attention_heads = {config.kv_channels} * "
            f"{config.num_attention_heads}, expected hidden_size = {config.hidden_size}"
        )
    return problems


def decoder_config(
    config: QwenAudioConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for.

    Raises:
        ConversionError: another model of the architecture, or fields that are not accounted for.
    """
    account_for(config, published, handled=_HANDLED, irrelevant=_IRRELEVANT)
    if problems := _problems(config):
        raise ConversionError(
            f"reading a {type(config).__name__}: {'; '.join(problems)}. Of the models with this "
            "architecture, Qwen-Audio and Qwen-Audio-Chat are supported."
        )
    text = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size // 2,  # of the two halves of the gate
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=config.seq_length,
        rms_norm_eps=config.layer_norm_epsilon,
        rope_theta=float(config.rotary_emb_base),
    )
    return decoders.decoder_config(
        text,
        {},
        qkv_bias=True,
        qk_norm=False,
        tie_word_embeddings=config.tie_word_embeddings,
        **identity,
    )


CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- set heard = namespace(n=0) -%}
{%- for item in message.content -%}
{%- if item.type == 'text' -%}
{{- item.text -}}
{%- else -%}
{%- set heard.n = heard.n + 1 -%}
{{- 'Audio ' + heard.n | string + ':<audio>[[[AUDIO:modality]]]</audio>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
"""Template of the published inference code, for the chat model."""

_BLOCK = r"transformer\.h\.(\d+)\."

FAMILY = Family(
    name="Qwen-Audio",
    architectures=("QWenLMHeadModel",),
    config_class=QwenAudioConfig,
    decoder_config=decoder_config,
    front_end=QwenAudioFrontEnd,
    rules=(
        Split(
            _BLOCK + r"attn\.c_attn\.(weight|bias)",
            tuple(rf"blocks.\1.attn.{part}_proj.\2" for part in "qkv"),
        ),
        Rename(_BLOCK + r"attn\.c_proj\.weight", r"blocks.\1.attn.o_proj.weight"),
        Rename(_BLOCK + r"mlp\.w1\.weight", r"blocks.\1.mlp.up_proj.weight"),
        Rename(_BLOCK + r"mlp\.w2\.weight", r"blocks.\1.mlp.gate_proj.weight"),
        Rename(_BLOCK + r"mlp\.c_proj\.weight", r"blocks.\1.mlp.down_proj.weight"),
        Rename(_BLOCK + r"ln_([12])\.weight", r"blocks.\1.ln\2.weight"),
        Rename(r"transformer\.wte\.weight", "embed.weight"),
        Rename(r"transformer\.ln_f\.weight", "ln_final.weight"),
        Rename(r"lm_head\.weight", "unembed.weight"),
        *openai_encoder_rules(
            r"transformer\.audio\.",
            positions="positional_embedding",
            norm="ln_post",
        ),
        Rename(r"transformer\.audio\.proj\.(.+)", r"audio.projector.\1"),
        Rename(r"transformer\.audio\.audio_bos_eos_token\.weight", "audio.tags.weight"),
        Frequencies(_BLOCK + r"attn\.rotary_emb\.inv_freq"),
        Drop(_BLOCK + r"attn\.masked_bias", "a constant that older files keep"),
    ),
    card=Card(
        audio="25/s, at most 30 s",
        readout="`\\n` after `assistant`",
        reference="composed",
        notes="prompts of at most 2048 positions; the tags of a clip have embeddings of their own; "
        "the last position of a clip depends on the length of the clips encoded with it; the "
        "published tokenizer is code, which is never run: `prepare` needs a `tokenizer.json`; in "
        "half precision the published code rotates queries and keys in float32, here as Qwen2 does",
    ),
    chat_template=CHAT_TEMPLATE,
    feature_extractor=lambda config: WhisperFeatureExtractor(feature_size=config.audio["n_mels"]),
)
