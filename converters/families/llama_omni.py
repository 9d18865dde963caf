"""LLaMA-Omni: whole Whisper encoder, projector over five frames, LLaMA decoder.

Source: ictnlp/LLaMA-Omni, ``omni_speech_arch.py``, ``speech_projector.py``, ``preprocess.py``.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_alm.audio import Waveform
from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.errors import InputError
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens

from ..blocks import decoders, whisper_llama
from ..blocks.whisper_encoder import encoder_config
from ..blocks.whisper_llama import AUDIO_MODEL, SPEECH, TEXT_MODEL, WhisperLlamaConfig
from ..family import Card, Family, Published
from ..rules import Drop, Rename
from ..strict_config import account_for

D_PROJECTOR = 2048
"""Width of the projector's hidden layer; no config names it."""
ENCODER = "openai/whisper-large-v3"
"""The published config names OpenAI's file of the same weights."""
SPEECH_FIELDS = frozenset({
    "speech_encoder", "speech_encoder_type", "speech_encoder_ds_rate", "speech_encoder_hidden_size",
    "speech_projector_type", "speech_projector_lr", "speech_normalize", "speech_generator_type",
    "freeze_speech_projector", "tune_speech_projector", "tune_speech_generator_only",
    "ctc_decoder_config", "ctc_upsample_factor", "ctc_loss_weight", "unit_vocab_size",
    "tokenizer_model_max_length", "tokenizer_padding_side",
})  # fmt: skip
"""Fields that the published config has beside LLaMA's."""
CHAT_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}"
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and speech "
    "assistant. You are able to understand the speech content that the user provides, and assist "
    "the user with a variety of tasks using natural language.<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Conversation ``llama_3`` of the published code."""


class LlamaOmniConfig(WhisperLlamaConfig):
    """Config of ``config.json``, where the fields of LLaMA and of the speech stand side by side."""

    model_type = "omni_speech2s_llama"
    speech_encoder_type: str = "whisper"
    speech_projector_type: str = "linear"
    speech_encoder_ds_rate: int = 5
    speech_encoder_hidden_size: int = 1280
    tokenizer_model_max_length: int | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> "LlamaOmniConfig":
        """Tell the two kinds of fields apart."""
        own = SPEECH_FIELDS | {AUDIO_MODEL, "model_type", "architectures"}
        text = {name: value for name, value in config_dict.items() if name not in own}
        speech = {name: value for name, value in config_dict.items() if name in own}
        config = super().from_dict({**speech, TEXT_MODEL: text}, **options)
        assert isinstance(config, LlamaOmniConfig)
        return config


class LlamaOmniProjector(nn.Module):
    """Several encoder positions side by side, then two layers; what is left over is dropped."""

    def __init__(self, config: LlamaOmniConfig) -> None:
        """Lay the projector out."""
        super().__init__()
        text: Any = config.text_config
        self.k = config.speech_encoder_ds_rate
        self.linear1 = nn.Linear(config.speech_encoder_hidden_size * self.k, D_PROJECTOR)
        self.linear2 = nn.Linear(D_PROJECTOR, text.hidden_size)

    def forward(self, hidden: Float[Tensor, "window pos d_audio"]) -> Float[Tensor, "window p d"]:
        """Stack, then project."""
        whole = hidden.shape[1] // self.k
        stacked = hidden[:, : whole * self.k].reshape(len(hidden), whole, -1)
        projected: Tensor = self.linear2(F.relu(self.linear1(stacked)))
        return projected


