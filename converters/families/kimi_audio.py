"""Kimi-Audio: two streams of tokens, continuous features, a fork, a text head and an audio head.

A position carries the sum of an audio-stream token and a text-stream token; where speech is heard
the first is a code of the recording, to which the adapted Whisper features are added. Transformers
has no class for it. What this module does follows the published inference code:
MoonshotAI/Kimi-Audio at 2607d51, checkpoint revision 9a82a84c.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen2Config

from hooked_alm.config import Branch, HookedALMConfig
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens, as_ranges

from ..blocks import decoders
from ..family import Card, Family
from ..rules import Rename

SECONDS_PER_TOKEN = 0.08
FRAMES_PER_TOKEN = 4
"""Whisper frames of 20 ms that are joined at every position."""
SAMPLES_PER_TOKEN = 1280
CHUNK_SAMPLES = 30 * 16000
MAX_POSITIONS = 7500
"""Positions that the published text mode allows."""


class KimiAudioConfig(Qwen2Config):
    """The published ``config.json``: a Qwen2 decoder, a branch, and ids of the inference code."""

    model_type = "kimi_audio"

    def __init__(
        self,
        *,
        vocab_size: int = 168448,
        tie_word_embeddings: bool = False,
        kimia_mimo_layers: int = 6,
        kimia_mimo_transformer_from_layer_index: int = 21,
        kimia_adaptor_input_dim: int = 5120,
        kimia_media_begin: int = 151661,
        kimia_media_end: int = 151663,
        kimia_text_blank: int = 151666,
        use_whisper_feature: bool = True,
        **qwen2: Any,
    ) -> None:
        """Take the fields of the decoder and those that are its own."""
        super().__init__(vocab_size=vocab_size, tie_word_embeddings=tie_word_embeddings, **qwen2)
        self.kimia_mimo_layers = kimia_mimo_layers
        self.kimia_mimo_transformer_from_layer_index = kimia_mimo_transformer_from_layer_index
        self.kimia_adaptor_input_dim = kimia_adaptor_input_dim
        self.kimia_media_begin, self.kimia_media_end = kimia_media_begin, kimia_media_end
        self.kimia_text_blank, self.use_whisper_feature = kimia_text_blank, use_whisper_feature


_HANDLED = frozenset({
    "vocab_size", "tie_word_embeddings", "kimia_mimo_layers",
    "kimia_mimo_transformer_from_layer_index", "kimia_adaptor_input_dim", "kimia_media_begin",
    "kimia_media_end", "kimia_text_blank", "use_whisper_feature",
})  # fmt: skip
_IRRELEVANT = {
    "kimia_token_offset": "where audio codes begin; ids come with it added",
    "kimia_text_output_vocab": "which logits its sampling code looks at",
    "kimia_audio_output_vocab": "which logits its sampling code looks at",
    "kimia_mimo_audiodelaytokens": "speech generation",
    "num_audio_special_tokens": "belongs to the tokenizer",
    "num_base_tokens": "belongs to the tokenizer",
    "attention_bias": "not read",
    "pretraining_tp": "not read",
}


class KimiAudioFrontEnd(FrontEnd):
    """The adaptor of Whisper features, which come as an input: ``[window, feature, audio_pos]``.

    The discrete tokenizer and the Whisper encoder are not part of it; ``hook_encoder_in`` and
    ``hook_encoder_out`` both show the features.
    """

    def __init__(self, config: KimiAudioConfig, markers: frozenset[int]) -> None:
        """Lay the adaptor out."""
        super().__init__(
            AudioTokens(
                placeholder=None,  # every position has a code of its own
                markers=frozenset({config.kimia_media_begin, config.kimia_media_end}),
                seconds_per_token=SECONDS_PER_TOKEN,
                max_seconds=MAX_POSITIONS * SECONDS_PER_TOKEN,
            )
        )
        d_in, d = config.kimia_adaptor_input_dim, config.hidden_size
        self.blank, self.d_feature, self.d_model = config.kimia_text_blank, d_in, d
        self.adaptor = nn.Sequential(
            nn.Linear(d_in, d), nn.SiLU(), nn.Dropout(0.0), nn.Linear(d, d),
            nn.LayerNorm(d, eps=config.rms_norm_eps),
        )  # fmt: skip

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Features per position, and the positions that the model allows."""
        return self.d_feature, MAX_POSITIONS

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: one per column of the features."""
        return n_frames

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Adapt every clip by itself, so that a batch changes no bit."""
        features = self.hook_encoder_in(windows.features).to(self.dtype).transpose(1, 2)
        hidden = self.hook_projector_in(self.hook_encoder_out(features))
        adapted = hidden.new_zeros(*hidden.shape[:2], self.d_model)
        for i, n in enumerate(windows.n_frames.tolist()):
            adapted[i, :n] = self.adaptor(hidden[i, :n].contiguous())
        return self.hook_projector_out(adapted)

    def merge(
        self,
        embed: Float[Tensor, "batch pos d_model"],
        is_audio: Bool[Tensor, "batch pos"],
        features: Float[Tensor, "heard d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Codes and features add up, times the square root of 2, rounded in their dtype."""
        root = torch.sqrt(torch.tensor(2.0, dtype=features.dtype, device=features.device))
        return embed.masked_scatter(is_audio.unsqueeze(-1), (embed[is_audio] + features) * root)

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        text_input_ids: Tensor | None = None,
        whisper_input_feature: Sequence[Tensor] | None = None,
        is_continuous_mask: Tensor | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        A batch must be left-padded.

        Args:
            input_ids: the audio stream: codes of the recording (plus the token offset), markers
                and roles; blank beside text.
            text_input_ids: the text stream; blank beside audio and roles.
            whisper_input_feature: per recording, ``[audio_pos, feature]``: four Whisper frames
                joined at every position; rows beyond
                the recording's codes are left out.
            is_continuous_mask: 1 at the codes, not at the markers.
            attention_mask: 1 at real positions.
            position_ids: None counts real positions.
            refused: anything else.

        Raises:
            InputError: features without their mask, or of other lengths than it says; streams of
                different shape.
        """
        ids, mask = ids_and_mask(
            input_ids, attention_mask, refused,
            "text_input_ids, whisper_input_feature, is_continuous_mask",
        )  # fmt: skip
        if (whisper_input_feature is None) != (is_continuous_mask is None):
            raise InputError(
                "encoding for Kimi-Audio: whisper_input_feature and is_continuous_mask belong "
                "together: the mask says which positions the features are of."
            )
        is_audio = torch.zeros_like(ids).bool()
        if is_continuous_mask is not None:
            is_audio = is_continuous_mask.bool().reshape(ids.shape)
        clips = self._clips(whisper_input_feature or (), is_audio)
        text = self._text_stream(text_input_ids, ids)
        is_text = torch.zeros_like(is_audio) if text is None else text != self.blank
        return self.input_from_features(
            ids, mask, position_ids, clips, is_audio, is_text, text_tokens=text, blank=self.blank
        )

    def _text_stream(
        self, text: Tensor | None, ids: Int[Tensor, "batch pos"]
    ) -> Int[Tensor, "batch pos"] | None:
        """Ids of the second stream; None if all are zero, when the published code adds nothing.

        Raises:
            InputError: of another length, or of zeros in some rows alone, where the published code,
                which runs one row at a time, would add nothing.
        """
        if text is None:
            return None
        if text.shape != ids.shape:
            raise InputError(
                f"encoding for Kimi-Audio: text_input_ids have shape {tuple(text.shape)}, "
                f"input_ids {tuple(ids.shape)}; the two streams run side by side."
            )
        has_text = (text != 0).any(-1)
        if has_text.any() and not has_text.all():
            raise InputError(
                "encoding for Kimi-Audio: text_input_ids are 0 throughout in rows "
                f"{(~has_text).nonzero().flatten().tolist()}, which means no text stream, and not "
                f"in others. Encode these rows by themselves, or give them blanks ({self.blank})."
            )
        return text if has_text.any() else None

    def read_text(
        self,
        x: ALMInput,
        tokens: Int[Tensor, "batch pos"],
        embed: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Embeddings of the audio stream, unchanged.

        Raises:
            InputError: an answer was appended to a prompt without a text stream, where it would be
                read as audio.
        """
        if x.text_tokens is not None:
            return embed
        if (x.attention_mask[:, -1].bool().cpu() & ~x.spans.mask("readout")[:, -1]).any():
            raise InputError(
                "running Kimi-Audio: text was appended to a prompt without a text stream. The "
                f"answer goes on in that stream; give text_input_ids, blanks ({self.blank}) where "
                "there is no text."
            )
        return embed

    def _clips(
        self, features: Sequence[Tensor], is_audio: Bool[Tensor, "batch pos"]
    ) -> list[AudioClip]:
        """Clips of a batch, one per run of the mask and cut to it."""
        runs = [
            stop - start
            for row in is_audio
            for start, stop in as_ranges(row.nonzero().flatten().tolist())
        ]
        if len(runs) != len(features):
            raise InputError(
                f"encoding for Kimi-Audio: {len(features)} recordings for {len(runs)} runs of "
                "is_continuous_mask. Give one tensor of features per run."
            )
        if max(runs, default=0) > MAX_POSITIONS:
            raise InputError(
                f"encoding for Kimi-Audio: a recording of {max(runs)} positions, expected at most "
                f"{MAX_POSITIONS} ({MAX_POSITIONS * SECONDS_PER_TOKEN:g} s). Cut it."
            )
        clips = []
        for i, (one, n) in enumerate(zip(features, runs, strict=True)):
            rows = one.reshape(-1, one.shape[-1])
            if len(rows) < n or rows.shape[-1] != self.d_feature:
                raise InputError(
                    f"encoding for Kimi-Audio: recording {i} has features {list(one.shape)}, "
                    f"expected {n} rows or more of {self.d_feature}."
                )
            clips.append(self.clip(rows[:n].T.clone()[None], [n], name=f"clip {i}"))
        return clips

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Any]:
        """Features of every recording."""
        return {"whisper_input_feature": [clip.features[0].T for clip in clips]}

    def hf_prompt(self, x: ALMInput) -> dict[str, Tensor]:
        """Arguments of a prompt: the second stream, and where speech is heard."""
        more = {"is_continuous_mask": x.spans.heard.to(x.device)} if x.clips else {}
        return more if x.text_tokens is None else {**more, "text_input_ids": x.text_tokens}


def whisper_features(
    samples: Float[Tensor, " sample"],
    encode: Callable[[Float[Tensor, " sample"]], Float[Tensor, "frame d"]],
) -> Float[Tensor, "audio_pos feature"]:
    """Features of a recording at 16 kHz, as ``whisper_input_feature`` takes them.

    Chunks of 30 s are encoded by themselves; of each, the frames that its samples fill are kept,
    and four of them joined at every position.

    Args:
        samples: the whole recording.
        encode: the Whisper encoder of the checkpoint's ``whisper-large-v3`` folder: a chunk of at
            most 30 s, which it pads to 30 s, to its last hidden states ``[1500, d]``.

    Raises:
        InputError: an empty recording.
    """
    if not len(samples):
        raise InputError("making Whisper features: the recording has no samples.")
    kept = []
    for chunk in samples.split(CHUNK_SAMPLES):
        n = (len(chunk) - 1) // SAMPLES_PER_TOKEN + 1
        kept.append(encode(chunk)[: n * FRAMES_PER_TOKEN])
    frames = torch.cat(kept)
    return frames.reshape(len(frames) // FRAMES_PER_TOKEN, -1)


def decoder_config(
    config: KimiAudioConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of trunk and branch, whose blocks are alike.

    Raises:
        ConversionError: a variant that was not published, or fields that are not accounted for.
    """
    if not config.use_whisper_feature or config.tie_word_embeddings:
        raise ConversionError(
            "reading a Kimi-Audio config: use_whisper_feature = false or tie_word_embeddings = "
            "true is another model than the published ones."
        )
    return decoders.decoder_config(
        config,
        {name: value for name, value in published.items() if name not in _IRRELEVANT},
        qkv_bias=True,
        qk_norm=False,
        tie_word_embeddings=False,
        branches=(
            Branch(
                head="audio",
                prefix="mimo_",
                n_layers=config.kimia_mimo_layers,
                from_layer=config.kimia_mimo_transformer_from_layer_index,
            ),
        ),
        two_token_streams=True,
        handled=_HANDLED,
        **identity,
    )


FAMILY = Family(
    name="Kimi-Audio",
    architectures=("MoonshotKimiaForCausalLM",),
    config_class=KimiAudioConfig,
    decoder_config=decoder_config,
    front_end=KimiAudioFrontEnd,
    rules=(
        *decoders.decoder_rules(r"model\."),
        *decoders.block_rules(r"model\.mimo_layers", "mimo_blocks"),
        Rename(r"model\.mimo_norm\.weight", "mimo_ln_final.weight"),
        Rename(r"mimo_output\.weight", "mimo_unembed.weight"),
        Rename(r"model\.vq_adaptor\.layers\.(\d)\.(weight|bias)", r"audio.adaptor.\1.\2"),
    ),
    card=Card(
        is_encoder_hooked=False,
        audio="12.5/s, at most 600 s",
        readout="`im_kimia_assistant_msg_start` (audio stream) and blank (text stream)",
        reference="composed",
        notes="two heads; codes and Whisper features come as inputs of `encode`",
    ),
)
