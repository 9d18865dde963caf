"""Kimi-Audio: two streams of tokens, continuous features, a fork, a text head and an audio head.

A position carries the sum of an audio-stream token and a text-stream token; where speech is heard
the first is a code of the recording, to which the adapted Whisper features are added. Transformers
has no class for it. What this module does follows the published inference code:
MoonshotAI/Kimi-Audio at 2607d51, checkpoint revision 9a82a84c.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen2Config, WhisperConfig

from hooked_alm.audio import Waveform
from hooked_alm.config import Branch, HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.hooks import HookPoint, is_hooked
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens, as_ranges

from ..blocks import decoders, whisper_llama
from ..blocks.whisper_encoder import encoder_config
from ..family import Card, Family
from ..rules import Rename

SECONDS_PER_TOKEN = 0.08
FRAMES_PER_TOKEN = 4
"""Whisper frames of 20 ms that are joined at every position."""
SAMPLES_PER_TOKEN = 1280
WHISPER = "whisper-large-v3"
"""Folder of the fine-tuned Whisper in a published checkpoint."""
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
        whisper: dict[str, Any] | None = None,
        **qwen2: Any,
    ) -> None:
        """Take the fields of the decoder, those that are its own, and its Whisper's config."""
        super().__init__(vocab_size=vocab_size, tie_word_embeddings=tie_word_embeddings, **qwen2)
        self.whisper = whisper
        self.kimia_mimo_layers = kimia_mimo_layers
        self.kimia_mimo_transformer_from_layer_index = kimia_mimo_transformer_from_layer_index
        self.kimia_adaptor_input_dim = kimia_adaptor_input_dim
        self.kimia_media_begin, self.kimia_media_end = kimia_media_begin, kimia_media_end
        self.kimia_text_blank, self.use_whisper_feature = kimia_text_blank, use_whisper_feature


