"""MiMo-Audio: groups of RVQ codes through a small transformer, Qwen2 decoder, text head.

Transformers has no class for it. What this module does follows XiaomiMiMo's published
``modeling_mimo_audio.py``. A position is a token of text, or a group of four frames of eight codes.
Speech generation is left out: it reads the trunk.
"""

from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from hooked_alm.audio import Waveform
from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens, as_ranges

from ..blocks import decoders
from ..family import Card, Family
from ..rules import Drop, Frequencies, Rename
from ..strict_config import account_for

FRAMES_PER_SECOND = 25
SAMPLING_RATE = 24000


class MiMoAudioConfig(Qwen2Config):
    """The published ``config.json``, and the ids that the published code asks its tokenizer for."""

    model_type = "qwen2"

    def __init__(
        self,
        *,
        speech_vocab_size: str | int = "1025-1025-129-129-129-129-129-129",
        speech_zeroemb_idx: str | int = "1024-1024-128-128-128-128-128-128",
        group_size: int = 4,
        audio_channels: int = 8,
        local_dim: int = 1024,
        local_attn_heads: int = 64,
        input_local_layers: int = 6,
        input_local_dim: int | None = None,
        input_full_attention: bool | None = None,
        sosp_id: int = 151665,
        eosp_id: int = 151666,
        empty_id: int = 151667,
        head_dim: int = 128,
        **qwen2: Any,
    ) -> None:
        """Take the fields; defaults are those of the published class."""
        super().__init__(**qwen2)
        self.head_dim = head_dim
        self.sosp_id, self.eosp_id, self.empty_id = sosp_id, eosp_id, empty_id
        self.speech_vocab_size, self.speech_zeroemb_idx = speech_vocab_size, speech_zeroemb_idx
        self.group_size, self.audio_channels = group_size, audio_channels
        self.local_dim, self.local_attn_heads = local_dim, local_attn_heads
        self.input_local_layers = input_local_layers
        self.input_local_dim = input_local_dim or local_dim
        self.input_full_attention = input_full_attention

    def by_channel(self, value: str | int) -> list[int]:
        """Numbers by channel: "1025-129-..." names each, a single one is for all."""
        parts = [int(part) for part in str(value).split("-")]
        return parts if len(parts) > 1 else parts * self.audio_channels

    def patch_config(self) -> Qwen2Config:
        """Config of the transformer over the frames of a group."""
        d, heads = self.input_local_dim, self.local_attn_heads
        patch = Qwen2Config(
            vocab_size=1,  # it reads embeddings
            hidden_size=d,
            intermediate_size=4 * d,
            num_hidden_layers=self.input_local_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=d // heads,
            hidden_act=self.hidden_act,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            rope_parameters=self.rope_parameters,
        )
        patch._attn_implementation = self._attn_implementation
        return patch


