"""Recordings that are asked for attributes: settings, labels, and prompts of a model.

All of it comes from the recordings' table and the settings. AudioLens' four attributes, and OB1's
emotion for the bundled clips, are taken where these leave it open.

Source: AudioLens; M-AL-1.
"""

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.reading.labels import LabelMode, LabelSet

from ..workbench.batches import BatchedConfig
from ..workbench.results import Row
from ..workbench.settings import EachOnce, Truncate
from .attributes import AUDIO_LENS, MENTION, OB1_EMOTION, NamedParts, PromptFormat, Wording
from .hearing import Hearing
from .recordings import Recording, check_label
from .records import collect, raise_all
from .resampling import SPEAKER, ResampledConfig
from .sources import Source, shown
from .stand_ins import silence_like

HeardAs = Literal["audio", "silence", "no_clip", "no_transcript", "neither"]
"""What is heard: the clip, silence of its length, or no clip at all; where the model reads a
transcript, too, it is left out, or both are."""
Spelled = str | tuple[str, ...]


class AttributesConfig(ResampledConfig, BatchedConfig):
    """Which clips are asked for which attributes, and how."""

    audio: Source = Field(
        default="bundled",
        description="a table of clips, a folder with manifest.csv, or one of OB1-named clips",
    )
    attributes: Annotated[Mapping[str, Wording], Field(min_length=1)] | None = Field(
        default=None,
        description="column of the table -> how it is asked for; None is OB1's emotion for bundled "
        "clips, else those of AudioLens' four attributes that the table has",
    )
    label_mode: LabelMode = Field(
        default="first_token",
        description="an answer's score: of its first token, or of the best of several spellings",
    )
    prompts: Annotated[tuple[PromptFormat, ...], EachOnce] = Field(
        default=get_args(PromptFormat),
        min_length=1,
        description="formats; those without words are left out",
    )
    causal_prompt: PromptFormat = Field(
        default="question", description="format of what is looked at more closely than its answer: "
        "audio taken away, activations changed; another one, if it was asked, tells success from "
        "failure"
    )  # fmt: skip
    absences: bool = Field(
        default=True, description="ask without the audio, and without a transcript, too"
    )
    reversed: bool = Field(
        default=False, description="begin the answer with the attribute: The emotion of the speaker"
    )
    use_is: bool = Field(default=False, description="let the beginning of the answer end in 'is'")
    rotate_options: bool = Field(
        default=True, description="list the labels in another order for every clip"
    )
    truncate: Truncate = False

    @model_validator(mode="after")
    def _causal_prompt_is_asked(self) -> "AttributesConfig":
        if self.causal_prompt not in self.prompts:
            raise ValueError(f"causal_prompt must be one of prompts: {', '.join(self.prompts)}")
        return self


@dataclass(frozen=True)
class AttributePrompt:
    """A clip under one format of one attribute."""

    clip: Recording
    attribute: str
    format: PromptFormat
    heard: HeardAs = "audio"

    @property
    def label(self) -> str:
        """What the table says of the clip."""
        return self.clip.cells[self.attribute]

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        who = {"clip": self.clip.name, "speaker": self.clip.cells.get(SPEAKER, "")}
        return {**who, "attribute": self.attribute, "prompt": self.format, "label": self.label}

    def random(self, seed: int) -> np.random.Generator:
        """Draws that depend on clip and attribute alone, not on the others of a set."""
        digest = hashlib.sha256(f"{seed}/{self.clip.name}/{self.attribute}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def labelled(
    recordings: Sequence[Recording], attributes: Iterable[str]
) -> Iterator[tuple[Recording, str]]:
    """The clips that each attribute is known of."""
    for attribute in attributes:
        for clip in recordings:
            if clip.cells.get(attribute):
                yield clip, attribute


