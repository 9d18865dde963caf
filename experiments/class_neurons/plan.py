"""What ``class_neurons`` runs: items of either half, and the exchanges that tell what drives them.

Groups (speakers) are dealt into two halves: neurons are selected on one, and judged on the other.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import pandas as pd

from hooked_alm.errors import InputError

from ..materials.clips import sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_runs import DonorKind, Donors, PatchRun, PromptRun
from ..materials.held_out import Half, groups_of, split_groups
from ..materials.kept_features import FeatureFiles, files_of
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from ..workbench.results import Row
from .settings import ClassNeuronsConfig

EXCHANGED: tuple[DonorKind, ...] = ("audio_swap", "text_swap")


@dataclass(frozen=True)
class NeuronItem:
    """A clip under an instruction, and its class."""

    run: PromptRun
    cls: str
    group: str
    half: Half
    sweeps: ClassVar[tuple[PatchRun, ...]] = ()

    @property
    def prompts(self) -> tuple[PromptRun, ...]:
        """Its run."""
        return (self.run,)

    @property
    def name(self) -> str:
        """Of the item, in tables."""
        return f"{self.run.recording.name}__{self.run.targets[0]}"

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        return {
            "item": self.name, "clip": self.run.recording.name, "group": self.group,
            "cls": self.cls,
        }  # fmt: skip


@dataclass(frozen=True)
class ChangedItem:
    """An item whose neurons are changed, or whose inputs are exchanged: audio, then text."""

    item: NeuronItem
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
    def halves(self) -> dict[str, tuple[str, Half]]:
        """Clip -> its group, and the half that this is of.

        Raises:
            InputError: clips without a group, or one group alone.
        """
        clips = self.corpus.recordings
        groups = groups_of(clips, self.config.group)
        halves = split_groups(groups, self.config.log_share, self.config.seed)
        if len(halves) < 2:
            raise InputError(
                f"splitting {len(clips)} clips into those that neurons are selected on and those "
                f"that they are judged on: got one group ({groups[0]}), expected two or more. Name "
                "another column as group."
            )
        return {c.name: (g, halves[g]) for c, g in zip(clips, groups, strict=True)}

    def _items(self, condition: str) -> list[NeuronItem]:
        found = []
        for clip in self.corpus.recordings:
            group, half = self.halves[clip.name]
            every = self.corpus.targets(clip)
            for target in every if condition == "conflict" else every[:1]:
                named = target if condition == "conflict" else None
                language = self.corpus.language(clip)
                is_named = self.config.rule == "instruction" and named is not None
                run = PromptRun(clip, language, condition, named, (target,))  # type: ignore[arg-type]
                found.append(NeuronItem(run, target if is_named else clip.label, group, half))
        return found

    @cached_property
    def items(self) -> list[NeuronItem]:
        """Every item of both halves.

        Raises:
            InputError: one class alone, or one that a half lacks.
        """
        found = self._items(self.config.condition)
        by_half = {half: {one.cls for one in found if one.half == half} for _, half in
                   self.halves.values()}  # fmt: skip
        classes = set[str]().union(*by_half.values())
        lacking = [f"{half}: {', '.join(sorted(classes - some))}"
                   for half, some in sorted(by_half.items()) if classes - some]  # fmt: skip
        if len(classes) < 2 or lacking:
            raise InputError(
                f"dealing {len(self.halves)} clips into two halves: got the classes "
                f"{', '.join(sorted(classes))}, of which one half lacks some "
                f"({'; '.join(lacking) or 'there is one alone'}). Add clips, name another column "
                "as group, or take another seed."
            )
        return found

    @cached_property
    def conflicts(self) -> list[ChangedItem]:
        """Judged conflicts of which both audio and instruction can be exchanged."""
        donors, found = Donors(self.corpus, self.config.seed), []
        for item in self._items("conflict"):
            both = [donors.sweep(item.run, kind) for kind in EXCHANGED]
            if item.half == "held-out" and all(both):
                found.append(ChangedItem(item, exchanges=tuple(one for one in both if one)))
        return found

    @property
    def runs(self) -> list[PromptRun]:
        """Every run."""
        works: list[NeuronItem | ChangedItem] = [*self.items, *self.conflicts]
        return [run for one in works for run in one.prompts]

    @cached_property
    def units(self) -> list[Unit]:
        """The items, logged and answered; then how the clips sound."""
        works = [(f"log__{one.name}", one) for one in self.items]
        return batch_units(works, self.config) + sound_units(self.corpus.recordings)

    def further_units(self, logs: pd.DataFrame) -> list[Unit]:
        """The neurons, the judged items with them changed, and what drives them."""
        files = files_of(logs)
        judged = [one for one in self.items if one.half == "held-out"]
        dosed = [(f"dose__{one.name}", ChangedItem(one, files)) for one in judged]
        driven = [(f"drive__{one.item.name}", replace(one, logs=files)) for one in self.conflicts]
        return [
            Unit("neurons", SelectedNeurons(files)),
            *batch_units(dosed, self.config), *batch_units(driven, self.config),
        ]  # fmt: skip

    def impossible_sweeps(self) -> list[str]:
        """Judged conflicts whose audio no clip can be exchanged for."""
        possible = {one.item.name for one in self.conflicts}
        judged = (one for one in self._items("conflict") if one.half == "held-out")
        return [one.name for one in judged if one.name not in possible]
