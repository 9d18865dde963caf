"""What ``lora_blocks`` runs: every clip under every instruction, with and without the adapter."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..materials.clips import sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_experiment import ConflictPlan
from ..materials.conflict_runs import PromptRun, prompt_runs, run_id
from ..workbench.batches import batch_units, bucketed
from ..workbench.experiment import Unit
from .settings import LoraBlocksConfig

UPDATES = "updates"
"""The unit that measures the updates themselves, and what they do to all clips together."""


@dataclass(frozen=True)
class LoraBlocksPlan(ConflictPlan):
    """The units of work for a set of recordings."""

    config: LoraBlocksConfig
    corpus: Corpus

    @cached_property
    def runs(self) -> list[PromptRun]:
        """Every clip under every instruction."""
        return [*prompt_runs(self.corpus, self.config.conditions)]

    @cached_property
    def units(self) -> list[Unit]:
        """The runs, some batches a unit; the updates; then how the clips sound."""
        works = [(run_id(self.corpus, run), run) for run in self.runs]
        units = batch_units(works, self.config)
        return [*units, Unit(UPDATES, ()), *sound_units(self.corpus.recordings)]

    def compared(self) -> list[list[PromptRun]]:
        """Batches of one run of every clip, or of some that are drawn, each in one language."""
        first = [*{run.recording.name: run for run in reversed(self.runs)}.values()]
        drawn = np.random.default_rng(self.config.seed).permutation(len(first))
        some = [first[i] for i in sorted(drawn[: self.config.n_compared])]
        kinds = [one.language for one in some]
        batches = bucketed([0] * len(some), self.config.batch_size, kinds=kinds)
        return [[some[i] for i in batch] for batch in batches]
