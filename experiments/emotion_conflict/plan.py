"""What ``emotion_conflict`` runs: which clip under which instruction, and what is patched into it.

A conflict run is the base of up to five sweeps, one for each kind of donor; see
`materials.conflict_runs`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..materials.clips import file_safe, sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_runs import DonorKind, Donors, PatchRun, PromptRun
from ..materials.instructions import PromptMode
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from .settings import EmotionConflictConfig

NAMES_TARGET: tuple[PromptMode, ...] = ("conflict", "mention_only")
"""Prompt modes that name the target emotion, and so have one run per target."""


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
        donors = Donors(self.corpus, self.config.seed)
        for base in self.runs:
            if base.condition == "conflict":
                for kind in self.config.donors:
                    yield self.sweep_id(base, kind), donors.sweep(base, kind)

    def sweep_id(self, base: PromptRun, kind: DonorKind) -> str:
        """A sweep's name in the tables."""
        return f"patch__{base.recording.name}__{file_safe(str(base.named))}__{kind}"
