"""SALMONN: Whisper and BEATs side by side, a Q-Former over short windows, Vicuna with LoRA.

Transformers has no class for it. What this module does follows bytedance/SALMONN's
``models/salmonn.py`` of the first release, without soft prompts. The folder holds
``salmonn*.pth`` and a ``config.json``: the ``model`` section of the published ``config.yaml``, and
``"architectures": ["SALMONN"]``. Vicuna and Whisper are components, and LoRA is added to Vicuna's
weights on loading. BEATs is not part of the model: its features are an input.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from hooked_alm.audio import Waveform
from hooked_alm.checkpoint import Checkpoint
from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.model import HookedALM
from hooked_alm.spans import AudioTokens

from ..blocks import decoders, whisper_llama
from ..blocks.whisper_encoder import encoder_config
from ..blocks.whisper_llama import AUDIO_MODEL, SPEECH, TEXT_MODEL, WhisperLlamaConfig
from ..family import Card, Family
from ..rules import Drop, Lora, Rename
from ..strict_config import account_for

LORA_SCALING = 4.0
"""``lora_alpha / lora_rank`` of the release."""
FRAME_SECONDS = 0.02


class SalmonnConfig(WhisperLlamaConfig):
    """The ``model`` section with the published defaults, and sizes of BEATs and of BERT."""

    model_type = "salmonn"
    beats_path: str = ""
    use_speech_Qformer: bool = True  # noqa: N815
    window_level_Qformer: bool = True  # noqa: N815
    num_speech_query_token: int = 1
    second_per_window: float = 0.333333
    second_stride: float = 0.333333
    lora: bool = True
    lora_rank: int = 8
    lora_alpha: int = 32
    soft_prompts: bool = False
    l2p: bool = False
    beats_dim: int = 768
    qformer_dim: int = 768
    qformer_heads: int = 12
    qformer_layers: int = 2


class SalmonnFrontEnd(FrontEnd):
    """Whisper, norms, Q-Former and projection, between our hook points.

    A clip is one window of 30 seconds, and fills the same positions whatever it lasts. Its features
    are ``[1, 2 * mel + beats, frame]`` at 20 ms: two columns of Whisper's spectrogram, then what
    BEATs makes of the recording, filled up with zeros; ``n_frames`` counts frames of BEATs.
    ``hook_encoder_out`` shows both encoders side by side, ``hook_projector_in`` the Q-Former's
    answers.
    """

    def __init__(self, config: SalmonnConfig, markers: frozenset[int]) -> None:
        """Lay everything out; ``markers`` are the ids around a clip: there are none."""
        encoder: Any = config.audio_config
        text: Any = config.text_config
        self.n_ctx, self.n_mels = encoder.max_source_positions, encoder.num_mel_bins
        # The published code counts frames of 30 seconds, whatever the encoder holds.
        self.kernel = round(config.second_per_window / FRAME_SECONDS)
        self.stride = round(config.second_stride / FRAME_SECONDS)
        self.d_beats = config.beats_dim if config.beats_path else 0
        self.lora_rank = config.lora_rank
        super().__init__(
            AudioTokens(
                placeholder=None,  # its rows are inserted
                markers=markers,
                seconds_per_token=FRAME_SECONDS * self.stride / config.num_speech_query_token,
                max_seconds=FRAME_SECONDS * self.n_ctx,
                text="<SpeechHere>",
            )
        )
        d_audio = encoder.d_model + self.d_beats
        self.encoder = AudioEncoder(encoder_config(encoder))
        self.ln_speech = nn.LayerNorm(encoder.d_model)
        if self.d_beats:
            self.ln_audio = nn.LayerNorm(self.d_beats)
        self.query_tokens = nn.Parameter(
            torch.empty(1, config.num_speech_query_token, config.qformer_dim)
        )
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.qformer_dim,
                num_attention_heads=config.qformer_heads,
                num_hidden_layers=config.qformer_layers,
                intermediate_size=4 * config.qformer_dim,
                cross_attention_frequency=1,
                encoder_hidden_size=d_audio,
                attn_implementation=config._attn_implementation,
            )
        )
        self.projector = nn.Linear(config.qformer_dim, text.hidden_size)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Rows and frames of the packed features."""
        return 2 * self.n_mels + self.d_beats, self.n_ctx

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions of a full window, whatever the duration."""
        return ((self.n_ctx - self.kernel) // self.stride + 1) * self.query_tokens.shape[1]

    def clip_of(
        self,
        spectrogram: Float[Tensor, "mel frame"],
        audio_embeds: Float[Tensor, "beats_frame d_beats"] | None = None,
        **about: Any,
    ) -> AudioClip:
        """A clip from Whisper's spectrogram of 30 seconds and BEATs' features.

        Raises:
            InputError: of other sizes, or features where the model has no BEATs, or none where it
                has.
        """
        beats = spectrogram.new_zeros(self.n_ctx, 0) if audio_embeds is None else audio_embeds
        expected = [self.n_mels, 2 * self.n_ctx]
        if (
            [*spectrogram.shape] != expected
            or beats.shape[1] != self.d_beats
            or len(beats) > self.n_ctx
        ):
            raise InputError(
                f"hearing {about.get('name', 'a clip')}: got a spectrogram {[*spectrogram.shape]} "
                f"and BEATs features {[*beats.shape] if audio_embeds is not None else 'none'}, "
                f"expected {expected} and "
                + (f"[at most {self.n_ctx}, {self.d_beats}]." if self.d_beats else "none.")
            )
        columns = spectrogram.unflatten(1, (self.n_ctx, 2)).permute(2, 0, 1).flatten(0, 1)
        filled = F.pad(beats.T.to(columns), (0, self.n_ctx - len(beats)))
        return self.clip(torch.cat([columns, filled])[None], [len(beats)], **about)

    def _unpack(
        self, packed: Float[Tensor, "window feature frame"]
    ) -> tuple[Float[Tensor, "window mel mel_frame"], Float[Tensor, "window d_beats frame"]]:
        """Undo ``clip_of``."""
        columns, beats = packed[:, : 2 * self.n_mels], packed[:, 2 * self.n_mels :]
        return columns.unflatten(1, (2, self.n_mels)).permute(0, 2, 3, 1).flatten(2), beats

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Features of a recording as one window of 30 seconds, for a model without BEATs.

        Raises:
            InputError: the model has BEATs.
        """
        if self.d_beats:
            raise InputError(
                f"hearing {waveform.name}: this SALMONN also reads BEATs features, which nothing "
                "here makes. Run BEATs on the recording, and give `model.audio.clip_of("
                "spectrogram, audio_embeds)` in its place."
            )
        mel, _ = whisper_llama.whole_window(waveform, extractor)
        clip = self.clip_of(torch.as_tensor(mel)[0])
        return clip.features, [*clip.n_frames]

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all clips in one batch, as the published code does."""
        mel, beats = self._unpack(self.hook_encoder_in(windows.features).to(self.dtype))
        hidden = self.ln_speech(self.encoder(mel))
        if self.d_beats:
            frame = torch.arange(self.n_ctx, device=beats.device)
            is_padding = (frame >= windows.n_frames[:, None]).unsqueeze(-1)
            audio = self.ln_audio(beats.transpose(1, 2)).masked_fill(is_padding, 0.0)
            hidden = torch.cat([hidden, audio], dim=-1)
        hidden = self.hook_encoder_out(hidden)
        pieces = hidden.unfold(1, self.kernel, self.stride).transpose(2, 3).flatten(0, 1)
        pieces = pieces.contiguous()  # of a single clip it is a view, which rounds otherwise
        answers = self.qformer(
            query_embeds=self.query_tokens.expand(len(pieces), -1, -1),
            encoder_hidden_states=pieces,
        ).last_hidden_state
        answers = self.hook_projector_in(answers.reshape(len(hidden), -1, answers.shape[-1]))
        return self.hook_projector_out(self.projector(answers))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        spectrogram: Float[Tensor, "clip mel frame"] | None = None,
        audio_embeds: Float[Tensor, "heard beats_frame d_beats"] | None = None,
        audio_lens: Int[Tensor, " heard"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        One id -200 per clip; ``audio_lens`` counts BEATs frames, None is all of them.

        Raises:
            InputError: ids -200, spectrograms and BEATs features that differ in number.
        """
        ids, mask = ids_and_mask(
            input_ids, attention_mask, refused, "spectrogram, audio_embeds, audio_lens"
        )
        n_clips = 0 if spectrogram is None else len(spectrogram)
        n_beats = n_clips if audio_embeds is None else len(audio_embeds)
        n_places = int(((ids == SPEECH) & mask.bool()).sum())
        if not n_places == n_clips == n_beats:
            raise InputError(
                f"encoding a prompt with speech: got {n_places} ids {SPEECH}, {n_clips} "
                f"spectrograms and {'no' if audio_embeds is None else n_beats} BEATs features, "
                "expected one each per clip."
            )
        if spectrogram is None:
            return self.input_from_features(ids, mask, position_ids, [], is_audio=ids < 0)
        clips = self._clips(spectrogram, audio_embeds, audio_lens)
        ids, mask, heard = whisper_llama.insert_clips(ids, mask, position_ids, clips)
        return self.input_from_features(ids, mask, None, clips, is_audio=heard.bool())

    def _clips(
        self, spectrogram: Tensor, audio_embeds: Tensor | None, audio_lens: Tensor | None
    ) -> list[AudioClip]:
        n = None if audio_lens is None else audio_lens.tolist()
        return [
            self.clip_of(
                mel,
                None if audio_embeds is None else audio_embeds[i, : None if n is None else n[i]],
                name=f"clip {i}",
            )
            for i, mel in enumerate(spectrogram)
        ]

    def hf_prompt(self, x: ALMInput) -> dict[str, Tensor]:
        """Arguments of a prompt: ids with one place per clip."""
        return whisper_llama.prompt_without_audio(x, [SPEECH])

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms, and BEATs features with their lengths."""
        mel, beats = self._unpack(torch.cat([clip.features for clip in clips]))
        if not self.d_beats:
            return {"spectrogram": mel}
        lengths = torch.tensor([clip.n_frames[0] for clip in clips])
        embeds = beats.transpose(1, 2)[:, : int(lengths.max())]
        return {"spectrogram": mel, "audio_embeds": embeds, "audio_lens": lengths}


_HANDLED = frozenset({
    "beats_path", "num_speech_query_token", "second_per_window", "second_stride", "lora_rank",
    "lora_alpha", "beats_dim", "qformer_dim", "qformer_heads", "qformer_layers",
})  # fmt: skip
_TRAINING = "training only"
_IRRELEVANT = {
    "llama_path": "says where the component is",
    "whisper_path": "says where the component is",
    "ckpt": "says where the file came from",
    "speech_llama_proj_model": "says where training started",
    "lora_dropout": _TRAINING,
    "freeze_whisper": _TRAINING,
    "freeze_beats": _TRAINING,
    "freeze_speech_QFormer": _TRAINING,
    "freeze_speech_llama_proj": _TRAINING,
    "prompt_path": _TRAINING,
    "test_prompt_path": "evaluation only",
    "max_txt_len": _TRAINING,
    "end_sym": _TRAINING,
    "multi_prompt": "whether rows of a batch may differ",
    "prompt_template": "the chat template has it",
    "low_resource": "the caller chooses",
    "device_8bit": "the caller chooses",
}


def decoder_config(
    config: SalmonnConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of Vicuna, and every other field accounted for.

    Raises:
        ConversionError: another scaling of LoRA than the release's, or fields that are not
            accounted for.
    """
    account_for(config, published, handled=_HANDLED, irrelevant=_IRRELEVANT)
    if config.lora_alpha != LORA_SCALING * config.lora_rank:
        raise ConversionError(
            f"reading a {type(config).__name__}: lora_alpha / lora_rank = {config.lora_alpha} / "
            f"{config.lora_rank}, expected {LORA_SCALING:g}, which LoRA is merged with."
        )
    return whisper_llama.decoder_config(config, **identity)


