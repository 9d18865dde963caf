"""What ``emotion_conflict`` runs: which clip under which instruction, and what is patched into it.

A conflict run is the base of up to five sweeps, one for each kind of donor; see
`materials.conflict_runs`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..materials.clips import file_safe, sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_runs import (
    DonorKind,
    Donors,
    PatchRun,
    PromptRun,
    prompt_runs,
    run_id,
)
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from .settings import EmotionConflictConfig


@dataclass(frozen=True)
class WorkPlan:
    """The units of work for a set of recordings."""

    config: EmotionConflictConfig
    corpus: Corpus

    @cached_property
    def runs(self) -> list[PromptRun]:
        """Every run, in its order."""
        return [*prompt_runs(self.corpus, self.config.modes)]

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

    def run_id(self, run: PromptRun) -> str:
        """The run's name in the tables."""
        return run_id(self.corpus, run)

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