class AttributePrompts:
    """Labels and prompts of some recordings, as a model reads them; nothing runs."""

    def __init__(self, config: AttributesConfig, recordings: Sequence[Recording]) -> None:
        """Reads the labels.

        Args:
            config: of the run.
            recordings: that are asked.

        Raises:
            InputError: all that is missing, by line and column.
        """
        self.config, self.recordings = config, recordings
        self.wordings = self._wordings()
        self.prefixes = {
            name: one.beginning(is_reversed=config.reversed, use_is=config.use_is)
            for name, one in self.wordings.items()
        }
        self.formats = {
            name: [one for one in config.prompts if self._has_words(name, one)]
            for name in self.wordings
        }
        """Attribute -> formats that it has words for."""
        self.words: dict[str, dict[str, Spelled]] = {}
        """Attribute -> label -> how answers spell it."""
        faults = [*self._unlabelled()]
        for name in self.wordings:
            faults += self._read_labels(name)
            if not self._has_words(name, needed := config.causal_prompt):
                faults.append(
                    f"attributes.{name}: has no words for the format {needed!r}, which is asked "
                    "for: add them, or choose another format"
                )
        raise_all("reading attributes", faults)
        self._lengths: dict[Hashable, int] = {}

    def _wordings(self) -> dict[str, Wording]:
        """How each attribute is asked for, by its column."""
        if self.config.attributes is not None:
            return dict(self.config.attributes)
        if self.config.audio == "bundled":
            return {"emotion": OB1_EMOTION}
        columns = {column for one in self.recordings for column in one.cells}
        found = {name: wording for name, wording in AUDIO_LENS.items() if name in columns}
        if not found:
            raise InputError(
                f"choosing attributes of {shown(self.config.audio)}: got the columns "
                f"{', '.join(sorted(columns))}, expected one of {', '.join(AUDIO_LENS)}. Set "
                "attributes, which says how any other column is asked for."
            )
        return found

    def _has_words(self, attribute: str, prompt: PromptFormat) -> bool:
        asked = self.wordings[attribute].asked(prompt, {}, [], self.prefixes[attribute])
        return asked is not None

    def _unlabelled(self) -> Iterator[str]:
        """Clips of which nothing is known, or not what intervals resample."""
        for one in self.recordings:
            known = [name for name in self.wordings if one.cells.get(name)]
            try:
                for name in known or self.wordings:
                    check_label(one.cells, name)
            except InputError as error:
                yield f"{one.where}: {error}"
            yield from self.config.unnamed([one])

    def _read_labels(self, name: str) -> Iterator[str]:
        """Read the labels of an attribute; what is wrong with them."""
        there = {clip.cells[name]: clip for clip, _ in labelled(self.recordings, [name])}
        given = self.wordings[name].labels
        # AudioLens' labels are a default: clips that have others are asked for theirs.
        if given is None or (self.config.attributes is None and not {*there} <= {*given}):
            given = {one: one for one in there}
        self.words[name] = dict(given)
        for label, clip in there.items():
            if label not in given:
                yield f"{clip.where}: {name}: got {label!r}, expected one of {', '.join(given)}"
        if len(given) < 2:
            yield f"{name}: got {len(given)} labels, expected two at least"

    # --- As a model reads them

    def hear(self, model: HookedALM) -> list[AudioClip]:
        """Reads every clip, and the labels as the model spells them; returns the clips.

        Args:
            model: at least laid out.

        Raises:
            InputError: clips that cannot be heard, or labels that begin alike.
        """
        self.model, every, truncate = model, self.recordings, self.config.truncate
        heard = Hearing(partial(model.read_clip, truncate=truncate))
        silent = Hearing(partial(silence_like, model, truncate=truncate))
        doing = f"hearing {shown(self.config.audio)}"
        clips = collect(doing, lambda one: heard.clip(one.path), every, lambda one: one.where)
        self._clips = {one.name: clip for one, clip in zip(every, clips, strict=True)}
        self._silence = {one.name: silent.clip(one.path) for one in every if self.config.absences}
        self.labels = {name: self._label_set(name) for name in self.wordings}
        return [*clips]

    def _label_set(self, attribute: str) -> LabelSet:
        """Labels as they go on from how the answer begins."""
        prefix = "".join(text for _, text in self.prefixes[attribute])
        space = " " if prefix and not prefix[-1].isspace() else ""

        def spelled(one: Spelled) -> Spelled:
            return space + one if isinstance(one, str) else tuple(space + each for each in one)

        words = {label: spelled(one) for label, one in self.words[attribute].items()}
        return LabelSet.from_texts(self.model.tokenizer, words, self.config.label_mode)

    def absences(self, prompt: AttributePrompt) -> tuple[HeardAs, ...]:
        """What can be taken away: the audio, its place, or the transcript that goes with it."""
        reads_transcript = "transcript" in self.input(prompt).spans
        return (
            ("silence", "no_transcript", "neither") if reads_transcript else ("silence", "no_clip")
        )

    def input(self, *prompts: AttributePrompt) -> ALMInput:
        """Some prompts, as one batch."""
        return ALMInput.joined([self._prepared(prompt) for prompt in prompts])

    def _prepared(self, prompt: AttributePrompt) -> ALMInput:
        parts = self._parts(prompt)
        text = "".join(part for _, part in parts)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        if (clip := self._heard(prompt)) is not None:
            said = self._transcript(prompt)
            heard = {"type": "audio", "audio": clip}
            content.insert(0, heard if said is None else {**heard, "transcript": said})
        return self.model.prepare(
            conversation=[{"role": "user", "content": content}],
            segments=parts or None,
            answer_prefix=self.prefixes[prompt.attribute] or None,
        )

    def _parts(self, prompt: AttributePrompt) -> NamedParts:
        """What is said with the clip."""
        name = prompt.attribute
        words = {k: v if isinstance(v, str) else v[0] for k, v in self.words[name].items()}
        order = [*words]
        if self.config.rotate_options:
            # A different label comes first in every clip, so that no place in the list is favoured.
            first = self._places[prompt.clip.name] % len(order)
            order = order[first:] + order[:first]
        asked = self.wordings[name].asked(prompt.format, words, order, self.prefixes[name])
        return asked or []

    def _heard(self, prompt: AttributePrompt) -> AudioClip | None:
        if prompt.heard == "no_clip":
            return None
        is_silent = prompt.heard in ("silence", "neither")
        return (self._silence if is_silent else self._clips)[prompt.clip.name]

    @staticmethod
    def _transcript(prompt: AttributePrompt) -> str | None:
        """What is written of the clip, where its table says it."""
        is_taken_away = prompt.heard in ("no_transcript", "neither")
        return "" if is_taken_away else prompt.clip.cells.get("transcript")

    @cached_property
    def _places(self) -> dict[str, int]:
        return {one.name: place for place, one in enumerate(self.recordings)}

    def length(self, prompt: AttributePrompt) -> int:
        """Number of positions."""
        clip = self._heard(prompt)
        said = prompt.attribute, self._transcript(prompt), *self._parts(prompt)
        # Prompts of the same words and as much audio are equally long.
        alike = said, None if clip is None else clip.n_tokens
        if alike not in self._lengths:
            self._lengths[alike] = self._prepared(prompt).shape[1]
        return self._lengths[alike]

    def mention(self, attribute: str, x: ALMInput) -> Int[Tensor, "batch 1"] | None:
        """The last position that names the attribute; None where it is the readout, or nowhere."""
        prefix = self.prefixes[attribute]
        if (prefix and prefix[-1][0] == MENTION) or MENTION not in x.spans:
            return None
        return torch.tensor([x.spans.positions(MENTION, row)[-1:] for row in range(len(x))])

    def audio_is_behind(self, prompt: AttributePrompt) -> bool:
        """Whether the attribute is named before the audio."""
        spans = self.input(prompt).spans
        named = spans.positions(MENTION, 0) if MENTION in spans else []
        return bool(named) and named[-1] < min(spans.positions("audio", 0))

    def described(self) -> dict[str, Any]:
        """What identifies labels and prompts, as JSON; of prompts, the first of every format."""
        said: dict[str, dict[str, str]] = {name: {} for name in self.wordings}
        for clip, name in labelled(self.recordings, self.wordings):
            for one in self.formats[name]:
                if one not in said[name]:
                    x = self.input(AttributePrompt(clip, name, one))
                    ids = x.tokens[0][~x.spans.mask("audio")[0]]
                    said[name][one] = self.model.tokenizer.decode(ids)
        return {
            "attributes": {name: one.model_dump() for name, one in self.wordings.items()},
            "labels": {name: [*words] for name, words in self.words.items()},
            "label_token_ids": {name: [*one.spellings] for name, one in self.labels.items()},
            "prompts": said,
        }
