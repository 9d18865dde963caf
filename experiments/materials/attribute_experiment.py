"""An experiment on clips that are asked for attributes: what it reads, and checks beforehand."""

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd

from hooked_alm.bundled import CLIPS
from hooked_alm.inputs import ALMInput

from ..workbench.batches import BatchedExperiment, batch_units
from ..workbench.experiment import Unit, UnitResult
from ..workbench.results import ItemRows, Results
from .attribute_prompts import (
    AttributePrompt,
    AttributePrompts,
    AttributesConfig,
    HeardAs,
    labelled,
)
from .clips import Sounds, described_table, file_safe, manifest
from .confounds import confounds
from .hearing import described_clip
from .recordings import Recording, load_recordings
from .records import collect
from .subject import ModelExperiment, described

A = TypeVar("A", bound=AttributesConfig)


@dataclass(frozen=True)
class AttributeWork:
    """Something that is done with a prompt."""

    prompt: AttributePrompt

    @property
    def prompts(self) -> tuple[AttributePrompt, ...]:
        """Every prompt that it runs."""
        return (self.prompt,)

    @property
    def name(self) -> str:
        """Names a unit."""
        kind, of = type(self).__name__.lower(), self.prompt
        return "__".join([kind, of.clip.name, file_safe(of.attribute), of.format, of.heard])


class AttributeExperiment(BatchedExperiment[A], ModelExperiment[A]):
    """Asks a model about clips, whose table says what is right."""

    def identify(self) -> dict[str, Any]:
        """Reads the clips and their attributes, and checks every prompt."""
        config = self.config
        source = CLIPS if config.audio == "bundled" else config.audio
        self.recordings = load_recordings(source, label_column=None)
        self.prompts = AttributePrompts(config, self.recordings)
        self.model = self.lay_out(hears=True)
        clips = self.prompts.hear(self.model)
        self.items = [*labelled(self.recordings, self.prompts.wordings)]
        first = {name: self.asked(clip, name) for clip, name in reversed(self.items)}
        self.absences: Sequence[HeardAs] = ()
        if config.absences:
            self.absences = self.prompts.absences(next(iter(first.values())))
        collect("making prompts", self._check, self.units(), lambda unit: unit.id)
        return {
            "model": described(self.model, config),
            **described_table(source),
            **self.prompts.described(),
            "absences": [*self.absences],
            "audio_is_behind": {
                name: self.prompts.audio_is_behind(first[name]) for name in self.prompts.wordings
            },
            "clips": [
                {"name": one.name, **described_clip(one, clip)}
                for one, clip in zip(self.recordings, clips, strict=True)
            ],
        }

    def _check(self, unit: Unit) -> None:
        """Make every prompt, which could fail in the midst of a run."""
        for work in () if isinstance(unit.payload, Sounds) else unit.payload:
            self.n_positions(work)

    def asked(self, clip: Recording, attribute: str, heard: HeardAs = "audio") -> AttributePrompt:
        """The prompt of whose run more than the answer is looked at."""
        return AttributePrompt(clip, attribute, self.config.causal_prompt, heard)

    def readings(self) -> list[AttributePrompt]:
        """Every clip in every format, and without its audio."""
        every = [
            AttributePrompt(clip, attribute, one)
            for clip, attribute in self.items
            for one in self.prompts.formats[attribute]
        ]
        return every + [self.asked(*item, heard) for item in self.items for heard in self.absences]

    def of_another_label(self, prompt: AttributePrompt) -> AttributePrompt | None:
        """The same of a clip of another label, drawn for the prompt; None where there is none."""
        same = [self.asked(clip, name) for clip, name in self.items if name == prompt.attribute]
        others = [one for one in same if one.label != prompt.label]
        rng = prompt.random(self.config.seed + 1)
        return others[rng.integers(len(others))] if others else None

    def batched(self, works: Iterable[AttributeWork]) -> list[Unit]:
        """Works of one type, some batches a unit."""
        return batch_units(((work.name, work) for work in works), self.config)

    def n_positions(self, work: AttributeWork) -> int:
        """Positions of the longest of its prompts."""
        return max(map(self.prompts.length, work.prompts))

    def batch_kind(self, work: AttributeWork) -> Hashable:
        """The attribute and its words, and what is heard."""
        return work.prompt.attribute, work.prompt.format, work.prompt.heard

    def measure(self, unit: Unit) -> UnitResult:
        """The works of a unit, or the sound of some clips."""
        work = unit.payload
        return work.measured() if isinstance(work, Sounds) else super().measure(unit)

    def measure_batch(self, works: Sequence[AttributeWork]) -> list[UnitResult]:
        """The rows of some works of one kind."""
        x = self.prompts.input(*(work.prompt for work in works))
        found = self.tables_of(works, x)
        return [
            UnitResult(
                {name: rows[n] for name, rows in found.items()}, {"spans": x.spans.row_to_json(n)}
            )
            for n in range(len(works))
        ]

    @abstractmethod
    def tables_of(self, works: Sequence[Any], x: ALMInput) -> dict[str, ItemRows]:
        """Table -> rows of every work of a batch, whose prompts ``x`` has."""

    def summaries(self, run: Results[A]) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what else than an attribute tells its labels apart."""
        yield "manifest", (clips := manifest(self.recordings, run["sounds"]))
        found = [
            confounds(clips, name, seed=self.config.seed).assign(attribute=name)
            for name in self.prompts.wordings
        ]
        yield "confounds", pd.concat(found, ignore_index=True)
