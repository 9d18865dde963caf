"""Parts of DeSTA2 and DeSTA2.5-Audio: layers of Whisper, read by a Q-Former with 64 queries.

Source: kehanlu/DeSTA2 ``modeling_desta.py``, kehanlu/DeSTA2.5-Audio ``modeling_desta25.py``.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import BertConfig, WhisperConfig
from transformers.models.bert.modeling_bert import BertEncoder

from hooked_alm.audio import Waveform
from hooked_alm.encoder import AudioEncoder
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.frontend import FrontEnd, Windows
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.points import ENCODER
from hooked_alm.prompts import Conversation, PromptBuilder
from hooked_alm.spans import AudioTokens, as_ranges

from . import whisper_llama
from .whisper_encoder import encoder_config

TRANSCRIPT = "transcript"
"""Name of the span of what Whisper wrote down."""
SPEECH_NOTE = (
    "64 positions per clip, without a time axis; the language model also reads a transcript of it, "
    "which is given with the clip (span `transcript`, counted as `audio_struct`): any claim about "
    "hearing has to ablate it. The published code hears in float32 whatever the language model's "
    "dtype; here both have one"
)


CLIP_TEXT = "<|AUDIO|>"
"""Text that stands for a clip in a rendered prompt."""


class QFormerConnector(nn.Module):
    """Queries of every tapped layer attend to it; a weighted sum over layers is projected."""

    def __init__(
        self, encoder: WhisperConfig, *, d_model: int, prompt_size: int, n_taps: int, n_layers: int
    ) -> None:
        """Lay the connector out.

        Args:
            encoder: sizes of Whisper.
            d_model: width of the language model.
            prompt_size: queries per layer, which is positions per clip.
            n_taps: layers of Whisper that are read.
            n_layers: number of layers of the Q-Former.
        """
        super().__init__()
        config = BertConfig(
            num_hidden_layers=n_layers,
            num_attention_heads=encoder.encoder_attention_heads,
            hidden_size=encoder.d_model,
            add_cross_attention=True,
            is_decoder=True,
        )
        # The queries see each other both ways, as in the published code. transformers' fused
        # attention would take `is_decoder` for causal.
        config._attn_implementation = "eager"
        self.layer_prompts = nn.ParameterList(
            torch.empty(1, prompt_size, encoder.d_model) for _ in range(n_taps)
        )
        self.layer_weights = nn.Parameter(torch.empty(prompt_size, n_taps))
        self.qformer = BertEncoder(config)
        self.proj = nn.Sequential(
            nn.LayerNorm(encoder.d_model), nn.Linear(encoder.d_model, d_model)
        )

    def read(
        self, states: Sequence[Float[Tensor, "window pos d_audio"]]
    ) -> Float[Tensor, "window query d_audio"]:
        """Answers of the queries, a weighted sum over the layers read, before the projection."""
        found = [
            self.qformer(
                prompt.expand(len(state), -1, -1), encoder_hidden_states=state
            ).last_hidden_state
            for prompt, state in zip(self.layer_prompts, states, strict=True)
        ]
        weights = self.layer_weights.softmax(dim=-1).unsqueeze(-1)
        return (torch.stack(found).permute(1, 2, 0, 3) * weights).sum(dim=2)


class DestaFrontEnd(FrontEnd):
    """Whisper without its final norm, and the connector.

    ``audio.hook_encoder_out`` has the tapped layers one after the other, ``[window, tap x frame,
    d_audio]``, ``audio.hook_projector_in`` what the queries found.
    """

    def __init__(
        self, encoder: Any, connector: QFormerConnector, taps: Sequence[int], **tokens: Any
    ) -> None:
        """Take the connector.

        Args:
            encoder: config of Whisper.
            connector: made for as many taps.
            taps: states of the encoder, ascending; 0 is what enters the first layer.
            tokens: further fields of ``AudioTokens``.

        Raises:
            ConversionError: the encoder has too few layers.
        """
        super().__init__(
            AudioTokens(
                placeholder=None,
                text=CLIP_TEXT,
                seconds_per_token=None,
                max_seconds=encoder.max_source_positions / 50,
                **tokens,
            )
        )
        if taps[-1] > encoder.encoder_layers:
            raise ConversionError(
                f"reading the layers {list(taps)} of Whisper (0 is its input): it has "
                f"{encoder.encoder_layers}. Is the audio_model the one that the config names?"
            )
        self.taps = tuple(taps)
        self.encoder = AudioEncoder(encoder_config(encoder))
        self.connector = connector

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Mel bins and frames of a full window: the encoder takes nothing shorter."""
        return self.encoder.window_shape

    def unfireable(self, name: str) -> str | None:
        """Points behind the last layer that is read: nothing runs there."""
        behind = f"{ENCODER}blocks."
        layer = int(name.removeprefix(behind).split(".")[0]) if name.startswith(behind) else -1
        if layer < self.taps[-1] and not name.startswith(f"{ENCODER}ln_final"):
            return None
        return f"the connector reads the encoder's blocks below {self.taps[-1]}, without a norm"

    def n_tokens(self, n_frames: int) -> int:
        """Audio positions: one per query, whatever the duration."""
        return len(self.connector.layer_weights)

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Features of a recording as one full window, heard to its end, silence included."""
        return whisper_llama.whole_window(waveform, extractor)

    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Encode all clips in one batch, no further than the last layer that is read."""
        states = self.encoder.states(self.hook_encoder_in(windows.features))
        upto = list(islice(states, self.taps[-1] + 1))
        tapped = self.hook_encoder_out(torch.cat([upto[tap] for tap in self.taps], dim=1))
        # Back into the encoder's layout in memory, by which bfloat16 products round.
        layers = [state.mT.contiguous().mT for state in tapped.chunk(len(self.taps), dim=1)]
        found = self.hook_projector_in(self.connector.read(layers))
        return self.hook_projector_out(self.connector.proj(found))

    def whole_clips(self, features: Float[Tensor, "clip mel frame"] | None) -> list[AudioClip]:
        """Clips of one full window each."""
        return [
            self.clip(one.clone()[None], [one.shape[-1]], name=f"clip {i}")
            for i, one in enumerate(() if features is None else features)
        ]