_HANDLED = frozenset({
    "vocab_size", "tie_word_embeddings", "kimia_mimo_layers",
    "kimia_mimo_transformer_from_layer_index", "kimia_adaptor_input_dim", "kimia_media_begin",
    "kimia_media_end", "kimia_text_blank", "use_whisper_feature", "whisper",
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
    """The fine-tuned Whisper encoder, where the checkpoint's folder has it, and its adaptor.

    A clip is a spectrogram of each of its chunks of 30 s, ``[window, mel, frame]``, or what Whisper
    has made of it before, ``[1, feature, audio_pos]``; then nothing inside the encoder runs, and
    ``hook_encoder_in`` and ``hook_encoder_out`` both show the features. The discrete tokenizer is
    no part of it. Frames of a window are counted in positions, four states each.
    """

    no_prompts = (
        "the audio codes of Kimi-Audio come from a tokenizer that is a model of its own, and is no "
        "part of its checkpoint. Make the prompts with it, and give them to `encode`: see "
        "docs/kimi_audio.md"
    )

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
        if config.whisper is not None:
            whisper = WhisperConfig.from_dict(config.whisper)
            whisper._attn_implementation = config._attn_implementation
            self.encoder = AudioEncoder(encoder_config(whisper))
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
        """Audio positions: one per frame, as frames are counted here."""
        return n_frames

    def n_states(self, n_frames: int) -> int:
        """States of a window: four are joined at every position."""
        return FRAMES_PER_TOKEN * n_frames

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Spectrograms of the chunks of a recording, each padded to 30 s, and their positions."""
        length = 2 * self._whisper("hearing a recording").cfg.n_ctx * extractor.hop_length
        chunks = np.split(waveform.samples, range(length, len(waveform.samples), length))
        extracted = extractor(
            chunks,
            sampling_rate=waveform.sampling_rate,
            padding="max_length",
            max_length=length,
            return_tensors="pt",
        )
        whole = length // SAMPLES_PER_TOKEN
        n_positions = [min((len(chunk) - 1) // SAMPLES_PER_TOKEN + 1, whole) for chunk in chunks]
        return extracted["input_features"], n_positions

    def _whisper(self, attempt: str) -> AudioEncoder:
        found = self.hooked_encoder
        if not isinstance(found, AudioEncoder):
            raise InputError(
                f"{attempt} with Kimi-Audio: the checkpoint's folder has no {WHISPER}/, whose "
                "encoder that takes. Add it, or give whisper_input_feature."
            )
        return found

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all chunks in one batch, and adapt every clip by itself.

        The published code encodes chunk by chunk, which rounds otherwise.
        """
        features = self.hook_encoder_in(windows.features)
        if features.shape[1] == self.d_feature:
            self._refuse_hooks_inside()
            hidden = features.to(self.dtype).transpose(1, 2)
        else:
            states = self._whisper("hearing spectrograms")(features)
            n = states.shape[1] // FRAMES_PER_TOKEN
            hidden = states[:, : n * FRAMES_PER_TOKEN].reshape(len(states), n, -1)
        hidden = self.hook_projector_in(self.hook_encoder_out(hidden))
        n_frames, places = windows.n_frames.tolist(), windows.place.tolist()
        adapted = hidden.new_zeros(*hidden.shape[:2], self.d_model)
        starts = [i for i, place in enumerate(places) if place == 0]
        for start, stop in pairwise([*starts, len(places)]):
            # Of a clip all rows together, so that a batch changes no bit.
            rows = torch.cat([hidden[i, : n_frames[i]] for i in range(start, stop)])
            parts = self.adaptor(rows).split(n_frames[start:stop])
            for i, part in zip(range(start, stop), parts, strict=True):
                adapted[i, : n_frames[i]] = part
        return self.hook_projector_out(adapted)

    def _refuse_hooks_inside(self) -> None:
        """Refuse hooks on an encoder that does not run, which would never fire.

        Raises:
            InputError: there are any.
        """
        encoder = self.hooked_encoder
        points = [] if encoder is None else [*encoder.modules()]
        if any(isinstance(point, HookPoint) and is_hooked(point) for point in points):
            raise InputError(
                "hooking Kimi-Audio's Whisper: the prompt came with whisper_input_feature, so that "
                "the encoder does not run. Give `encode` the spectrograms, as input_features."
            )

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
        input_features: Sequence[Float[Tensor, "_chunk _mel _frame"]] | None = None,
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
                joined at every position; rows beyond the recording's codes are left out.
            input_features: instead of these, per recording, Whisper's spectrograms of its chunks of
                30 s, where the checkpoint's folder has Whisper.
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
            "text_input_ids, whisper_input_feature, input_features, is_continuous_mask",
        )  # fmt: skip
        given = [one for one in (whisper_input_feature, input_features) if one is not None]
        if len(given) != (is_continuous_mask is not None):
            raise InputError(
                "encoding for Kimi-Audio: whisper_input_feature, or input_features in its place, "
                "and is_continuous_mask belong together: the mask says which positions the "
                "features are of."
            )
        is_audio = torch.zeros_like(ids).bool()
        if is_continuous_mask is not None:
            is_audio = is_continuous_mask.bool().reshape(ids.shape)
        clips = self._clips(given[0] if given else (), is_audio, input_features is not None)
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
        self, features: Sequence[Tensor], is_audio: Bool[Tensor, "batch pos"], is_mel: bool
    ) -> list[AudioClip]:
        """Clips of a batch, one per run of the mask and cut to it, of spectrograms or features."""
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
        if is_mel:
            return [self._heard(i, *one) for i, one in enumerate(zip(features, runs, strict=True))]
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

    def _heard(self, i: int, mel: Tensor, n: int) -> AudioClip:
        """A clip of ``n`` positions from the spectrograms of its chunks."""
        shape = self._whisper("encoding spectrograms").window_shape
        whole = shape[1] // 2 // FRAMES_PER_TOKEN
        sizes = [min(whole, n - start) for start in range(0, n, whole)]
        if mel.ndim != 3 or mel.shape[1:] != shape or len(mel) < len(sizes):
            raise InputError(
                f"encoding for Kimi-Audio: recording {i} has spectrograms {list(mel.shape)}, "
                f"expected [chunk, mel {shape[0]}, frame {shape[1]}] with {len(sizes)} chunks or "
                f"more for {n} positions."
            )
        return self.clip(mel[: len(sizes)].clone(), sizes, name=f"clip {i}")

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Any]:
        """Features of every recording, or its spectrograms."""
        if all(clip.features.shape[1] != self.d_feature for clip in clips):
            return {"input_features": [clip.features for clip in clips]}
        return {"whisper_input_feature": [clip.features[0].T for clip in clips]}

    def hf_prompt(self, x: ALMInput) -> dict[str, Tensor]:
        """Arguments of a prompt: the second stream, and where speech is heard."""
        more = {"is_continuous_mask": x.spans.heard.to(x.device)} if x.clips else {}
        return more if x.text_tokens is None else {**more, "text_input_ids": x.text_tokens}


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
    if config.whisper is not None:
        whisper_llama.account_for_whisper(WhisperConfig.from_dict(config.whisper), config.whisper)
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


def _whisper_of(published: dict[str, Any], folder: Path) -> Path:
    """The folder of Whisper; the checkpoint's own where it has none, so that none is looked for."""
    inside = folder / WHISPER
    return inside if (inside / "config.json").is_file() else folder


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
        *whisper_llama.whisper_rules("whisper/"),
    ),
    components={"whisper": _whisper_of},
    card=Card(
        is_encoder_hooked=None,
        audio="12.5/s, at most 600 s",
        readout="`im_kimia_assistant_msg_start` (audio stream) and blank (text stream)",
        reference="composed",
        notes="two heads; codes come as inputs of `encode`, with Whisper's features, or with "
        f"spectrograms for the encoder in `{WHISPER}/`",
    ),
)