class LlamaOmniFrontEnd(FrontEnd):
    """Hugging Face's encoder on clips of full length."""

    def __init__(self, config: LlamaOmniConfig, markers: frozenset[int]) -> None:
        """Lay encoder and projector out; ``markers`` are the ids around a clip: there are none."""
        encoder: Any = config.audio_config
        super().__init__(
            AudioTokens(
                placeholder=None,  # its rows are inserted
                markers=markers,
                seconds_per_token=0.02 * config.speech_encoder_ds_rate,
                max_seconds=encoder.max_source_positions / 50,
                text="<speech>",
            )
        )
        self.max_length = config.tokenizer_model_max_length
        self.encoder = AudioEncoder(encoder_config(encoder))
        self.projector = LlamaOmniProjector(config)

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins and frames of a full window: the encoder takes nothing shorter."""
        return self.encoder.window_shape

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: a convolution of stride 2, then whole stacks."""
        return (n_frames + 1) // 2 // self.projector.k

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Features of a recording as one full window, heard to its end, silence included."""
        return whisper_llama.whole_window(waveform, extractor)

    def read_text(
        self,
        x: ALMInput,
        tokens: Int[Tensor, "batch pos"],
        embed: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Embeddings of the text, unchanged.

        Raises:
            InputError: a prompt with speech, without its answer, is longer than the published model
                reads.
        """
        ends = zip(x.spans["sink"], x.spans["readout"], strict=True)
        longest = max((stop[-1][1] - start[0][0] for start, stop in ends if start), default=0)
        if self.max_length is not None and x.clips and longest > self.max_length:
            raise InputError(
                f"running a prompt with speech: it has {longest} positions, expected at most "
                f"{self.max_length}, where the published model cuts it off. Shorten the text."
            )
        return embed

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all clips in one batch."""
        hidden = self.hook_encoder_out(self.encoder(self.hook_encoder_in(windows.features)))
        return self.hook_projector_out(self.projector(self.hook_projector_in(hidden)))

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        speech: Float[Tensor, "clip frame mel"] | None = None,
        speech_lengths: Int[Tensor, "length ..."] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        Every clip is one id -200; rows without audio have none.

        Raises:
            InputError: ids -200, clips and ``speech_lengths`` that differ in number.
        """
        ids, mask = ids_and_mask(input_ids, attention_mask, refused, "speech, speech_lengths")
        n_places = int(((ids == SPEECH) & mask.bool()).sum())
        n_clips = 0 if speech is None else len(speech)
        n_lengths = 0 if speech_lengths is None else speech_lengths.numel()
        if not n_places == n_clips == n_lengths:
            raise InputError(
                f"encoding a prompt with speech: got {n_places} ids {SPEECH}, {n_clips} clips and "
                f"{n_lengths} speech_lengths, expected as many of each."
            )
        if speech is None or speech_lengths is None:
            return self.input_from_features(ids, mask, position_ids, [], ids < 0)
        clips = [
            self.clip(one.T.clone()[None], [n], name=f"clip {i}")
            for i, (one, n) in enumerate(
                zip(speech, speech_lengths.flatten().tolist(), strict=True)
            )
        ]
        ids, mask, heard = whisper_llama.insert_clips(ids, mask, position_ids, clips)
        return self.input_from_features(ids, mask, None, clips, heard.bool())

    def hf_prompt(self, x: ALMInput) -> dict[str, Tensor]:
        """Arguments of a prompt: ids with one place per clip, padded to the longest row."""
        return whisper_llama.prompt_without_audio(x, [SPEECH])

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms, time first, and their frames."""
        features, mask = self.features_and_mask(clips)
        return {"speech": features.transpose(1, 2), "speech_lengths": mask.sum(-1)}


def decoder_config(
    config: LlamaOmniConfig, published: Published, **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for."""
    account_for(
        config,
        {name: value for name, value in published.items() if name in SPEECH_FIELDS},
        handled={
            *("speech_encoder_ds_rate", "speech_encoder_hidden_size"),
            "tokenizer_model_max_length",
        },
        irrelevant={
            "speech_encoder": "the component is asked for",
            "speech_projector_lr": "training only",
            "speech_normalize": "of recordings that are no spectrograms",
            "freeze_speech_projector": "training only",
            "tune_speech_projector": "training only",
            "tune_speech_generator_only": "training only",
            "tokenizer_padding_side": "rows are padded on the left, which changes no real position",
            **dict.fromkeys(
                ("speech_generator_type", "ctc_decoder_config", "ctc_upsample_factor",
                 "ctc_loss_weight", "unit_vocab_size"),
                "speech generation",
            ),
        },
    )  # fmt: skip
    return whisper_llama.decoder_config(config, **identity)


FAMILY = Family(
    name="LLaMA-Omni",
    architectures=("OmniSpeech2SLlamaForCausalLM", "OmniSpeechLlamaForCausalLM"),
    config_class=LlamaOmniConfig,
    decoder_config=decoder_config,
    front_end=LlamaOmniFrontEnd,
    components={AUDIO_MODEL: lambda published, folder: ENCODER},
    rules=(
        *decoders.decoder_rules(r"model\."),
        *whisper_llama.whisper_rules(rf"{AUDIO_MODEL}/"),
        Rename(r"model\.speech_projector\.(linear[12]\..+)", r"audio.projector.\1"),
        Drop(
            r"speech_generator\..+",
            "speech generation: it reads the last hidden states, and nothing of it comes back",
        ),
    ),
    feature_extractor=whisper_llama.feature_extractor,
    chat_template=CHAT_TEMPLATE,
    audio_text="<speech>\n",
    card=Card(
        audio="10/s, every clip filled up to 30 s",
        readout="`\\n\\n` after the assistant's header",
        reference="composed",
        notes="the silence after a clip is heard: 300 positions whatever its length. The encoder "
        f'is `{ENCODER}`, or `components={{"audio_model": folder}}`',
    ),
)
