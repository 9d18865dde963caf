"""What ``grounding`` runs: every item, and what is exchanged in it.

An item is a clip whose voice carries A, under an instruction that names T. Its audio's donor is a
clip of T under the same instruction, its text's the same clip under one that names A.
"""

from dataclasses import dataclass
from functools import cached_property

from ..materials.clips import sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_runs import ExchangedRun, PromptRun, exchanged_runs
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from .settings import GroundingConfig


@dataclass(frozen=True)
class GroundingPlan:
    """The units of work for a set of recordings."""

    config: GroundingConfig
    corpus: Corpus

    @cached_property
    def _every(self) -> list[ExchangedRun]:
        return exchanged_runs(self.corpus, self.config.condition, self.config.seed)

    @cached_property
    def items(self) -> list[ExchangedRun]:
        """Every item that something can be exchanged in."""
        return [one for one in self._every if one.sweeps]

    @cached_property
    def runs(self) -> list[PromptRun]:
        """Every run of every item."""
        return [run for item in self.items for run in item.prompts]

    @cached_property
    def units(self) -> list[Unit]:
        """The items, some batches a unit; then how the clips sound."""
        works = [(item.pair, item) for item in self.items]
        return batch_units(works, self.config) + sound_units(self.corpus.recordings)

    def impossible_sweeps(self) -> list[str]:
        """Items whose audio no clip can be exchanged for."""
        return [item.pair for item in self._every if "audio" not in item.runs]
