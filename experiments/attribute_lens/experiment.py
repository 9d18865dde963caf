"""Where are a clip's attributes read, and how does the answer get at them?

Every clip is asked for its attributes in up to three formats. The lens says from which depth on the
label can be read, at the readout and at the word that names the attribute; attention knockout, what
is answered without the audio, and enrichment say what is used.

Source: AudioLens (Neo Ho et al. 2025); M-AL-1 to M-AL-5.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pandas as pd

from hooked_alm.bundled import CLIPS
from hooked_alm.inputs import ALMInput

from ..materials.attribute_prompts import (
    AttributePrompt,
    AttributePrompts,
    HeardAs,
    labelled,
)
from ..materials.clips import Sounds, described_table, manifest, sound_units
from ..materials.confounds import confounds
from ..materials.held_out import split_groups
from ..materials.recordings import Recording, load_recordings
from ..materials.records import collect
from ..materials.resampling import SPEAKER
from ..materials.subject import ModelExperiment, described
from ..materials.trained_lens import described_lens, open_lens
from ..workbench.batches import BatchedExperiment, batch_units
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Tables
from .claims import CLAIMS, CONTROLS
from .measure import AttributeMeasures
from .pages import CAVEATS, fill_page, lead, method
from .plan import (
    AttributeWork,
    EnrichmentSearch,
    EnrichmentTest,
    Knockouts,
    Reading,
    is_searched,
    work_name,
)
from .settings import DEFECTS, AttributeLensConfig
from .tables import MAY_LACK, TABLES, AttributeResults, chosen_enrichment, summarise
from .truths import TRUTHS


class AttributeLens(BatchedExperiment[AttributeLensConfig], ModelExperiment[AttributeLensConfig]):
    """AudioLens on any model with an audio front-end, any attributes and labels."""

    name = "attribute_lens"
    title = "Attribute lens"
    question = "Where are a clip's attributes read, and how does the answer get at them?"
    Config = AttributeLensConfig
    tables, may_lack = TABLES, MAY_LACK
    defects, controls, claims, caveats = DEFECTS, CONTROLS, CLAIMS, CAVEATS
    truths = TRUTHS

    def identify(self) -> dict[str, Any]:
        """Reads the clips and their attributes, and checks every prompt."""
        config = self.config
        source = CLIPS if config.audio == "bundled" else config.audio
        self.recordings = load_recordings(source, label_column=None)
        self.prompts = AttributePrompts(config, self.recordings, config.causal_prompt)
        self.model = self.lay_out(hears=True)
        config.check_enrichment(len(self.model.path))
        clips = self.prompts.hear(self.model, with_silence=config.absences)
        is_by_speaker = config.cluster == SPEAKER
        groups = {
            one.name: one.cells[SPEAKER] if is_by_speaker else one.name for one in self.recordings
        }
        parts = split_groups([*groups.values()], config.validation_share, config.seed)
        self.parts = {name: parts[group] for name, group in groups.items()}
        self.items = [*labelled(self.recordings, self.prompts.wordings)]
        first = {name: self._prompt(clip, name) for clip, name in reversed(self.items)}
        self.absences: Sequence[HeardAs] = ()
        if config.absences:
            self.absences = self.prompts.absences(next(iter(first.values())))
        collect("making prompts", self._check, self.units(), lambda unit: unit.id)
        return {
            "model": described(self.model, config),
            **described_lens(config.tuned_lens),
            **described_table(source),
            **self.prompts.described(),
            "absences": [*self.absences],
            "audio_is_behind": {
                name: self.prompts.audio_is_behind(first[name]) for name in self.prompts.wordings
            },
            "validation": sorted(n for n, part in self.parts.items() if part == "discovery"),
            "clips": [
                {"name": one.name, "sha256": one.sha256, "seconds": clip.seconds,
                 "audio_tokens": clip.n_tokens, "notes": [*one.notes, *clip.notes]}
                for one, clip in zip(self.recordings, clips, strict=True)
            ],
        }  # fmt: skip

    def _check(self, unit: Unit) -> None:
        """Make every prompt, which could fail in the midst of a run."""
        for work in () if isinstance(unit.payload, Sounds) else unit.payload:
            self.n_positions(work)

    def load(self) -> None:
        """Loads the weights, and the lens."""
        super().load()
        self.lenses = {"logit": open_lens(None, self.model, "final")}
        if self.config.tuned_lens is not None:
            self.lenses["tuned"] = open_lens(self.config.tuned_lens, self.model, "final")

    def _prompt(self, clip: Recording, attribute: str, heard: HeardAs = "audio") -> AttributePrompt:
        return AttributePrompt(clip, attribute, self.config.causal_prompt, heard)

    def units(self) -> list[Unit]:
        """Readings, knockouts, and the search for an enrichment; then how the clips sound."""
        items = self.items
        readings = [
            Reading(AttributePrompt(clip, attribute, one))
            for clip, attribute in items
            for one in self.prompts.formats[attribute]
        ]
        readings += [
            Reading(self._prompt(*item, heard)) for item in items for heard in self.absences
        ]
        works: list[list[AttributeWork]] = [
            [*readings], [Knockouts(self._prompt(*item)) for item in items]
        ]  # fmt: skip
        if self.config.enrich_modes:
            searched = [item for item in items if is_searched(self.parts, item[0])]
            works.append([EnrichmentSearch(self._prompt(*item)) for item in searched])
        units = [unit for some in works for unit in self._units(some)]
        return units + sound_units(self.recordings)

    def further_units(self, tables: Tables) -> list[Unit]:
        """The enrichment that was best on some clips, on the others."""
        works: list[AttributeWork] = []
        for attribute, chosen in chosen_enrichment(tables.get("enrichment_search")).items():
            for clip, name in self.items:
                if name == attribute and not is_searched(self.parts, clip):
                    prompt = self._prompt(clip, attribute)
                    works.append(EnrichmentTest(prompt, chosen, self._other(prompt)))
        return self._units(works)

    def _units(self, works: Sequence[AttributeWork]) -> list[Unit]:
        return batch_units(((work_name(work), work) for work in works), self.config)

    def _other(self, prompt: AttributePrompt) -> Recording | None:
        """A clip of another label, drawn for the prompt."""
        others = [
            clip
            for clip, attribute in self.items
            if attribute == prompt.attribute and clip.cells[attribute] != prompt.label
        ]
        rng = prompt.random(self.config.seed + 1)
        return others[rng.integers(len(others))] if others else None

    # --- What is measured

    def n_positions(self, work: AttributeWork) -> int:
        """Positions of its prompt; of a test against another clip, of the longer one."""
        prompts = [work.prompt]
        if isinstance(work, EnrichmentTest) and work.other is not None:
            prompts.append(self._prompt(work.other, work.prompt.attribute))
        return max(map(self.prompts.length, prompts))

    def batch_kind(self, work: AttributeWork) -> Hashable:
        """The attribute and its words, what is heard, and what is enriched how."""
        prompt = work.prompt
        kind = (prompt.attribute, prompt.format, prompt.heard)
        if isinstance(work, EnrichmentTest):
            return (*kind, work.chosen, work.other is None)
        return kind

    def measure(self, unit: Unit) -> UnitResult:
        """Some forwards with their read-outs, some sweeps, or the sound of some clips."""
        work = unit.payload
        return work.measured() if isinstance(work, Sounds) else super().measure(unit)

    def measure_batch(self, works: Sequence[AttributeWork]) -> list[UnitResult]:
        """The rows of some works of one kind."""
        prompts, first = [work.prompt for work in works], works[0]
        attribute = first.prompt.attribute
        ours = AttributeMeasures(
            self.model, self.lenses, self.prompts.labels[attribute], self.config, prompts,
            self.prompts.input(*prompts), self.prompts.ends_in_mention(attribute),
        )  # fmt: skip
        if isinstance(first, Reading) and first.prompt.heard != "audio":
            heard = first.prompt.heard
            found = {"absences": [[{**row, "heard": heard} for row in r] for r in ours.answers()]}
        elif isinstance(first, Reading):
            found = dict(zip(("answers", "information"), ours.reading(), strict=True))
        elif isinstance(first, Knockouts):
            found = {"knockout": ours.knockouts()}
        elif isinstance(first, EnrichmentSearch):
            found = {"enrichment_search": ours.search()}
        else:
            others = [
                self._prompt(work.other, attribute)
                for work in works
                if isinstance(work, EnrichmentTest) and work.other is not None
            ]
            other = self.prompts.input(*others) if others else None
            found = {"enrichment": ours.enriched(first.chosen, other)}
        return [
            UnitResult({name: rows[n] for name, rows in found.items()}, {"spans": spans})
            for n, spans in enumerate(self._spans(ours.x))
        ]

    @staticmethod
    def _spans(x: ALMInput) -> list[dict[str, Any]]:
        return [
            {name: rows[row] for name, rows in x.spans.to_json().items()} for row in range(len(x))
        ]

    # --- What is made of it

    def summaries(self, run: AttributeResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, what else tells their labels apart, and what `summarise` makes of it all."""
        yield "manifest", (clips := manifest(self.recordings, run["sounds"]))
        found = [
            confounds(clips[clips[name].notna()], name, seed=self.config.seed).assign(
                attribute=name
            )
            for name in self.prompts.wordings
        ]
        yield "confounds", pd.concat(found, ignore_index=True)
        yield from summarise(run)

    def lead(self, run: AttributeResults) -> str:
        """What was asked of which clips."""
        return lead(run)

    def page(self, page: Page, run: AttributeResults) -> None:
        """What was asked, answers, lens, attention and enrichment."""
        fill_page(page, run, self.recordings)

    def method(self, run: AttributeResults) -> str:
        """How scores and intervals were made."""
        return method(run)
