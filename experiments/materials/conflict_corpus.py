"""What a set of recordings is asked with: its labels, their words, instructions, and conflicts.

All of it comes from the recordings' table and the settings. OB1's own is taken where they leave it
open: its instructions, its five labels and its conflict map for clips that have no other labels,
and its Chinese words for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from .conflict_settings import ConflictConfig
from .instructions import Instructions
from .ob1 import CONFLICT_MAP, EMOTIONS, INSTRUCTIONS, LABELS
from .recordings import Recording
from .records import raise_all

Spelling = str | tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Recordings, and everything that prompts are made of."""

    config: ConflictConfig
    recordings: Sequence[Recording]

    def __post_init__(self) -> None:
        """Refuse what no prompt can be made of.

        Raises:
            InputError: all that is missing, or names a label that there is not.
        """
        raise_all("reading labels and instructions", [*self._faults()])

    def _faults(self) -> list[str]:
        known, faults = {*self.labels}, []
        if len(known) < 2:
            faults.append(f"got the label {self.labels[0]!r} alone, expected two at least")
        for language in self.languages:
            if not language:
                cure = "fill the column language, or set prompt_language"
                faults.append(f"got clips whose table says no language: {cure}")
            elif language not in self.instructions:
                cure = f"set prompts.{language}, or prompt_language to one of "
                faults.append(
                    f"got clips in {language!r} and no instructions in it: {cure}"
                    f"{', '.join(self.instructions)}"
                )
        for language, words in (self.config.labels or {}).items():
            if known != {*words}:
                faults.append(
                    f"labels.{language}: got {', '.join(words)}, expected a word for each of "
                    f"{', '.join(self.labels)}"
                )
        for voice, target in (self.config.conflict_map or {}).items():
            if {voice, target} - known or voice == target:
                faults.append(
                    f"conflict_map.{voice}: got {target!r}, expected another of "
                    f"{', '.join(self.labels)}"
                )
        for one in self.recordings:
            if one.label not in known:
                faults.append(
                    f"{one.where}: {one.label_column}: got {one.label!r}, expected one of "
                    f"{', '.join(self.labels)}"
                )
            if wrong := [t for t in one.targets if t not in known or t == one.label]:
                faults.append(
                    f"{one.where}: target: got {', '.join(wrong)}, expected labels other than "
                    f"{one.label!r}: {', '.join(self.labels)}"
                )
        return faults

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels that answers are scored by, in the order of the settings or of the table."""
        if self.config.labels:
            every = [label for words in self.config.labels.values() for label in words]
            return tuple(dict.fromkeys(every))
        found = dict.fromkeys(one.label for one in self.recordings)
        return EMOTIONS if {*found} <= {*EMOTIONS} else tuple(found)

    @property
    def instructions(self) -> Mapping[str, Instructions]:
        """Instructions by language."""
        known = {str(language): one for language, one in INSTRUCTIONS.items()}
        return {**known, **self.config.prompts}

    @cached_property
    def languages(self) -> tuple[str, ...]:
        """Languages of the prompts."""
        return tuple(dict.fromkeys(map(self.language, self.recordings)))

    def language(self, recording: Recording) -> str:
        """Language of instruction and labels."""
        chosen = self.config.prompt_language
        return recording.language if chosen == "clip" else chosen

    def words(self, language: str) -> dict[str, Spelling]:
        """Label -> how answers spell it: as the settings say, or as OB1 does, or as it stands."""
        given = (self.config.labels or {}).get(language)
        if given is not None:
            return {label: given[label] for label in self.labels}
        own: Mapping[str, str] = LABELS.get(language, {})  # type: ignore[call-overload]
        return {label: own.get(label, label) for label in self.labels}

    def targets(self, recording: Recording) -> tuple[str, ...]:
        """Labels that instructions name against the voice's.

        Under ``all_pairs`` every other one. Else what the table says of the clip, the settings of
        its label, or OB1 of its five; else the next label in their order.
        """
        voice = recording.label
        if self.config.pairs == "all_pairs":
            return tuple(label for label in self.labels if label != voice)
        if recording.targets:
            return recording.targets
        ob1: Mapping[str, str] = CONFLICT_MAP if self.labels == EMOTIONS else {}  # type: ignore[assignment]
        following = self.labels[(self.labels.index(voice) + 1) % len(self.labels)]
        return ({**ob1, **(self.config.conflict_map or {})}.get(voice, following),)

    def clips_like(self, clip: Recording, labels: Sequence[str]) -> list[Recording]:
        """Clips of some labels, of the same language, speaker and sentence as a clip."""
        found = (self._alike.get((*_setting(clip), label), []) for label in labels)
        return [self.recordings[index] for index in sorted(chain(*found))]

    @cached_property
    def _alike(self) -> dict[tuple[str | None, ...], list[int]]:
        found: dict[tuple[str | None, ...], list[int]] = {}
        for index, one in enumerate(self.recordings):
            found.setdefault((*_setting(one), one.label), []).append(index)
        return found


def _setting(clip: Recording) -> tuple[str | None, ...]:
    """What a donor shares with its base, as far as the table says it and it is not the label."""
    shared = ("language", "speaker", "sentence")
    return tuple(None if name == clip.label_column else clip.cells.get(name) for name in shared)
