"""What ``class_neurons`` runs: items of either half, and the exchanges that tell what drives them.

Groups (speakers) are dealt into two halves: neurons are selected on one, and judged on the other.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import pandas as pd

from ..materials.class_items import ClassItem, ClassItems
from ..materials.clips import sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_runs import PatchRun, PromptRun
from ..materials.kept_features import FeatureFiles, files_of
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from .settings import ClassNeuronsConfig

HALVES = "those that neurons are selected on and those that they are judged on"


@dataclass(frozen=True)
class ChangedItem:
    """An item whose neurons are changed, or whose inputs are exchanged: audio, then text."""

    item: ClassItem
    logs: FeatureFiles = ()
    exchanges: tuple[PatchRun, ...] = ()
    sweeps: ClassVar[tuple[PatchRun, ...]] = ()

    @property
    def prompts(self) -> tuple[PromptRun, ...]:
        """Its run, then its exchanges."""
        return self.item.run, *(one.donor for one in self.exchanges)


@dataclass(frozen=True)
class SelectedNeurons:
    """The payload of the unit that lists the neurons of every class."""

    logs: FeatureFiles


@dataclass(frozen=True)
class NeuronPlan:
    """The units of work for a set of recordings."""

    config: ClassNeuronsConfig
    corpus: Corpus

    @cached_property
    def items(self) -> ClassItems:
        """The items of both halves."""
        return ClassItems(self.config, self.corpus, self.config.log_share, HALVES)

    @property
    def conflicts(self) -> list[ChangedItem]:
        """Judged conflicts of which both audio and instruction can be exchanged."""
        found = self.items.held_out_conflicts
        return [ChangedItem(one, exchanges=some) for one, some in found if len(some) > 1]

    def impossible_sweeps(self) -> list[str]:
        """Judged conflicts whose audio no clip can be exchanged for."""
        return [one.name for one, some in self.items.held_out_conflicts if len(some) < 2]

    @property
    def runs(self) -> list[PromptRun]:
        """Every run."""
        works: list[ClassItem | ChangedItem] = [*self.items.asked, *self.conflicts]
        return [run for one in works for run in one.prompts]

    @cached_property
    def units(self) -> list[Unit]:
        """The items, logged and answered; then how the clips sound."""
        works = [(f"log__{one.name}", one) for one in self.items.asked]
        return batch_units(works, self.config) + sound_units(self.corpus.recordings)

    def further_units(self, logs: pd.DataFrame) -> list[Unit]:
        """The neurons, the judged items with them changed, and what drives them."""
        files = files_of(logs)
        judged = [one for one in self.items.asked if one.half == "held-out"]
        dosed = [(f"dose__{one.name}", ChangedItem(one, files)) for one in judged]
        driven = [(f"drive__{one.item.name}", replace(one, logs=files)) for one in self.conflicts]
        return [
            Unit("neurons", SelectedNeurons(files)),
            *batch_units(dosed, self.config), *batch_units(driven, self.config),
        ]  # fmt: skip
