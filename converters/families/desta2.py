"""DeSTA2: layers of Whisper through a Q-Former, spliced before a transcript; LLaMA decoder.

Source: kehanlu/DeSTA2, ``modeling_desta.py``.
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

TAPS = {
    "openai/whisper-tiny": (0, 1, 2, 3),
    "openai/whisper-small": (2, 5, 8, 11),
    "openai/whisper-medium": (5, 11, 17, 23),
    "openai/whisper-large-v3": (3, 7, 11, 15, 19, 23, 27, 31),
}
"""States of each encoder that are read; 0 is its input, so these are the outputs of layers one
below. The published code meant the layers themselves; its weights were trained on these."""
QFORMER_LAYERS = 2
Places = Sequence[Sequence[int]]
"""Indices of the tokens that clips stand before, per row."""


class Desta2Config(WhisperLlamaConfig):
    """Config of ``config.json``, with the published defaults."""

    model_type = "DestaModel"
    llama_model_id: str = "meta-llama/Meta-Llama-3-8B-Instruct"
    whisper_model_id: str = "openai/whisper-small"
    prompt_size: int = 64


class Desta2Prompts(TranscribedPrompts):
    """Audio is a message of a role of its own, before the user's; one clip a prompt."""

    def _apply_template(self, conversation: Conversation) -> str:
        messages: list[dict[str, Any]] = []
        for message in conversation:
            content = message["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = "".join(item["text"] for item in items if item.get("type") == "text")
            if any(item.get("type") != "text" for item in items):
                messages.append({"role": "audio", "content": CLIP_TEXT})
            if text or isinstance(content, str):
                messages.append({**message, "content": text})
        return super()._apply_template(messages)

    def _tokenise(self, rendered: str, conversation: Conversation) -> list[PromptToken]:
        """Tokens of a prompt, its transcript tokenised in one with the text around it.

        The clip goes in where the published code puts it: it counts the tokens to the left without
        the BOS that the tokenizer adds, and so is one token early.
        """
        transcripts = self.transcripts_of(conversation)
        left, *right = rendered.split(CLIP_TEXT)
        if len(transcripts) != len(right) or len(right) > 1:
            raise InputError(
                f"preparing a prompt for DeSTA2: got {len(transcripts)} clips, and {len(right)} "
                f"places {CLIP_TEXT} in the rendered messages, expected one at most."
            )
        if not right:
            return self._tokens(rendered)
        n_left, n_written = len(left), len(transcripts[0])
        found = []
        for token in self._tokens(left + transcripts[0] + right[0]):
            if token.stop <= n_left:
                found.append(token)
            elif token.start < n_left + n_written:
                found.append(PromptToken(token.id, n_left, n_left, TRANSCRIPT))
            else:  # in the rendered prompt the clip's name stands for the transcript
                start, stop = (at + len(CLIP_TEXT) - n_written for at in token[1:3])
                found.append(PromptToken(token.id, start, stop))
        at = len(self._tokens(left, add_special_tokens=False))
        return [*found[:at], PromptToken(CLIP, n_left, n_left), *found[at:]]


class Desta2FrontEnd(DestaFrontEnd):
    """Clips whose rows are inserted into the prompt."""

    def __init__(self, config: Desta2Config, markers: frozenset[int]) -> None:
        """Lay encoder and connector out; ``markers`` are the ids around a clip: there are none."""
        text: Any = config.text_config
        audio: Any = config.audio_config
        taps = TAPS[config.whisper_model_id]
        connector = QFormerConnector(
            audio,
            d_model=text.hidden_size,
            prompt_size=config.prompt_size,
            n_taps=len(taps),
            n_layers=QFORMER_LAYERS,
        )
        super().__init__(audio, connector, taps, markers=markers)

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        input_features: Float[Tensor, "clip mel frame"] | None = None,
        audio_position: Places | None = None,
        transcript: Sequence[Sequence[tuple[int, int]]] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``.

        The arguments are what the published model's parts hand on to one another.

        Args:
            input_ids: ids with transcripts, without audio.
            attention_mask: 1 at real ids.
            position_ids: None, or the count of real tokens.
            input_features: spectrograms of all clips, in order.
            audio_position: per row, the index among its real tokens that each clip is put before.
                The published code counts the left text without the BOS that is tokenised before
                it, so that audio stands one token too early; give what it gives.
            transcript: per row, which of its real tokens are transcripts, as half-open ranges.
            refused: anything else.
        """
        ids, mask = ids_and_mask(
            input_ids, attention_mask, refused, "input_features, audio_position, transcript"
        )
        clips = self.whole_clips(input_features)
        n_rows = len(ids)
        places = [[] for _ in ids] if audio_position is None else [[*at] for at in audio_position]
        written = [[] for _ in ids] if transcript is None else [[*at] for at in transcript]
        rows = whisper_llama.real_rows(ids, mask, position_ids if clips else None)
        _check(rows, places, written, len(clips))
        sizes = iter(clips)
        insertions = [[(at, next(sizes).n_tokens) for at in row] for row in places]
        if clips:
            ids, mask, heard = whisper_llama.insert_audio(rows, insertions)
            position_ids = None
        else:
            heard = torch.zeros_like(ids)
        flags = torch.zeros_like(ids, dtype=torch.bool)
        for row in range(n_rows):
            kept = ((mask[row] == 1) & (heard[row] == 0)).nonzero().flatten()
            for start, stop in written[row]:
                flags[row, kept[start:stop]] = True
        x = self.input_from_features(ids, mask, position_ids, clips, heard.bool())
        return desta_perception.name_transcripts(x, flags)

    def hf_prompt(self, x: ALMInput) -> dict[str, Any]:
        """Arguments of a prompt: ids without audio, and places of audio and transcripts in them."""
        if not x.clips:
            return {}
        kept = (x.attention_mask.cpu().bool() & ~x.spans.heard).long()
        before = kept.cumsum(-1) - kept  # real tokens to the left of each position
        written = x.spans[TRANSCRIPT]
        return {
            **whisper_llama.prompt_without_audio(x),
            "audio_position": [
                [int(before[row, clip[0][0]]) for clip in places]
                for row, places in enumerate(x.spans.clips)
            ],
            "transcript": [
                [(int(before[row, a]), int(before[row, b - 1]) + 1) for a, b in ranges]
                for row, ranges in enumerate(written)
            ],
        }

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Tensor]:
        """Spectrograms of all clips, as the published ``forward`` takes them."""
        return {"input_features": self.features_and_mask(clips)[0]}


def _check(rows: list[list[int]], places: Any, written: Any, n_clips: int) -> None:
    shapes = len(places) == len(rows) == len(written) and sum(map(len, places)) == n_clips
    inside = shapes and all(
        at == sorted(at) and all(0 <= i <= len(row) for i in at)
        and all(0 <= a < b <= len(row) for a, b in text)
        for row, at, text in zip(rows, places, written, strict=True)
    )  # fmt: skip
    if not inside:
        raise InputError(
            f"encoding a prompt for DeSTA2: got audio_position {places} and transcript {written} "
            f"for {n_clips} clips and rows of {[len(row) for row in rows]} real tokens, expected "
            "per row one ascending index per clip, and ranges inside the row."
        )


def decoder_config(config: Desta2Config, published: Published, **identity: Any) -> HookedALMConfig:
    """Sizes of the decoder, and every other field accounted for.

    Raises:
        ConversionError: a Whisper whose layers the published code does not name, or fields that are
            not accounted for.
    """
    account_for(
        config,
        published,
        handled={"llama_model_id", "whisper_model_id", "prompt_size"},
        irrelevant={
            "llama_config": "the component's own file is read",
            "whisper_config": "the component's own file is read",
        },
    )
    if config.whisper_model_id not in TAPS:
        raise ConversionError(
            f"reading a DeSTA2 config: got whisper_model_id {config.whisper_model_id!r}, expected "
            f"one of {', '.join(TAPS)}: the published code reads layers of these."
        )
    return whisper_llama.decoder_config(config, **identity)


FAMILY = Family(
    name="DeSTA2",
    architectures=("DestaModel",),
    config_class=Desta2Config,
    decoder_config=decoder_config,
    front_end=Desta2FrontEnd,
    components={
        TEXT_MODEL: lambda published, folder: published.get(
            "llama_model_id", Desta2Config.llama_model_id
        ),
        AUDIO_MODEL: lambda published, folder: published.get(
            "whisper_model_id", Desta2Config.whisper_model_id
        ),
    },
    pickled=("qformer_connector.pth", None),
    tokenizer=TEXT_MODEL,
    prompts=Desta2Prompts,
    feature_extractor=whisper_llama.feature_extractor,
    rules=(
        *decoders.decoder_rules(rf"{TEXT_MODEL}/model\.", head=rf"{TEXT_MODEL}/lm_head"),
        *whisper_llama.whisper_rules(rf"{AUDIO_MODEL}/"),
        Rename(r"((?:layer_prompts|layer_weights|qformer|proj)\b.*)", r"audio.connector.\1"),
    ),
    card=Card(
        audio="64 per clip of at most 30 s",
        readout="`\\n\\n` after the assistant's header",
        reference="composed",
        notes=desta_perception.SPEECH_NOTE,
    ),
)
