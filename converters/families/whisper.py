"""Whisper: an encoder, and a decoder that reads what it heard by cross-attention.

Source: transformers 5.23 ``WhisperForConditionalGeneration``.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from hooked_alm.audio import AudioSource, read_audio
from hooked_alm.config import HookedALMConfig
from hooked_alm.encoder import AudioEncoder
from hooked_alm.errors import InputError, nearest
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip, check_memory, ids_and_mask
from hooked_alm.prompts import AnswerPrefix, Conversation, PromptBuilder, PromptRow, Segments
from hooked_alm.spans import AudioTokens

from ..blocks.whisper_encoder import decoder_rules, encoder_config, encoder_rules
from ..family import Card, Family
from ..rules import Rename
from ..strict_config import account_for

SECONDS_PER_STATE = 0.02
"""Two frames of 10 ms: the second convolution halves the rate."""
START, PREVIOUS = "<|startoftranscript|>", "<|startofprev|>"
NO_TIMESTAMPS = "<|notimestamps|>"
TASKS = ("transcribe", "translate")
MULTILINGUAL = 51865
"""Number of tokens from which on OpenAI takes a checkpoint for a multilingual one."""


class WhisperFrontEnd(FrontEnd):
    """The encoder, whose states are the decoder's memory; nothing is projected or merged.

    A window is always full: what pads it is heard as silence, and attended to like everything.
    """

    is_memory = True
    argument_prefix = "decoder_"

    def __init__(self, config: WhisperConfig, markers: frozenset[int]) -> None:
        """Lay the encoder out; no token marks a clip."""
        super().__init__(
            AudioTokens(
                placeholder=None,
                markers=markers,
                seconds_per_token=SECONDS_PER_STATE,
                max_seconds=config.max_source_positions * SECONDS_PER_STATE,
            )
        )
        self.encoder = AudioEncoder(encoder_config(config))

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins, and two frames per encoder position."""
        return self.encoder.window_shape

    def n_tokens(self, n_frames: int) -> int:
        """All positions of the memory, however short the clip."""
        return self.encoder.cfg.n_ctx

    def unfireable(self, name: str) -> str | None:
        """There is no projector."""
        if name.startswith("audio.hook_projector"):
            return "the encoder's states are read as they are; use audio.hook_encoder_out"
        return None

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all clips in one batch, as Hugging Face does."""
        features = self.hook_encoder_in(windows.features)
        if features.shape[-1] > self.feature_shape[1]:
            raise InputError(
                f"hearing {features.shape[-1]} frames of 10 ms at once: the encoder takes "
                f"{self.feature_shape[1]}. Recordings that were prepared with long_form=True are "
                "for `generate`, which hears them piece by piece; cut this one with truncate=True."
            )
        return self.hook_encoder_out(self.encoder(features))

    def input_from_hf(
        self,
        *,
        decoder_input_ids: Int[Tensor, "batch pos"] | None = None,
        decoder_attention_mask: Int[Tensor, "batch pos"] | None = None,
        decoder_position_ids: Any = None,
        input_features: Any = None,
        attention_mask: Any = None,
        encoder_outputs: Any = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        ``attention_mask`` says which frames are no padding; the published model ignores it, and
        here spans follow it. ``encoder_outputs`` are taken in the place of features.
        """
        ids, mask = ids_and_mask(
            decoder_input_ids, decoder_attention_mask, refused,
            "input_features, attention_mask, encoder_outputs", prefix=self.argument_prefix,
        )  # fmt: skip
        clips: list[AudioClip] = []
        given = {"input_features": input_features, "attention_mask": attention_mask,
                 "decoder_position_ids": decoder_position_ids}  # fmt: skip
        if wrong := [k for k, v in given.items() if not isinstance(v, Tensor | None)]:
            raise InputError(
                f"encoding a processor's output: {', '.join(wrong)} came as no tensor. Ask the "
                "processor for return_tensors='pt'."
            )
        if input_features is not None:
            n_mels, n_frames = self.feature_shape
            if (
                input_features.ndim != 3
                or input_features.shape[1] != n_mels
                or (input_features.shape[2] < n_frames)
            ):
                raise InputError(
                    f"encoding a processor's output: got input_features "
                    f"{list(input_features.shape)}, expected [batch, mel {n_mels}, frame "
                    f"{n_frames}]. Take the checkpoint's own feature extractor, which pads."
                )
            frames = attention_mask
            if frames is None:
                frames = torch.ones(input_features.shape[::2], dtype=torch.long)
            if frames.shape != input_features.shape[::2]:
                raise InputError(
                    f"encoding a processor's output: got an attention_mask {list(frames.shape)}, "
                    f"expected [batch, frame], {list(input_features.shape[::2])}."
                )
            clips = self.clips_of(input_features, frames)
        if clips and len(clips) != len(ids):
            raise InputError(
                f"encoding a processor's output: got {len(clips)} spectrograms for {len(ids)} "
                "prompts. Give one for each: the decoder reads no more."
            )
        memory = encoder_outputs
        if memory is not None and not isinstance(memory, Tensor):
            memory = next(iter(memory[:1]), None)  # of a tuple, or of what an encoder returns
            check_memory(memory, len(ids))
        return self.input_from_features(ids, mask, decoder_position_ids, clips, memory=memory)

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms."""
        return {"input_features": self.features_and_mask(clips)[0]}


class WhisperPrompts(PromptBuilder):
    """Control tokens: ``<|startoftranscript|>``, language, task, and whether times are wanted.

    ``text`` is what was said before, which a prompt may begin with, and ``answer_prefix`` the
    beginning of the transcript. Both are ``text``, and apart the spans ``previous`` and
    ``transcript``.
    """

    options = frozenset({"language", "task", "timestamps", "long_form"})

    def build(
        self,
        conversations: Sequence[Conversation],
        segments: Sequence[Segments | None],
        answer_prefix: AnswerPrefix,
        truncate: bool,
        model: Any,
        *,
        language: Any = None,
        task: Any = None,
        timestamps: Any = False,
        long_form: Any = False,
        **options: Any,
    ) -> ALMInput:
        """Left-padded rows, one per conversation.

        Args:
            conversations: a user's message each, of one clip and, or not, what was said before.
            segments: refused.
            answer_prefix: beginning of the transcript.
            truncate: whether over-long audio is cut.
            model: asked which language is spoken, where none is given.
            language: code or English name, for all rows or one for each; None is that of the
                generation config or, without one, what the model hears in each clip.
            task: "transcribe" or "translate" (into English); None is the generation config's, or
                "transcribe".
            timestamps: leave ``<|notimestamps|>`` out, so that times are predicted.
            long_form: keep recordings that are longer than a window whole, for ``generate`` alone,
                with timestamps.
            options: none.

        Raises:
            InputError: rows with another number of clips than one; a language or a task that the
                checkpoint does not have; or named segments.
        """
        if any(segments) or not isinstance(answer_prefix, str | None):
            raise InputError(
                "naming segments of a prompt for Whisper: it takes no instruction. Its spans "
                "'previous' and 'transcript' tell `text` and `answer_prefix` apart."
            )
        for name, value in (("timestamps", timestamps), ("long_form", long_form)):
            if not isinstance(value, bool):
                raise InputError(
                    f"preparing prompts with {name}={value!r}: expected True or False for all."
                )
        if long_form and truncate:
            raise InputError("preparing a prompt: give long_form or truncate, not both.")
        if not self._is_multilingual(model) and (language, task) != (None, None):
            raise InputError(
                f"preparing a prompt with language={language!r}, task={task!r}: this Whisper knows "
                "English alone, and transcribes. Leave them out, or take a multilingual one."
            )
        # Before anything is heard.
        codes = self._codes(language, len(conversations), model)
        task_ids = self._task_ids(task, model)
        read = self._read_whole if long_form else partial(self.read_clip, truncate=truncate)
        clips = self._read_clips(conversations, read)
        rows = [_one_clip(row, i) for i, row in enumerate(clips)]
        if codes is None:
            codes = self._detected(rows, model)
        ends = [] if timestamps or long_form else [self._id(NO_TIMESTAMPS)]
        prompts = []
        for conversation, clip, code in zip(conversations, rows, codes, strict=True):
            start = [self._id(START), *([self._id(f"<|{code}|>")] if code else []), *task_ids]
            prompts.append(self._row(_said(conversation), start + ends, answer_prefix or "", clip))
        return self._batch(prompts)

    def _read_whole(self, source: AudioSource) -> AudioClip:
        """A clip, or a recording that is longer than one and will be heard in pieces."""
        extractor = self.feature_extractor
        waveform = read_audio(source, sampling_rate=extractor.sampling_rate, max_seconds=None)
        longest = self.front_end.tokens.max_seconds
        assert longest is not None
        if waveform.seconds <= longest:
            return self.read_clip(source)
        extracted = extractor(
            [waveform.samples], sampling_rate=waveform.sampling_rate, truncation=False,
            padding="longest", return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        n_frames = int(extracted["attention_mask"].sum())
        return self.front_end.clip(
            extracted["input_features"], [n_frames], name=waveform.name, seconds=waveform.seconds,
            notes=waveform.notes,
        )  # fmt: skip

    def _row(self, said: str, start: list[int], transcript: str, clip: AudioClip) -> PromptRow:
        before = self._ids(f" {said.strip()}") if said else []
        after = self._ids(transcript)
        mark = [self._id(PREVIOUS)] if before else []
        parts = {"previous": before, "transcript": after}
        ids = [*mark, *before, *start, *after]
        at = {"previous": len(mark), "transcript": len(ids) - len(after)}
        segments = {
            name: [at[name] <= i < at[name] + len(part) for i in range(len(ids))]
            for name, part in parts.items()
            if part
        }
        return PromptRow(
            ids=ids,
            is_audio=[False] * len(ids),
            is_text=[any(flags) for flags in zip(*segments.values(), strict=True)]
            or [False] * len(ids),
            segments=segments,
            clips=[clip],
        )

    def _ids(self, text: str) -> list[int]:
        """Tokens of words."""
        if not text:
            return []
        found = [token.id for token in self._tokens(text, add_special_tokens=False)]
        if controls := sorted({*found} & self.front_end.special_ids):
            raise InputError(
                f"preparing a prompt with {text[:40]!r}: it holds the control tokens "
                f"{self.tokenizer.convert_ids_to_tokens(controls)}, which `language`, `task` and "
                "`timestamps` set. Give words."
            )
        return found

    def _id(self, token: str) -> int:
        found: int | None = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise InputError(
                f"preparing a prompt: the tokenizer has no {token}, which Whisper's prompts are "
                "made of. Take the files that the checkpoint came with."
            )
        return found

    @staticmethod
    def _is_multilingual(model: Any) -> bool:
        declared = getattr(model.generation_config, "is_multilingual", None)
        return model.cfg.d_vocab >= MULTILINGUAL if declared is None else bool(declared)

    def _languages(self, model: Any) -> Mapping[str, int]:
        """Ids of the languages that the checkpoint knows, by code."""
        ids = getattr(model.generation_config, "lang_to_id", None)
        if ids is None:
            known, own = self.tokenizer.get_vocab(), TO_LANGUAGE_CODE.values()
            ids = {f"<|{code}|>": known[f"<|{code}|>"] for code in own if f"<|{code}|>" in known}
        return {token.strip("<|>"): id_ for token, id_ in ids.items()}

    def _codes(self, language: Any, n_rows: int, model: Any) -> list[str | None] | None:
        """The language of every row; None where it is to be heard."""
        if not self._is_multilingual(model):
            return [None] * n_rows
        if language is None:
            language = getattr(model.generation_config, "language", None)
        if language is None:
            return None
        if not isinstance(language, str | list | tuple):
            raise InputError(
                f"preparing a prompt with language={language!r}: expected a code, an English name, "
                "or a list of one for each row."
            )
        names = [language] * n_rows if isinstance(language, str) else [*language]
        if len(names) != n_rows:
            raise InputError(
                f"preparing {n_rows} prompts: got {len(names)} languages. Give one for all, or one "
                "for each."
            )
        known = self._languages(model)
        codes: list[str | None] = []
        for name in names:
            plain = str(name).lower().strip("<|>")
            code = TO_LANGUAGE_CODE.get(plain, plain)
            if code not in known:
                close = nearest(plain, [*known, *TO_LANGUAGE_CODE])
                raise InputError(
                    f"preparing a prompt with language={name!r}: expected one of the {len(known)} "
                    f"that the checkpoint knows, by code or English name. Nearest: {close}."
                )
            codes.append(code)
        return codes

    def _task_ids(self, task: Any, model: Any) -> list[int]:
        if not self._is_multilingual(model):
            return []
        if task is None:
            task = getattr(model.generation_config, "task", None) or TASKS[0]
        if task not in TASKS:
            raise InputError(
                f"preparing a prompt with task={task!r}: expected one of {', '.join(TASKS)}."
            )
        return [self._id(f"<|{task}|>")]

    @torch.no_grad()
    def _detected(self, clips: Sequence[AudioClip], model: Any) -> list[str | None]:
        """The likeliest language of every clip, behind ``<|startoftranscript|>`` alone."""
        _, n_frames = self.front_end.feature_shape
        heard = [
            self.front_end.clip(clip.features[..., :n_frames], [min(clip.n_frames[0], n_frames)])
            if clip.features.shape[-1] > n_frames
            else clip
            for clip in clips
        ]
        ids = torch.full((len(clips), 1), self._id(START))
        asked = self.front_end.input_from_features(ids, torch.ones_like(ids), None, heard)
        known = self._languages(model)
        logits = model(asked.to(model.cfg.device))[:, -1, [*known.values()]]
        codes = [*known]
        return [codes[i] for i in logits.argmax(-1).tolist()]


def _one_clip(clips: list[AudioClip], row: int) -> AudioClip:
    if len(clips) != 1:
        raise InputError(
            f"preparing a prompt for Whisper: row {row} has {len(clips)} clips, expected one. "
            "Several are several rows; a list is one item per row."
        )
    return clips[0]


def _said(conversation: Conversation) -> str:
    """What was said before, which is all the text that a message may have."""
    if [message.get("role") for message in conversation] != ["user"]:
        raise InputError(
            "preparing a prompt for Whisper: expected one message of the user's, with a clip. It "
            "is no chat model."
        )
    content = conversation[0]["content"]
    texts = [content]
    if not isinstance(content, str):
        texts = [item.get("text") for item in content if item.get("type") == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"preparing a prompt for Whisper: got {texts} as text, expected words.")
    return "".join(texts)


_HANDLED = frozenset({
    "vocab_size", "num_mel_bins", "encoder_layers", "encoder_attention_heads", "decoder_layers",
    "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "d_model",
    "max_source_positions", "max_target_positions", "activation_function", "tie_word_embeddings",
})  # fmt: skip
_IRRELEVANT = {
    "num_hidden_layers": "the encoder's layers once more",
    "hidden_size": "d_model once more",
    "num_attention_heads": "the encoder's heads once more",
    "scale_embedding": "computed by Hugging Face's class and not used",
    "init_std": "training only",
    "forced_decoder_ids": "generation",
    "begin_suppress_tokens": "generation",
    "median_filter_width": "generation",
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "dropout"), "training only"),
    **dict.fromkeys(("activation_dropout", "apply_spec_augment"), "training only"),
    **dict.fromkeys(("mask_time_prob", "mask_time_length", "mask_time_min_masks"), "training only"),
    **dict.fromkeys(("mask_feature_prob", "mask_feature_length"), "training only"),
    "mask_feature_min_masks": "training only",
    **dict.fromkeys(("use_weighted_layer_sum", "classifier_proj_size"), "classification only"),
}


def decoder_config(
    config: WhisperConfig, published: dict[str, Any], **identity: Any
) -> HookedALMConfig:
    """Sizes of the decoder, whose layers and heads need not be as many as the encoder's."""
    account_for(config, published, handled=_HANDLED, irrelevant=_IRRELEVANT)
    n_heads = config.decoder_attention_heads
    return HookedALMConfig(
        n_layers=config.decoder_layers,
        d_model=config.d_model,
        n_heads=n_heads,
        n_key_value_heads=n_heads,
        d_head=config.d_model // n_heads,
        d_mlp=config.decoder_ffn_dim,
        d_vocab=config.vocab_size,
        n_ctx=config.max_target_positions,
        eps=1e-5,  # PyTorch's own; the config has none
        act_fn=config.activation_function,
        attn_bias="qvo",
        qk_norm=False,
        mlp_bias=True,
        gated_mlp=False,
        normalization_type="LN",
        final_rms=False,
        positional_embedding_type="standard",
        scales_queries=True,
        softmax_in_float32=False,
        cross_attention=True,
        rope_parameters={},
        layer_types=("full_attention",) * config.decoder_layers,
        sliding_window=None,
        tie_word_embeddings=config.tie_word_embeddings,
        **identity,
    )


FAMILY = Family(
    name="Whisper",
    architectures=("WhisperForConditionalGeneration",),
    config_class=WhisperConfig,
    decoder_config=decoder_config,
    front_end=WhisperFrontEnd,
    rules=(
        *encoder_rules(r"(?:model\.)?encoder\."),
        *decoder_rules(r"(?:model\.)?decoder\."),
        Rename(r"proj_out\.weight", "unembed.weight"),
    ),
    card=Card(
        audio="50/s, at most 30 s at a time; read by cross-attention",
        readout="the last control token, or the last of the transcript so far",
        notes="`prepare` takes `language`, `task`, `timestamps` and `long_form`; `generate` is "
        "Hugging Face's for Whisper",
    ),
    chat_template="",  # prompts are control tokens
    prompts=WhisperPrompts,
)
