"""What ``grounding`` runs: every item, and what is exchanged in it.

An item is a clip whose voice carries A, under an instruction that names T. Its audio's donor is a
clip of T under the same instruction, its text's the same clip under one that names A.
"""

from dataclasses import dataclass
from functools import cached_property

from hooked_alm.errors import InputError

from ..materials.clips import file_safe, sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_runs import DonorKind, Donors, PatchRun, PromptRun
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from ..workbench.results import Row
from .settings import GroundingConfig

INPUTS: dict[str, DonorKind] = {"audio": "audio_swap", "text": "text_swap"}
"""The two inputs that an answer may rest on, and the donor that exchanges each."""


@dataclass(frozen=True)
class GroundingItem:
    """A run, and the exchanges of its inputs that there are."""

    base: PromptRun
    sweeps: tuple[PatchRun, ...]

    @property
    def runs(self) -> dict[str, PromptRun]:
        """Its whole runs: the base, and what each input is exchanged for, by the input's name."""
        names = {kind: name for name, kind in INPUTS.items()}
        return {"base": self.base, **{names[one.kind]: one.donor for one in self.sweeps}}

    @property
    def prompts(self) -> tuple[PromptRun, ...]:
        """Its base and its donors."""
        return tuple(self.runs.values())

    @property
    def pair(self) -> str:
        """Its name in the tables."""
        return f"{self.base.recording.name}__{file_safe(self.base.targets[0])}"

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        return {
            "pair": self.pair,
            "clip": self.base.recording.name,
            "target": self.base.targets[0],
            "voice": self.base.recording.label,
        }


@dataclass(frozen=True)
class GroundingPlan:
    """The units of work for a set of recordings."""

    config: GroundingConfig
    corpus: Corpus

    @cached_property
    def items(self) -> list[GroundingItem]:
        """Every item that something can be exchanged in.

        Raises:
            InputError: there is none.
        """
        items = [one for one in self._every if one.sweeps]
        if not items:
            raise InputError(
                f"exchanging voices under {self.config.condition}: got no clip for which there is "
                "one of another label, of the same language, speaker and sentence. Add some, or "
                "leave out the columns in which they differ."
            )
        return items

    @cached_property
    def _every(self) -> list[GroundingItem]:
        """Clips and targets, with what there is to exchange."""
        condition, donors, found = self.config.condition, Donors(self.corpus, self.config.seed), []
        for clip in self.corpus.recordings:
            for target in self.corpus.targets(clip):
                named = target if condition == "conflict" else None
                base = PromptRun(clip, self.corpus.language(clip), condition, named, (target,))
                sweeps = (donors.sweep(base, kind) for kind in INPUTS.values())
                found.append(GroundingItem(base, tuple(one for one in sweeps if one)))
        return found

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
