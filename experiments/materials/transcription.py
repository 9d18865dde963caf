"""Clips with what is said in them, and the prompts under which a model writes it down."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import pandas as pd
import torch
from pydantic import Field
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from hooked_alm import HookedALM
from hooked_alm.bundled import ASSETS
from hooked_alm.errors import InputError
from hooked_alm.hooks import Hook
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.reading.transcripts import written
from hooked_alm.methods.statistics.word_errors import (
    CountedUnit,
    Normaliser,
    WordErrors,
    word_errors,
)

from ..workbench.results import Results, Row
from ..workbench.settings import ExperimentConfig, Truncate
from .clips import ClipFile, described_table, manifest
from .hearing import Hearing, heard_under
from .recordings import load_clips
from .records import collect, raise_all
from .resampling import SPEAKER, ResampledConfig
from .sources import Source, shown
from .subject import ModelExperiment, described

SPOKEN = ASSETS / "semantic_vs_prosody"
"""Clips that the package carries, with their words."""
SPOKEN_OR_NOT = ASSETS / "spoken"
"""Clips that the package carries: sentences, half of which end in *again*, and no words."""
Held = Literal["speech", "no_speech", "unknown"]
"""What a clip holds, as its table says."""
WORDS = ("text", "sentence")
"""Columns of a table of clips that may have what is said, the first of them that it has."""


class WrittenDownConfig(ExperimentConfig):
    """Settings of experiments in which a model writes down what is said."""

    KNOWN_WITH: ClassVar = ("audio",)

    model: str = Field(default="bundled:tiny_whisper", description="id, folder or bundled:NAME")
    audio: Source = Field(
        default="bundled",
        description="a table of clips (column path; text, or sentence, is what is said, and empty "
        "where nothing is, speaker who says it), or a folder of clips",
    )
    prompt: str = Field(
        default="Write down what is said.",
        description="instruction under which clips are heard; Whisper is given none",
    )
    language: str | None = Field(
        default=None, description="spoken in all clips; None has a multilingual Whisper hear it"
    )
    max_new_tokens: int = Field(default=60, ge=1, le=10_000, description="of a transcript, at most")
    suppress: bool = Field(
        default=False,
        description="never say tokens that the checkpoint's generation config forbids",
    )
    normaliser: Literal["basic", "english", "none"] = Field(
        default="basic",
        description="of both sides before words are compared: lower case without punctuation; "
        "Whisper's for English, with the spellings in the checkpoint's folder; or as they are",
    )
    unit: CountedUnit = Field(
        default="word", description="what is counted: characters where no spaces are written"
    )
    truncate: Truncate = False

    @property
    def source(self) -> Any:
        """Where the clips are."""
        return SPOKEN if self.audio == "bundled" else self.audio


class TranscriptionConfig(WrittenDownConfig, ResampledConfig):
    """The same, where intervals resample clips, or speakers."""


class Transcription:
    """Some clips, as a model hears and writes them down."""

    def __init__(self, config: WrittenDownConfig) -> None:
        """Opens the clips.

        Raises:
            InputError: all that is wrong with them.
        """
        self.config = config
        self.clips = load_clips(config.source)
        there = {column for one in self.clips for column in one.cells}
        self.words = next((column for column in WORDS if column in there), None)
        if isinstance(config, ResampledConfig):
            raise_all("reading clips", [*config.unnamed(self.clips)])

    def hear(self, model: HookedALM) -> list[AudioClip]:
        """Reads every clip; returns them.

        Args:
            model: at least laid out.

        Raises:
            InputError: clips that cannot be heard, a language or spellings that are not known.
        """
        self.model = model
        self.normalise = self._normaliser()
        heard = Hearing(partial(model.read_clip, truncate=self.config.truncate))
        doing = f"hearing {shown(self.config.audio)}"
        found = collect(doing, lambda one: heard.clip(one.path), self.clips, lambda one: one.where)
        self._heard = {one.name: clip for one, clip in zip(self.clips, found, strict=True)}
        # What could fail in the midst of a run; a language that is to be heard needs weights.
        heard_under(model, found[:1], self.config.prompt, self.config.language, stand_in="en")
        return [*found]

    def described(self, heard: Sequence[AudioClip]) -> list[Row]:
        """What ``run.json`` says of the clips, as they were heard."""
        return [
            {"name": one.name, "sha256": one.sha256, "seconds": clip.seconds,
             "notes": [*one.notes, *clip.notes]}
            for one, clip in zip(self.clips, heard, strict=True)
        ]  # fmt: skip

    def _normaliser(self) -> Normaliser:
        kind = self.config.normaliser
        if kind == "none":
            return str
        if kind == "basic":
            found: Normaliser = BasicTextNormalizer()
            return found
        spellings = getattr(self.model.tokenizer, "english_spelling_normalizer", None)
        if not spellings:
            raise InputError(
                f"normalising transcripts of {self.config.model!r}: its folder has no English "
                "spellings (normalizer.json). Add it, or set normaliser=basic."
            )
        english: Normaliser = EnglishTextNormalizer(spellings)
        return english

    def heard(self, clip: ClipFile) -> AudioClip:
        """A clip as the model hears it."""
        return self._heard[clip.name]

    def input(self, clip: ClipFile) -> ALMInput:
        """The prompt under which a clip is written down."""
        return heard_under(self.model, [self.heard(clip)], self.config.prompt, self.config.language)

    def unheard(self, clips: Sequence[ClipFile]) -> ALMInput:
        """The prompts of some clips, which the encoder has yet to hear."""
        return ALMInput.joined([self.input(clip) for clip in clips]).to(self.model.cfg.device)

    @torch.no_grad()
    def prompts(self, clips: Sequence[ClipFile]) -> ALMInput:
        """The prompts of some clips; Whisper has heard them."""
        x = self.unheard(clips)
        assert self.model.audio is not None
        return replace(x, memory=self.model.audio.heard(x)) if self.model.audio.is_memory else x

    def write(self, x: ALMInput, fwd_hooks: Iterable[Hook] = ()) -> list[list[int]]:
        """Greedy tokens of every prompt, without those that end them; hooks fire at every step."""
        most, is_muted = self.config.max_new_tokens, self.config.suppress
        return written(self.model, x, most, suppress=is_muted, fwd_hooks=fwd_hooks)

    def ids(self, text: str) -> list[int]:
        """Tokens of words, as the model would write them."""
        assert self.model.audio is not None
        space = " " if self.model.audio.is_memory and text else ""
        found: list[int] = self.model.tokenizer(space + text, add_special_tokens=False).input_ids
        return found

    def text(self, tokens: Sequence[int]) -> str:
        """The words of some tokens."""
        found: str = self.model.tokenizer.decode(tokens, skip_special_tokens=True)
        return found.strip()

    def is_heard(self, text: str) -> bool:
        """Whether a transcript has words; normalised, what stands in brackets is none."""
        return bool(self.normalise(text).strip())

    def said_in(self, clip: ClipFile) -> str | None:
        """What is said in a clip; None where the table has no column of words."""
        return None if self.words is None else clip.cells.get(self.words, "")

    def holds(self, clip: ClipFile) -> Held:
        """Whether something is said in a clip, as far as its table says."""
        said = self.said_in(clip)
        return "unknown" if said is None else "speech" if said else "no_speech"

    def row(self, clip: ClipFile, tokens: Sequence[int]) -> Row:
        """What came of a clip."""
        text = self.text(tokens)
        errors = self.errors(self.said_in(clip), text)
        return {
            **whose(clip), "holds": self.holds(clip), "text": text, "n_tokens": len(tokens),
            "heard": float(self.is_heard(text)),
            **{f"reference_{name}": n for name, n in errors._asdict().items()},
        }  # fmt: skip

    def errors(self, said: str | None, heard: str) -> WordErrors:
        """Errors of a transcript; of a reference that is not known, none of 0."""
        if said is None:
            return WordErrors(0, 0, 0, 0)
        return word_errors([said], [heard], unit=self.config.unit, normalise=self.normalise)[0]


def whose(clip: ClipFile) -> Row:
    """The clip and its speaker, as columns of a table."""
    return {"clip": clip.name, "speaker": clip.cells.get(SPEAKER, "")}


T = TypeVar("T", bound=WrittenDownConfig)


class TranscriptionExperiment(ModelExperiment[T]):
    """An experiment in which a model writes clips down."""

    ours: Transcription

    def identify(self) -> dict[str, Any]:
        """Reads the clips."""
        self.ours = Transcription(self.config)
        self.model = self.lay_out(hears=True)
        self.check_model()
        return {
            "model": described(self.model, self.config),
            **described_table(self.config.source),
            "clips": self.ours.described(self.ours.hear(self.model)),
        }

    def check_model(self) -> None:
        """Refuse a model that the experiment is not for.

        Raises:
            InputError: it is not.
        """

    def listed(self, run: Results[T]) -> pd.DataFrame:
        """The clips, as their table and their sounds have them."""
        return manifest(self.ours.clips, run["sounds"])
