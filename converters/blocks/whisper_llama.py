"""Parts of families that put Whisper's encoder before a LLaMA of its own checkpoint.

Source: transformers 5.23 ``WhisperEncoder``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, WhisperConfig, WhisperFeatureExtractor

from hooked_alm.audio import Waveform
from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.inputs import ALMInput, AudioClip, positions_from_mask

from ..rules import Drop, Rule
from ..strict_config import account_for
from . import decoders
from .whisper_encoder import encoder_rules

TEXT_MODEL, AUDIO_MODEL = "text_model", "audio_model"
"""Names of the two components."""
FILLER = 0
"""Id at positions that no token stands for: their embeddings come from a clip."""
SPEECH = -200
"""Id that stands for a clip in ``input_ids`` where published code joins embeddings."""
Insertions = Sequence[tuple[int, int]]
"""Pairs of a token's index in a row and the audio positions that go before it; ascending."""


class WhisperLlamaConfig(PreTrainedConfig):
    """Config of a model whose parts have config files of their own, or an entry in its file."""

    sub_configs_defaults: ClassVar = {"audio_config": WhisperConfig, "text_config": LlamaConfig}
    audio_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> "WhisperLlamaConfig":
        """Take the components' files for the parts; ``parts`` keeps them as they are written.

        Raises:
            ConversionError: a part that is no Whisper, or no LLaMA.
        """
        names = {TEXT_MODEL: "text_config", AUDIO_MODEL: "audio_config"}
        given = {names.get(name, name): value for name, value in config_dict.items()}
        parts = {name: dict(given.get(name) or {}) for name in names.values()}
        for (name, part), expected in zip(parts.items(), ("llama", "whisper"), strict=True):
            if part.get("model_type", expected) != expected:
                raise ConversionError(
                    f"reading the {name} of a {cls.model_type} model: got model_type "
                    f"{part['model_type']!r}, expected {expected!r}. Others are not supported in "
                    "this place."
                )
        known = {one.name for one in fields(cls)}
        own = {name: value for name, value in {**given, **parts}.items() if name in known}
        config: WhisperLlamaConfig = super().from_dict(own, **options)
        config.parts = parts
        return config


def decoder_config(config: WhisperLlamaConfig, **identity: Any) -> HookedALMConfig:
    """Sizes of the LLaMA; every field of both parts' files is accounted for."""
    account_for_whisper(config.audio_config, config.parts["audio_config"])
    text: Any = config.text_config
    return decoders.decoder_config(
        text,
        config.parts["text_config"],
        qkv_bias=False,
        qk_norm=False,
        tie_word_embeddings=text.tie_word_embeddings,
        **identity,
    )


def account_for_whisper(config: Any, published: Mapping[str, Any]) -> None:
    """Account for the config of a Whisper checkpoint of which only the encoder is used.

    Raises:
        ConversionError: fields that are unknown, or known but not at a default.
    """
    account_for(
        config,
        published,
        handled={*type(config)().to_dict(), *config.attribute_map},
        irrelevant={"forced_decoder_ids": "generation of transcripts"},
    )


def whisper_rules(prefix: str) -> list[Rule]:
    """Rules for a Whisper checkpoint, of which only the encoder is heard.

    Args:
        prefix: regular expression, without groups, for what precedes ``model.``.
    """
    return [
        *encoder_rules(prefix + r"(?:model\.)?encoder\."),
        Drop(
            prefix + r"(?:(?:model\.)?decoder\..+|proj_out\.weight)",
            "Whisper's decoder writes transcripts; nothing of it enters the language model",
        ),
    ]


def feature_extractor(config: Any) -> WhisperFeatureExtractor:
    """Whisper's feature extractor, which the encoder's sizes fix."""
    encoder = getattr(config, "audio_config", config)
    return WhisperFeatureExtractor(
        feature_size=encoder.num_mel_bins, chunk_length=encoder.max_source_positions // 50
    )