class MiMoAudioFrontEnd(FrontEnd):
    """Embeddings of codes, the transformer over a group, and the projection of groups.

    The features of a clip are codes ``[1, channel, frame]``, which MiMo-Audio-Tokenizer makes of a
    recording and which are an input here. ``hook_encoder_in`` shows them; ``hook_encoder_out`` and
    ``hook_projector_in`` a group as one position, its frames side by side.
    """

    def __init__(self, config: MiMoAudioConfig, markers: frozenset[int]) -> None:
        """Lay everything out; ``markers`` are the ids around a clip."""
        super().__init__(
            AudioTokens(
                placeholder=config.empty_id,
                markers=markers | {config.sosp_id, config.eosp_id},
                seconds_per_token=config.group_size / FRAMES_PER_SECOND,
                max_seconds=None,
            )
        )
        self.sizes = config.by_channel(config.speech_vocab_size)
        self.empty_codes = config.by_channel(config.speech_zeroemb_idx)
        self.d_local = config.input_local_dim
        self.group_size, self.longest = config.group_size, config.max_position_embeddings
        self.is_causal = not config.input_full_attention
        self.codebooks = nn.ModuleList(
            nn.Embedding(size, config.input_local_dim) for size in self.sizes
        )
        self.patch_encoder = Qwen2Model(config.patch_config())
        del self.patch_encoder.embed_tokens
        self.patch_encoder.embed_tokens = None
        self.projector = nn.Linear(
            config.group_size * config.input_local_dim, config.hidden_size, bias=False
        )

    @property
    def n_channels(self) -> int:
        """Number of codes of a frame."""
        return len(self.sizes)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Channels, and the frames that the context of the decoder holds."""
        return self.n_channels, self.group_size * self.longest

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: whole groups of frames."""
        return n_frames // self.group_size

    def random_clip(self, n_frames: int, generator: torch.Generator) -> AudioClip:
        """A clip of random codes."""
        codes = [torch.randint(size - 1, (n_frames,), generator=generator) for size in self.sizes]
        return self.clip(torch.stack(codes)[None], [n_frames], name="noise")

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Refuse a recording: the tokenizer of speech is not part of the model.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"hearing {waveform.name}: MiMo-Audio reads codes, not sound. Make them with "
            "MiMo-Audio-Tokenizer, repeat the last frame until they are whole groups, and give "
            "`model.audio.clip(codes[None], [n_frames])` in place of the recording."
        )

    def read_text(
        self,
        x: ALMInput,
        tokens: Int[Tensor, "batch pos"],
        embed: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Embeddings of the text; a group that is text has no codes.

        Raises:
            InputError: a group outside every clip: the answer went on in speech, perhaps.
        """
        new = slice(x.shape[1] - tokens.shape[1], None)
        is_real = x.attention_mask[:, new].to(tokens.device).bool()
        is_heard = x.spans.heard[:, new].to(tokens.device)
        unheard = (tokens == self.tokens.placeholder) & is_real & ~is_heard
        if unheard.any():
            raise InputError(
                f"running MiMo-Audio: {int(unheard.sum())} audio placeholders (id "
                f"{self.tokens.placeholder}, a group of codes) have no codes. A prompt gives them "
                "as input_ids [batch, 1 + channels, frames]. Where the model itself begins to "
                "speak, it cannot be followed: generate with suppress_tokens="
                f"[{self.tokens.placeholder}], or end the answer before."
            )
        return embed

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all groups of all clips in one batch, as the published code does."""
        codes = self.hook_encoder_in(windows.features)
        n_windows, _, n_frames = codes.shape
        frames = torch.zeros(
            n_windows, n_frames, self.d_local, dtype=self.dtype, device=codes.device
        )
        for book, empty, of_channel in zip(
            self.codebooks, self.empty_codes, codes.unbind(1), strict=True
        ):
            is_empty = (of_channel == empty).unsqueeze(-1)
            frames = frames + book(of_channel).masked_fill(is_empty, 0.0)
        groups = frames.reshape(-1, self.group_size, self.d_local)
        hidden = self.patch_encoder(
            inputs_embeds=groups, is_causal=self.is_causal, use_cache=False
        ).last_hidden_state
        hidden = hidden.reshape(n_windows, -1, self.group_size * self.d_local)
        hidden = self.hook_projector_in(self.hook_encoder_out(hidden))
        return self.hook_projector_out(self.projector(hidden))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch *channel frame"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        ``input_ids`` are ``[batch, 1 + channels, frames]``: text first, of which the first of every
        group counts, then codes. Prompts without audio may be ``[batch, pos]``.

        Raises:
            InputError: ids of another shape, or codes that a channel does not have.
        """
        text, codes = input_ids, None
        if input_ids is not None and input_ids.ndim != 2:
            if input_ids.shape[1] != 1 + self.n_channels or input_ids.shape[2] % self.group_size:
                raise InputError(
                    f"encoding MiMo-Audio's input_ids {list(input_ids.shape)}: expected [batch, "
                    f"{1 + self.n_channels}, frames], frames in groups of {self.group_size}."
                )
            text, codes = input_ids[:, 0, :: self.group_size].clone(), input_ids[:, 1:]
        ids, mask = ids_and_mask(text, attention_mask, refused, "the codes among the ids")
        if (ids[mask.bool()] < 0).any():
            raise InputError(
                "encoding MiMo-Audio's input_ids: negative ids where the first of a group must be "
                "text. Only the others of a group may be -100."
            )
        is_audio = (ids == self.tokens.placeholder) & mask.bool()
        if codes is None:
            nowhere = torch.zeros_like(is_audio)
            return self.input_from_features(ids, mask, position_ids, [], is_audio=nowhere)
        clips = [
            self._clip(codes, row, start, stop)
            for row, heard in enumerate(is_audio)
            for start, stop in as_ranges(heard.nonzero().flatten().tolist())
        ]
        return self.input_from_features(ids, mask, position_ids, clips, is_audio=is_audio)

    def _clip(
        self, codes: Int[Tensor, "batch channel frame"], row: int, start: int, stop: int
    ) -> AudioClip:
        """The clip at some positions of a row."""
        first, last = start * self.group_size, stop * self.group_size
        of_clip = codes[row, :, first:last].clone()
        for channel, size in enumerate(self.sizes):
            low, high = of_clip[channel].aminmax()
            if low < 0 or high >= size:
                raise InputError(
                    f"encoding MiMo-Audio's input_ids: row {row} has codes from {int(low)} to "
                    f"{int(high)} in channel {channel}, expected 0 to {size - 1}."
                )
        return self.clip(of_clip[None], [last - first], name=f"row {row}, position {start}")

    def hf_prompt(self, x: ALMInput) -> dict[str, Tensor]:
        """Arguments of a prompt: text and codes in one tensor, empty codes beside text."""
        batch, pos = x.shape
        ids = torch.empty(batch, 1 + self.n_channels, pos * self.group_size, dtype=torch.long)
        ids[:, 0] = -100
        ids[:, 0, :: self.group_size] = x.tokens.cpu()
        ids[:, 1:] = torch.tensor(self.empty_codes)[:, None]
        clips_of_rows = chain.from_iterable(x.spans.clips)
        for row, clip, ranges in zip(x.clip_rows, x.clips, clips_of_rows, strict=True):
            (start, stop), *_ = ranges
            first, last = start * self.group_size, stop * self.group_size
            ids[row, 1:, first:last] = clip.features[0, :, : last - first]
        return {"input_ids": ids}

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """No arguments: the codes are among the ids."""
        return {}


_HANDLED = frozenset({
    "speech_vocab_size", "speech_zeroemb_idx", "group_size", "audio_channels", "local_attn_heads",
    "local_dim", "input_local_layers", "input_local_dim", "input_full_attention", "sosp_id",
    "eosp_id", "empty_id",
})  # fmt: skip
_SPEECH = "speech generation, which reads the trunk and does not feed back into it"
_IRRELEVANT = {
    "delay_pattern": _SPEECH,
    "local_layers": _SPEECH,
    "local_ffn_dim": _SPEECH,
    "local_rotary_base": _SPEECH,
    "local_attn_dropout": "training only",
    "local_hidden_dropout": "training only",
    "no_speech_loss": "training only",
    "no_text_loss": "training only",
    "empty_loss_weight": "training only",
    "n_rvq": "of the tokenizer of speech, whose first channels alone are read",
    "mlp_layers": "not read",
    "auto_map": "names code that is never run",
}


def decoder_config(
    config: MiMoAudioConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for.

    Raises:
        ConversionError: sizes that do not fit each other, or fields that are not accounted for.
    """
    own = {
        name: value
        for name, value in published.items()
        if name in {*_HANDLED, *_IRRELEVANT, "attention_bias"}
    }
    account_for(config, own, handled=_HANDLED | {"attention_bias"}, irrelevant=_IRRELEVANT)
    sizes, empty = (
        config.by_channel(value) for value in (config.speech_vocab_size, config.speech_zeroemb_idx)
    )
    problems = [
        f"{name} names {len(values)} channels, audio_channels = {config.audio_channels}"
        for name, values in (("speech_vocab_size", sizes), ("speech_zeroemb_idx", empty))
        if len(values) != config.audio_channels
    ]
    if not 0 <= config.empty_id < config.vocab_size:
        problems.append(f"empty_id = {config.empty_id}, expected an id of the vocabulary")
    if config.input_full_attention not in (None, True, False):
        problems.append(f"input_full_attention = {config.input_full_attention!r}, expected a bool")
    if published.get("attention_bias", True) is not True:
        problems.append("attention_bias = False, expected True: a Qwen2 decoder has biases")
    if problems:
        raise ConversionError(f"reading a {type(config).__name__}: {'; '.join(problems)}.")
    return decoders.text_decoder_config(
        config,
        {name: value for name, value in published.items() if name not in own},
        qkv_bias=True,
        qk_norm=False,
        **identity,
    )


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'text' -%}
{{- item.text -}}
{%- else -%}
{{- '<|sosp|><|empty|><|eosp|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
"""Template of the published inference code; ``answer_prefix`` takes its ``<think>`` blocks."""

FAMILY = Family(
    name="MiMo-Audio",
    architectures=("MiMoAudioModel", "MiMoAudioForCausalLM"),
    config_class=MiMoAudioConfig,
    decoder_config=decoder_config,
    front_end=MiMoAudioFrontEnd,
    rules=(
        *decoders.decoder_rules(r"model\."),
        Rename(r"speech_embeddings\.(\d+)\.weight", r"audio.codebooks.\1.weight"),
        Frequencies(
            r"input_local_transformer\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
            module="audio.patch_encoder.rotary_emb",
        ),
        Rename(r"input_local_transformer\.(.+)", r"audio.patch_encoder.\1"),
        Rename(r"speech_group_downcast\.weight", "audio.projector.weight"),
        Drop(r"local_transformer(_lm_heads)?\..+", _SPEECH),
        Drop(r"(hidden_states_downcast|speech_embeddings_to_local)\..+", _SPEECH),
    ),
    card=Card(
        is_encoder_hooked=False,
        audio="6.25/s (groups of four frames of codes), as long as the context of 8192 allows",
        readout="`\\n` after `assistant`",
        reference="composed",
        notes="reads codes of MiMo-Audio-Tokenizer, not sound; text head alone: an answer that "
        "goes on in speech is refused; the published code sums a frame's codes in bfloat16, here "
        "in the model's dtype",
    ),
    chat_template=CHAT_TEMPLATE,
    # Recordings are refused with a reason; clips of codes go through `prepare`.
    feature_extractor=lambda config: SimpleNamespace(sampling_rate=SAMPLING_RATE),
)
