"""DeSTA2.5-Audio: layers of Whisper through a Q-Former, then a transcript; LLaMA 3.1 decoder.

Source: kehanlu/DeSTA2.5-Audio, ``modeling_desta25.py``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.prompts import CLIP, Conversation, PromptToken

from ..blocks import decoders, desta_perception, whisper_llama
from ..blocks.desta_perception import (
    CLIP_TEXT,
    TRANSCRIPT,
    DestaFrontEnd,
    QFormerConnector,
    TranscribedPrompts,
)
from ..blocks.whisper_llama import AUDIO_MODEL, TEXT_MODEL, WhisperLlamaConfig
from ..family import Card, Family, Published
from ..rules import Rename
from ..strict_config import account_for

LAYERS = {
    "openai/whisper-tiny": (0, 1, 2, 3),
    "openai/whisper-small": (2, 5, 8, 11),
    "openai/whisper-medium": (5, 11, 17, 23),
    "openai/whisper-large-v3": (7, 15, 23, 31),
}
"""Layers whose output is read, by encoder."""


class Desta25Config(WhisperLlamaConfig):
    """Config of ``config.json``, with the published defaults."""

    model_type = "desta25"
    llm_model_id: str = "DeSTA-ntu/Llama-3.1-8B-Instruct"
    encoder_model_id: str = "openai/whisper-large-v3"
    connector_mode: str = "qformer_1"
    qformer_num_hidden_layers: int = 2
    prompt_size: int = 64
    use_lora: bool = False


class Desta25Prompts(TranscribedPrompts):
    """A clip and its transcript between two pieces of text that were made up for them."""

    def _tokenise(self, rendered: str, conversation: Conversation) -> list[PromptToken]:
        transcripts = iter(self.transcripts_of(conversation))
        found: list[PromptToken] = []
        for token in super()._tokenise(rendered, conversation):
            found.append(token)
            if token.id == CLIP:
                text = self._tokens(next(transcripts, ""), add_special_tokens=False)
                found += [PromptToken(t.id, token.stop, token.stop, TRANSCRIPT) for t in text]
        return found


class Desta25FrontEnd(DestaFrontEnd):
    """Clips that overwrite placeholders, each with its transcript behind it."""

    def __init__(self, config: Desta25Config, markers: frozenset[int]) -> None:
        """Lay encoder and connector out; ``markers`` are the ids around a clip: there are none."""
        text: Any = config.text_config
        audio: Any = config.audio_config
        taps = [layer + 1 for layer in LAYERS[config.encoder_model_id]]
        connector = QFormerConnector(
            audio,
            d_model=text.hidden_size,
            prompt_size=config.prompt_size,
            n_taps=len(taps),
            n_layers=config.qformer_num_hidden_layers,
        )
        super().__init__(audio, connector, taps, markers=markers, prepend_bos=False)

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        batch_features: Float[Tensor, "clip mel frame"] | None = None,
        batch_transcription_ids: Sequence[Int[Tensor, "1 _token"]] | None = None,
        batch_start_positions: Sequence[tuple[int, int]] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        The transcripts' ids take their placeholders' places.
        """
        ids, mask = ids_and_mask(
            input_ids,
            attention_mask,
            refused,
            "batch_features, batch_transcription_ids, batch_start_positions",
        )
        clips = self.whole_clips(batch_features)
        texts = [text.flatten().tolist() for text in batch_transcription_ids or ()]
        starts = [(int(row), int(at)) for row, at in batch_start_positions or ()]
        self._check(ids, clips, texts, starts)
        ids = ids.clone()
        heard, written = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
        for clip, text, (row, start) in zip(clips, texts, starts, strict=True):
            stop = start + clip.n_tokens
            heard[row, start:stop] = True
            written[row, stop : stop + len(text)] = True
            ids[row, stop : stop + len(text)] = torch.tensor(text, dtype=ids.dtype)
        x = self.input_from_features(ids, mask, position_ids, clips, heard)
        return desta_perception.name_transcripts(x, written)

    def _check(
        self,
        ids: Int[Tensor, "batch pos"],
        clips: list[AudioClip],
        texts: list[list[int]],
        starts: list[tuple[int, int]],
    ) -> None:
        n_rows, width = ids.shape
        fits = len(clips) == len(texts) == len(starts) and starts == sorted(starts)
        if not fits or any(
            not 0 <= row < n_rows or not 0 <= at <= width - clip.n_tokens - len(text)
            for clip, text, (row, at) in zip(clips, texts, starts, strict=True)
        ):
            raise InputError(
                f"encoding a prompt for DeSTA2.5-Audio: got {len(clips)} clips, "
                f"{len(texts)} transcripts and the starts {starts} in {n_rows} rows of {width} "
                "tokens, expected as many of each, starts ascending, with room for the clip and "
                "its transcript behind them."
            )

    def hf_prompt(self, x: ALMInput) -> dict[str, Any]:
        """Arguments that say where clips begin, and the transcripts behind them."""
        if not x.clips:
            return {}
        starts, texts = [], []
        for row, places in enumerate(x.spans.clips):
            behind = dict(x.spans[TRANSCRIPT][row])
            for clip in places:
                stop = clip[-1][1]
                starts.append((row, clip[0][0]))
                texts.append(x.tokens[row : row + 1, stop : behind.get(stop, stop)])
        return {"batch_start_positions": starts, "batch_transcription_ids": texts}

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms of all clips, as the published ``forward`` takes them."""
        return {"batch_features": self.features_and_mask(clips)[0]}


def decoder_config(config: Desta25Config, published: Published, **identity: Any) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for.

    Raises:
        ConversionError: a Whisper whose layers the published code does not name, or fields that are
            not accounted for.
    """
    account_for(
        config,
        published,
        handled={
            *("llm_model_id", "encoder_model_id", "prompt_size", "qformer_num_hidden_layers"),
        },
        irrelevant={
            "audio_locator": "stands for a clip in a chat message",
            "placeholder_token": "its embedding is always overwritten",
            "llm_config": "the component's own file is read",
            "encoder_config": "the component's own file is read",
            "target_layer_ids": "the published code sets them by the encoder's name",
        },
    )
    if config.encoder_model_id not in LAYERS:
        raise ConversionError(
            f"reading a DeSTA2.5-Audio config: got encoder_model_id {config.encoder_model_id!r}, "
            f"expected one of {', '.join(LAYERS)}: the published code reads layers of these."
        )
    return whisper_llama.decoder_config(config, **identity)


FAMILY = Family(
    name="DeSTA2.5-Audio",
    architectures=("DeSTA25AudioModel",),
    config_class=Desta25Config,
    decoder_config=decoder_config,
    front_end=Desta25FrontEnd,
    components={
        TEXT_MODEL: lambda published, folder: published.get(
            "llm_model_id", Desta25Config.llm_model_id
        ),
        AUDIO_MODEL: lambda published, folder: published.get(
            "encoder_model_id", Desta25Config.encoder_model_id
        ),
    },
    tokenizer=TEXT_MODEL,
    prompts=Desta25Prompts,
    audio_text=f"<start_audio>{CLIP_TEXT}<end_audio>\n",
    feature_extractor=whisper_llama.feature_extractor,
    rules=(
        *decoders.decoder_rules(rf"{TEXT_MODEL}/model\.", head=rf"{TEXT_MODEL}/lm_head"),
        *whisper_llama.whisper_rules(rf"{AUDIO_MODEL}/"),
        Rename(r"perception\.connector\.(.+)", r"audio.connector.\1"),
    ),
    card=Card(
        audio="64 per clip of at most 30 s",
        readout="`\\n\\n` after the assistant's header",
        reference="composed",
        notes=desta_perception.SPEECH_NOTE,
    ),
)