def whole_window(
    waveform: Waveform, extractor: WhisperFeatureExtractor
) -> tuple[Float[Tensor, "1 mel frame"], list[int]]:
    """Features of a recording as one window of full length, all of it heard: silence counts."""
    extracted = extractor(
        waveform.samples, sampling_rate=waveform.sampling_rate, return_tensors="pt"
    )
    features = extracted["input_features"]
    return features, [features.shape[-1]]


def real_rows(
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    position_ids: Int[Tensor, "batch pos"] | None,
) -> list[list[int]]:
    """The tokens of each row that are not padding.

    Raises:
        InputError: positions other than the count of real tokens, which audio positions would
            have no place in.
    """
    if position_ids is not None and not torch.equal(position_ids, positions_from_mask(mask)):
        raise InputError(
            "encoding a prompt that audio is inserted into: got position_ids of its own, expected "
            "none or the count of real tokens. Positions are counted again after the insertion; "
            "leave them out."
        )
    return [row[real].tolist() for row, real in zip(ids.cpu(), mask.bool().cpu(), strict=True)]


def insert_audio(
    rows: Sequence[Sequence[int]], places: Sequence[Insertions]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows with audio positions put in, padded on the left: ids, mask, and 1 where audio is."""
    ids, heard = [], []
    for row, places_of_row in zip(rows, places, strict=True):
        new, is_audio, at = [], [], 0
        for index, n in (*places_of_row, (len(row), 0)):
            new += [*row[at:index], *[FILLER] * n]
            is_audio += [0] * (index - at) + [1] * n
            at = index
        ids.append(new)
        heard.append(is_audio)
    real = [[1] * len(row) for row in ids]
    return pad_left(ids), pad_left(real), pad_left(heard)


def insert_clips(
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    position_ids: Int[Tensor, "batch pos"] | None,
    clips: Sequence[AudioClip],
) -> tuple[Int[Tensor, "batch _"], Int[Tensor, "batch _"], Int[Tensor, "batch _"]]:
    """Rows with a clip in place of every ``SPEECH``, in order; see ``insert_audio``."""
    rows, rest = real_rows(ids, mask, position_ids), iter(clips)
    places = [
        # Among the other tokens, of which there are as many fewer as clips came before.
        [(at - n_before, next(rest).n_tokens) for n_before, at in enumerate(_speech(row))]
        for row in rows
    ]
    return insert_audio([[i for i in row if i != SPEECH] for row in rows], places)


def _speech(row: Sequence[int]) -> list[int]:
    return [at for at, i in enumerate(row) if i == SPEECH]


def prompt_without_audio(x: ALMInput, instead: Sequence[int] = ()) -> dict[str, Tensor]:
    """Ids, mask and positions of ``without_audio``."""
    rows = without_audio(x, instead)
    mask = pad_left([[1] * len(row) for row in rows])
    return {
        "input_ids": pad_left(rows),
        "attention_mask": mask,
        "position_ids": positions_from_mask(mask),
    }


def without_audio(x: ALMInput, instead: Sequence[int] = ()) -> list[list[int]]:
    """The real tokens of each row, with ``instead`` in place of a clip: undoes ``insert_audio``."""
    rows = []
    for row, (ids, mask) in enumerate(
        zip(x.tokens.tolist(), x.attention_mask.tolist(), strict=True)
    ):
        starts = {clip[0][0] for clip in x.spans.clips[row]} if x.spans.clips else set()
        kept: list[int] = []
        for pos, token in enumerate(ids):
            if pos in starts:
                kept += instead
            if mask[pos] and not x.spans.heard[row, pos]:
                kept.append(token)
        rows.append(kept)
    return rows


def pad_left(rows: Sequence[Sequence[int]]) -> Int[Tensor, "batch pos"]:
    """Rows of unequal length, filled up on the left."""
    width = max(map(len, rows))
    return torch.tensor([[FILLER] * (width - len(row)) + [*row] for row in rows])
