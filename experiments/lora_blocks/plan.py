"""What ``lora_blocks`` runs: every clip under every instruction, with and without the adapter."""

from dataclasses import dataclass
from functools import cached_property

from ..materials.clips import sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_runs import PromptRun, prompt_runs, run_id
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from .settings import LoraBlocksConfig

SIZES = "sizes"
"""The unit that measures the updates themselves."""


@dataclass(frozen=True)
class LoraBlocksPlan:
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
        return [*units, Unit(SIZES, ()), *sound_units(self.corpus.recordings)]

    def impossible_sweeps(self) -> list[str]:
        """None: nothing is exchanged."""
        return []
