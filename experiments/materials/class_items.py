"""Clips under instructions as items of classes, in two halves that share no group."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hooked_alm.errors import InputError

from ..workbench.controls import Outcome
from ..workbench.results import Row
from .conflict_corpus import Corpus
from .conflict_runs import INPUTS, Donors, PatchRun, PromptRun, prompt_runs
from .conflict_settings import ConflictConfig
from .held_out import Half, halved
from .held_out_labels import ColumnName
from .instructions import PromptMode


@dataclass(frozen=True)
class ClassItem:
    """A clip under an instruction, and its class."""

    run: PromptRun
    cls: str
    group: str
    """What it is held out with."""
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


class ClassItemsConfig(ConflictConfig):
    """Settings of experiments whose items have a class, which is learnt on one half of them."""

    condition: Literal["audio_only", "conflict"] = Field(
        default="audio_only", description="what is asked: conflict names another label"
    )
    rule: Literal["voice", "instruction"] = Field(
        default="voice", description="whose label is an item's class, and its right answer"
    )
    group: ColumnName | None = Field(
        default=None,
        description="column whose values are held out whole, and resampled; None is speaker, else "
        "every clip by itself",
    )

    @model_validator(mode="after")
    def _names_a_label(self) -> "ClassItemsConfig":
        if self.rule == "instruction" and self.condition != "conflict":
            raise ValueError("rule 'instruction' needs condition 'conflict', which names a label")
        return self


@dataclass(frozen=True)
class ClassItems:
    """The items of a corpus, whose groups, such as speakers, are dealt into two halves.

    Something is learnt on one of them, and judged on the other.
    """

    config: ClassItemsConfig
    corpus: Corpus
    share: float
    """Of the groups that it is learnt on."""
    into: str
    """What the halves are."""

    @cached_property
    def halves(self) -> dict[str, tuple[str, Half]]:
        """Clip -> its group, and the half that this is of.

        Raises:
            InputError: clips without a group, or one group alone.
        """
        clips, config = self.corpus.recordings, self.config
        found = halved(clips, config.group, self.share, config.seed, self.into)
        return {clip.name: one for clip, one in zip(clips, found, strict=True)}

    @property
    def groups(self) -> dict[str, list[str]]:
        """The groups of either half."""
        found: dict[str, list[str]] = {}
        for group, half in sorted({*self.halves.values()}):
            found.setdefault(half, []).append(group)
        return found

    def under(self, mode: PromptMode) -> list[ClassItem]:
        """Every clip under instructions of a mode, one that names no label or another label."""
        by_voice = self.config.rule == "voice"
        return [
            ClassItem(
                run, run.recording.label if by_voice else str(run.named),
                *self.halves[run.recording.name],
            )
            for run in prompt_runs(self.corpus, [mode])
        ]  # fmt: skip

    @cached_property
    def held_out_conflicts(self) -> list[tuple[ClassItem, tuple[PatchRun, ...]]]:
        """Judged conflicts, each with such exchanges of audio and text as there are."""
        donors = Donors(self.corpus, self.config.seed)
        items = [one for one in self.under("conflict") if one.half == "held-out"]
        every = ([donors.sweep(one.run, kind) for kind in INPUTS.values()] for one in items)
        return [
            (i, tuple(one for one in some if one)) for i, some in zip(items, every, strict=True)
        ]

    @cached_property
    def asked(self) -> list[ClassItem]:
        """Every item that the settings ask about.

        Raises:
            InputError: one class alone, or one that a half lacks.
        """
        found = self.under(self.config.condition)
        by_half = {half: {one.cls for one in found if one.half == half} for half in self.groups}
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


def none_in_both(learnt_on: Iterable[str], judged_on: Iterable[str]) -> Outcome:
    """The outcome of a control: no group is in both halves."""
    groups = {*judged_on}
    both = sorted(groups & {*learnt_on})
    found = f"{', '.join(both)} in both" if both else f"{len(groups)} judged groups"
    return Outcome(found, "none is in both halves", not both)
