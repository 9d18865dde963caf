"""What ``emotion_conflict`` runs: which clip under which instruction, and what is patched into it.

A conflict run (voice A, instruction T) is the base of up to five sweeps. Each donor exchanges one
part, so that its answer is known beforehand:

* ``self``: nothing; a control that must change nothing.
* ``text_swap``: the same clip, instructed A. What the instruction contributes.
* ``audio_swap``: a clip of emotion T, instructed T. What the voice contributes.
* ``both``: a clip of emotion T, instructed A.
* ``random_other``: a clip and an instruction of other emotions; the floor of an unrelated state.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..materials.ob1 import CONFLICT_MAP, EMOTIONS, Emotion, PromptMode
from ..materials.recordings import Recording
from ..workbench.experiment import Unit
from .settings import DonorKind, EmotionConflictConfig

NAMES_TARGET: tuple[PromptMode, ...] = ("conflict", "mention_only")
"""Prompt modes that name the target emotion, and so have one run per target."""


@dataclass(frozen=True)
class PromptRun:
    """One forward: a clip under one instruction."""

    recording: Recording
    condition: PromptMode
    named: Emotion | None
    """Emotion that the instruction names."""
    targets: tuple[Emotion, ...]
    """Emotions T whose contrast with the voice's is read."""


@dataclass(frozen=True)
class PatchRun:
    """One sweep: a conflict run as base, and what is written into it."""

    base: PromptRun
    donor: PromptRun
    kind: DonorKind
    toward: tuple[Emotion, Emotion]
    """Label that the donor should bring, and label it should displace."""


@dataclass(frozen=True)
class WorkPlan:
    """The units of work for a set of recordings."""

    config: EmotionConflictConfig
    recordings: Sequence[Recording]

    def units(self) -> list[Unit]:
        """All runs, then all sweeps."""
        runs = [run for recording in self.recordings for run in self._runs(recording)]
        units = [Unit(self._run_id(run), run) for run in runs]
        for run in self._conflict_runs():
            for kind in self.config.donors:
                if sweep := self._sweep(run, kind):
                    units.append(Unit(_sweep_id(run, kind), sweep))
        return units

    def _targets(self, recording: Recording) -> tuple[Emotion, ...]:
        if self.config.pairs == "map":
            return (CONFLICT_MAP[recording.emotion],)
        return tuple(emotion for emotion in EMOTIONS if emotion != recording.emotion)

    def _runs(self, recording: Recording) -> list[PromptRun]:
        targets = self._targets(recording)
        runs = []
        for mode in self.config.modes:
            if mode in NAMES_TARGET:
                runs += [PromptRun(recording, mode, target, (target,)) for target in targets]
            else:
                named = recording.emotion if mode == "consistent" else None
                runs.append(PromptRun(recording, mode, named, targets))
        return runs

    def _sweep(self, base: PromptRun, kind: DonorKind) -> PatchRun | None:
        """The donor of a conflict run (A, T), or None if no clip can play the part."""
        clip, voice, target = base.recording, base.recording.emotion, base.targets[0]
        if kind == "self":
            return PatchRun(base, base, kind, (voice, target))
        if kind == "text_swap":
            donor = PromptRun(clip, "consistent", voice, (target,))
            return PatchRun(base, donor, kind, (voice, target))
        if kind == "random_other":
            others = [e for e in EMOTIONS if e not in (voice, target)]
            named: Emotion = others[_seeded(self.config.seed, base).integers(len(others))]
            voices = [e for e in others if e != named]
        else:
            named, voices = (target if kind == "audio_swap" else voice), [target]
        other = self._clip_like(clip, voices, base)
        if other is None:
            return None
        mode: PromptMode = "consistent" if other.emotion == named else "conflict"
        toward = (target, voice) if kind == "audio_swap" else (voice, target)
        return PatchRun(base, PromptRun(other, mode, named, (target,)), kind, toward)

    def _clip_like(
        self, clip: Recording, emotions: Sequence[Emotion], base: PromptRun
    ) -> Recording | None:
        """A clip of the same language, speaker and sentence; of equal intensity if there is one."""
        found = [
            r
            for r in self.recordings
            if r.emotion in emotions
            and r.language == clip.language
            and all(r.other.get(key) == clip.other.get(key) for key in ("speaker", "sentence"))
        ]
        alike = [r for r in found if r.intensity == clip.intensity] or found
        return alike[_seeded(self.config.seed, base).integers(len(alike))] if alike else None

    def impossible_sweeps(self) -> list[str]:
        """Sweeps that were asked for, but that no clip of this set can be the donor of."""
        return [
            _sweep_id(run, kind)
            for run in self._conflict_runs()
            for kind in self.config.donors
            if self._sweep(run, kind) is None
        ]

    def _conflict_runs(self) -> list[PromptRun]:
        runs = [run for recording in self.recordings for run in self._runs(recording)]
        return [run for run in runs if run.condition == "conflict"]

    def _run_id(self, run: PromptRun) -> str:
        names_target = self.config.pairs == "all_pairs" and run.condition in NAMES_TARGET
        suffix = f"_{run.named}" if names_target else ""
        return f"{run.recording.name}__{run.condition}{suffix}"


def _sweep_id(base: PromptRun, kind: DonorKind) -> str:
    return f"patch__{base.recording.name}__{base.named}__{kind}"


def _seeded(seed: int, run: PromptRun) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{run.recording.name}/{run.named}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