def check_lora(model: HookedALM, checkpoint: Checkpoint) -> None:
    """Check that Vicuna's query and value projections all have an update of the right rank.

    Raises:
        ConversionError: some have none, or another rank.
    """
    assert isinstance(model.audio, SalmonnFrontEnd)
    ranks = {checkpoint[name][0] for name in checkpoint if ".lora_A" in name}
    if ranks - {model.audio.lora_rank}:
        raise ConversionError(
            f"converting {checkpoint.folder}: its LoRA has rank {sorted(ranks)}, its config says "
            f"{model.audio.lora_rank}, by which the update is scaled. Take the config of this file."
        )
    found, expected = sum(".lora_" in name for name in checkpoint), 4 * model.cfg.n_layers
    if found != expected:
        raise ConversionError(
            f"converting {checkpoint.folder}: it holds {found} LoRA tensors, expected {expected}: "
            f"two for q_proj and v_proj of each of {model.cfg.n_layers} layers. Is the text model "
            "the one that it was trained on?"
        )


CHAT_TEMPLATE = """\
{%- if messages | length != 1 or messages[0].role != 'user' -%}
{{- raise_exception('SALMONN takes one turn of the user') -}}
{%- endif -%}
{{- 'USER: ' -}}
{%- if messages[0].content is string -%}
{{- messages[0].content -}}
{%- else -%}
{%- for item in messages[0].content -%}
{%- if item.type == 'text' -%}
{{- item.text -}}
{%- else -%}
{{- '<Speech><SpeechHere></Speech> ' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '\\nASSISTANT:' -}}"""
"""The published prompt; text before and behind a clip is tokenised apart."""

