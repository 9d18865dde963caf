"""What ``emotion_conflict`` runs: which clip under which instruction, and what is patched into it.

A conflict run (the voice's label is A, the instruction's T) is the base of up to five sweeps. Each
donor exchanges one part, so that its answer is known beforehand:

* ``self``: nothing; a control that must change nothing.
* ``text_swap``: the same clip, instructed A. What the instruction contributes.
* ``audio_swap``: a clip of label T, instructed T. What the voice contributes.
* ``both``: a clip of label T, instructed A.
* ``random_other``: a clip and an instruction of other labels; the floor of an unrelated state.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..materials.clips import file_safe, sound_units
from ..materials.instructions import PromptMode
from ..materials.recordings import Recording
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from ..workbench.results import Row
from .corpus import Corpus
from .settings import DonorKind, EmotionConflictConfig

NAMES_TARGET: tuple[PromptMode, ...] = ("conflict", "mention_only")
"""Prompt modes that name the target emotion, and so have one run per target."""


class Exchange(NamedTuple):
    """What a donor exchanges, and where that stands: in words, and as a span."""

    what: str
    source: str
    span: str


EXCHANGES = {
    "text_swap": Exchange("instruction", "its words", "text"),
    "audio_swap": Exchange("voice", "its audio", "audio"),
}
"""Donors that exchange one side of the conflict, whose information moves to the readout."""


@dataclass(frozen=True)
class PromptRun:
    """One forward: a clip under one instruction."""

    recording: Recording
    language: str
    """Language of the instruction and of the labels."""
    condition: PromptMode
    named: str | None
    """Label that the instruction names."""
    targets: tuple[str, ...]
    """Labels T whose contrast with the voice's is read."""

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        return {
            "clip": self.recording.name,
            "language": self.recording.language,
            "prompt_language": self.language,
            "voice": self.recording.label,
            "intensity": self.recording.intensity,
            "condition": self.condition,
            "named": self.named,
            "target": self.targets[0],
        }


@dataclass(frozen=True)
class PatchRun:
    """One sweep: a conflict run as base, and what is written into it."""

    base: PromptRun
    donor: PromptRun
    kind: DonorKind
    toward: tuple[str, str]
    """Label that the donor should bring, and label it should displace."""

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        return {
            **self.base.identity(),
            "donor": self.kind,
            "donor_clip": self.donor.recording.name,
            "donor_named": self.donor.named,
            "toward": self.toward[0],
        }


@dataclass(frozen=True)
class WorkPlan:
    """The units of work for a set of recordings."""

    config: EmotionConflictConfig
    corpus: Corpus

    @cached_property
    def runs(self) -> list[PromptRun]:
        """Every run, in its order."""
        return [*self._runs()]

    @cached_property
    def units(self) -> list[Unit]:
        """All runs, then all sweeps, some batches a unit; then how the clips sound."""
        runs = [(self.run_id(run), run) for run in self.runs]
        sweeps = [(name, sweep) for name, sweep in self._sweeps() if sweep]
        batches = [*batch_units(runs, self.config), *batch_units(sweeps, self.config)]
        return batches + sound_units(self.corpus.recordings)

    def impossible_sweeps(self) -> list[str]:
        """Sweeps that were asked for, but that no clip of this set can be the donor of."""
        return [name for name, sweep in self._sweeps() if sweep is None]

    def _runs(self) -> Iterator[PromptRun]:
        for clip in self.corpus.recordings:
            voice, language = clip.label, self.corpus.language(clip)
            targets = self.corpus.targets(clip)
            for mode in self.config.modes:
                if mode in NAMES_TARGET:
                    for one in targets:
                        yield PromptRun(clip, language, mode, one, (one,))
                else:
                    named = voice if mode == "consistent" else None
                    yield PromptRun(clip, language, mode, named, targets)

    def run_id(self, run: PromptRun) -> str:
        """The run's name in the tables."""
        has_several = len(self.corpus.targets(run.recording)) > 1
        names_one = has_several and run.condition in NAMES_TARGET
        suffix = f"_{file_safe(str(run.named))}" if names_one else ""
        return f"{run.recording.name}__{run.condition}{suffix}"

    def _sweeps(self) -> Iterator[tuple[str, PatchRun | None]]:
        """Every sweep that is asked for, by its name; None if no clip can play the donor."""
        for base in self.runs:
            if base.condition == "conflict":
                for kind in self.config.donors:
                    yield self.sweep_id(base, kind), self._sweep(base, kind)

    def sweep_id(self, base: PromptRun, kind: DonorKind) -> str:
        """A sweep's name in the tables."""
        return f"patch__{base.recording.name}__{file_safe(str(base.named))}__{kind}"

    def _sweep(self, base: PromptRun, kind: DonorKind) -> PatchRun | None:
        voice, target = base.recording.label, base.targets[0]
        clip: Recording | None = base.recording
        named = voice if kind in ("text_swap", "both") else target
        if kind in ("audio_swap", "both"):
            clip = self._clip_like(base, [target])
        elif kind == "random_other":
            others = [one for one in self.corpus.labels if one not in (voice, target)]
            if len(others) < 2:
                return None
            named = others[self._random(base).integers(len(others))]
            clip = self._clip_like(base, [one for one in others if one != named])
        if clip is None:
            return None
        mode: PromptMode = "consistent" if clip.label == named else "conflict"
        toward = (target, voice) if kind == "audio_swap" else (voice, target)
        donor = PromptRun(clip, self.corpus.language(clip), mode, named, (target,))
        return PatchRun(base, donor, kind, toward)

    def _clip_like(self, base: PromptRun, labels: Sequence[str]) -> Recording | None:
        """A clip of the same language, speaker and sentence; of equal intensity if there is one."""
        clip = base.recording
        found = self.corpus.clips_like(clip, labels)
        alike = [r for r in found if r.intensity == clip.intensity] or found
        return alike[self._random(base).integers(len(alike))] if alike else None

    def _random(self, run: PromptRun) -> np.random.Generator:
        """Draws that depend on the run alone, not on the other runs of the set."""
        name = f"{self.config.seed}/{run.recording.name}/{run.named}"
        digest = hashlib.sha256(name.encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))