class TranscribedPrompts(PromptBuilder):
    """Prompts in which every clip comes with its transcript.

    An audio item of a message names it: ``{"type": "audio", "audio": clip, "transcript": "..."}``.
    The published models write it with Whisper themselves, DeSTA2.5-Audio a space where nobody
    speaks.
    """

    def build(self, conversations: Sequence[Conversation], *options: Any, **more: Any) -> ALMInput:
        """Name the transcripts apart from the instruction."""
        x = super().build(conversations, *options, **more)
        nowhere = torch.zeros(x.shape, dtype=torch.bool)
        written = x.spans.mask(TRANSCRIPT) if TRANSCRIPT in x.spans else nowhere
        return name_transcripts(x, written)

    def transcripts_of(self, conversation: Conversation) -> list[str]:
        """The transcripts of a conversation's clips, in order.

        Raises:
            InputError: a clip comes without.
        """
        items = [
            item
            for message in conversation
            if not isinstance(message["content"], str)
            for item in message["content"]
            if item.get("type") in ("audio", "audio_url")
        ]
        if any(not isinstance(item.get("transcript"), str) for item in items):
            raise InputError(
                "preparing a prompt with audio: a clip comes without a transcript, and the "
                "language model reads one. Give a conversation whose audio items name it: "
                '{"type": "audio", "audio": clip, "transcript": "..."}; what Whisper writes is '
                "what the published model reads."
            )
        return [item["transcript"] for item in items]


def name_transcripts(x: ALMInput, written: Bool[Tensor, "batch pos"]) -> ALMInput:
    """An input with a span for its transcripts added.

    They are neither the instruction nor what is heard, so they count as ``audio_struct``.
    """
    spans = x.spans
    written = written.cpu()
    inside = written & (spans.mask("text") | spans.mask("struct"))

    def ranges(where: Bool[Tensor, "batch pos"]) -> list[list[tuple[int, int]]]:
        return [as_ranges(row.nonzero().flatten().tolist()) for row in where]

    changed = {
        "text": ranges(spans.mask("text") & ~inside),
        "struct": ranges(spans.mask("struct") & ~inside),
        "audio_struct": ranges(spans.mask("audio_struct") | inside),
        TRANSCRIPT: ranges(inside),
    }
    return replace(x, spans=replace(spans, ranges={**spans.ranges, **changed}))