_QFORMER = r"speech_Qformer\.bert\."
_LAYER = _QFORMER + r"encoder\.layer\.(\d+)\."
_LORA = r"llama_model\.base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qv])_proj\.lora_"

FAMILY = Family(
    name="SALMONN",
    architectures=("SALMONN",),
    config_class=SalmonnConfig,
    decoder_config=decoder_config,
    front_end=SalmonnFrontEnd,
    components={
        TEXT_MODEL: lambda published, folder: published.get("llama_path") or None,
        AUDIO_MODEL: lambda published, folder: published.get("whisper_path") or None,
    },
    tokenizer=TEXT_MODEL,
    pickled=("salmonn*.pth", "model"),
    rules=(
        *decoders.decoder_rules(rf"{TEXT_MODEL}/model\.", head=rf"{TEXT_MODEL}/lm_head"),
        *(
            Lora(
                _LORA + factor + r"(?:\.default)?\.weight",
                r"blocks.\1.attn.\2_proj.weight",
                factor,
                LORA_SCALING,
            )
            for factor in ("A", "B")
        ),
        *whisper_llama.whisper_rules(rf"{AUDIO_MODEL}/"),
        Rename(r"(ln_speech|ln_audio)\.(.+)", r"audio.\1.\2"),
        Rename(r"speech_query_tokens", "audio.query_tokens"),
        Rename(r"speech_llama_proj\.(.+)", r"audio.projector.\1"),
        Rename(_QFORMER + r"embeddings\.LayerNorm\.(.+)", r"audio.qformer.layernorm.\1"),
        Rename(
            _LAYER + r"(attention|crossattention)\.self\.(.+)",
            r"audio.qformer.encoder.layer.\1.\2.attention.\3",
        ),
        Rename(
            _LAYER + r"((?:cross)?attention\.output|intermediate_query|output_query)\.(.+)",
            r"audio.qformer.encoder.layer.\1.\2.\3",
        ),
        Drop(_QFORMER + r"embeddings\.position_ids", "a constant"),
    ),
    card=Card(
        audio="2.9/s: 88 positions, every clip filled up to 30 s",
        readout="`:` of `ASSISTANT:`",
        reference="composed",
        notes="the silence after a clip is heard; BEATs features are an input (`model.audio."
        "clip_of`, or `audio_embeds` of `encode`); `config.json` is the `model` section of the "
        "published `config.yaml`; Vicuna and Whisper are components, as safetensors; LoRA is "
        "merged; the vocabulary has no row for SALMONN's [PAD], which is never trained",
    ),
    chat_template=CHAT_TEMPLATE,
    feature_extractor=whisper_llama.feature_extractor,
    check=check_lora,
)
