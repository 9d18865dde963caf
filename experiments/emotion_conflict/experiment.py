"""Where does the voice lose against the instruction?

A voice carries a label A, such as an emotion; the instruction names another, T. The experiment
reads the label logits at every depth (lens), exchanges the text's and the voice's part of the run
(patching), and sums attention by segment.

Source: seed 000; M-000-1 to M-000-15.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import pandas as pd

from hooked_alm.audio import read_audio
from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.patching.placement import Placement
from hooked_alm.methods.reading.labels import LabelSet

from ..materials.clips import Sounds, described_table, manifest
from ..materials.confounds import confound_table
from ..materials.hearing import Hearing
from ..materials.instructions import PromptSegments
from ..materials.recordings import Recording, load_recordings, match_loudness
from ..materials.records import collect
from ..materials.sources import shown
from ..materials.subject import ModelExperiment, described
from ..materials.trained_lens import described_lens, open_lens
from ..workbench.batches import BatchedExperiment
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row
from .claims import CLAIMS
from .controls import CONTROLS
from .corpus import Corpus
from .measure import ConflictMeasures
from .pages import CAVEATS, fill_page, lead, method
from .plan import PatchRun, PromptRun, WorkPlan
from .settings import DEFECTS, EmotionConflictConfig
from .tables import MAY_LACK, TABLES, EmotionResults, summarise


class EmotionConflict(
    BatchedExperiment[EmotionConflictConfig], ModelExperiment[EmotionConflictConfig]
):
    """The experiment of seed 000, on any model with an audio front-end and any labels."""

    name = "emotion_conflict"
    title = "Emotion conflict"
    question = "Where does the voice lose against the instruction?"
    Config = EmotionConflictConfig
    schema_version = 5
    tables, may_lack = TABLES, MAY_LACK
    defects, controls, claims, caveats = DEFECTS, CONTROLS, CLAIMS, CAVEATS

    def identify(self) -> dict[str, Any]:
        """Reads the clips, and checks every prompt."""
        config = self.config
        source = CLIPS if config.audio == "bundled" else config.audio
        self.recordings = load_recordings(source, config.n_clips, label_column=config.label_column)
        self.corpus = Corpus(config, self.recordings)
        self.model = self.lay_out(hears=True)
        config.patched_layers(self.model.cfg.n_layers)  # refuses blocks that the model lacks
        hearing = Hearing(self._read_clip)
        doing = f"hearing {shown(source)}"
        heard = collect(doing, hearing.clip, self.recordings, lambda one: one.where)
        self.clips = {one.name: clip for one, clip in zip(self.recordings, heard, strict=True)}
        self.labels = {
            language: LabelSet.from_texts(
                self.model.tokenizer, self.corpus.words(language), config.label_mode
            )
            for language in self.corpus.languages
        }
        self._lengths: dict[tuple[object, ...], int] = {}
        self._check()
        spans = self.input(self.plan.runs[0]).spans
        return {
            "model": described(self.model, config),
            **described_lens(config.tuned_lens),
            **described_table(source),
            "audio_is_first": max(spans.positions("audio", 0)) < min(spans.positions("text", 0)),
            "labels": list(self.corpus.labels),
            "prompts": self._prompts(),
            "label_token_ids": {language: self._label_ids(language) for language in self.labels},
            "sweeps_without_a_clip_for_the_donor": self.plan.impossible_sweeps(),
            "clips": [self._clip_facts(one, self.clips[one.name]) for one in self.recordings],
        }

    def load(self) -> None:
        """Loads the weights, and the lens."""
        super().load()
        self.lens = open_lens(self.config.tuned_lens, self.model, self.config.lens_norm)

    def _read_clip(self, recording: Recording) -> AudioClip:
        config = self.config
        clip = self.model.read_clip(recording.path, truncate=config.truncate)
        if config.loudness_dbfs is None:
            return clip
        assert self.model.prompts is not None
        rate = self.model.prompts.feature_extractor.sampling_rate
        waveform = read_audio(
            recording.path, sampling_rate=rate, max_seconds=clip.seconds, truncate=True
        )
        matched = self.model.read_clip(match_loudness(waveform.samples, config.loudness_dbfs))
        note = f"scaled to {config.loudness_dbfs:g} dBFS"
        return replace(matched, name=clip.name, notes=(*clip.notes, note))

    def _clip_facts(self, recording: Recording, clip: AudioClip) -> Row:
        return {
            "name": recording.name,
            "sha256": recording.sha256,
            "seconds": clip.seconds,
            "audio_tokens": clip.n_tokens,
            "notes": [*recording.notes, *clip.notes],
        }

    def _prompts(self) -> dict[str, dict[str, str]]:
        """The first prompt of every language and condition, word for word."""
        found: dict[str, dict[str, str]] = {}
        for run in self.plan.runs:
            said = "".join(text for _, text in self._segments(run))
            found.setdefault(run.language, {}).setdefault(run.condition, said)
        return found

    def _label_ids(self, language: str) -> dict[str, Any]:
        labels = self.labels[language]
        return dict(zip(labels.names, labels.spellings, strict=True))

    def _check(self) -> None:
        """Tokenise prompts and align spans, which could fail in the midst of a run.

        Prompts of the same words and as much audio are one for this, of however many clips.
        """
        seen = set[tuple[object, ...]]()
        for unit in self.units():
            for work in () if isinstance(unit.payload, Sounds) else unit.payload:
                self.n_positions(work)
                if isinstance(work, PatchRun):
                    alike = self._words(work.base), self._words(work.donor)
                    if alike not in seen:
                        seen.add(alike)
                        self._check_sweep(unit, work)

    def _check_sweep(self, unit: Unit, sweep: PatchRun) -> None:
        base, donor = self.input(sweep.base), self.input(sweep.donor)
        if self.config.align == "dtw":  # aligns spans of any length, by activations
            return
        try:
            places = [*self.config.patched_spans().values()]
            Placement(self.model, base, donor, places, self.config.align_policies())
        except InputError as error:
            error.add_note(f"This would happen in unit {unit.id}; nothing was run.")
            raise

    def input(self, *runs: PromptRun) -> ALMInput:
        """The prompts of some runs, as one batch."""
        return ALMInput.joined([
            self.model.prepare(self.clips[run.recording.name], segments=self._segments(run))
            for run in runs
        ])  # fmt: skip

    def _segments(self, run: PromptRun) -> PromptSegments:
        labels, words = self.corpus.labels, self.corpus.words(run.language).items()
        first = self._places[run.recording.name] % len(labels)
        return self.corpus.instructions[run.language].segments(
            run.condition,
            {name: word if isinstance(word, str) else word[0] for name, word in words},
            voice=run.recording.label,
            named=run.named,
            # A different label comes first in every clip, so that no place in the list is favoured.
            order=labels[first:] + labels[:first],
        )

    @cached_property
    def _places(self) -> dict[str, int]:
        return {one.name: place for place, one in enumerate(self.recordings)}

    @cached_property
    def plan(self) -> WorkPlan:
        """What is run on these recordings."""
        return WorkPlan(self.config, self.corpus)

    def units(self) -> list[Unit]:
        """All runs, then all sweeps; then how the clips sound."""
        return self.plan.units

    def measure(self, unit: Unit) -> UnitResult:
        """Some forwards with their read-outs, some sweeps, or the sound of some clips."""
        work = unit.payload
        return work.measured() if isinstance(work, Sounds) else super().measure(unit)

    def n_positions(self, work: PromptRun | PatchRun) -> int:
        """Positions of a run; of a sweep, of its longer run."""
        if isinstance(work, PatchRun):
            return max(self.n_positions(work.base), self.n_positions(work.donor))
        if (words := self._words(work)) not in self._lengths:
            self._lengths[words] = self.input(work).shape[1]
        return self._lengths[words]

    def _words(self, run: PromptRun) -> tuple[object, ...]:
        """What decides a prompt's length: how much is heard, and what is said."""
        return self.clips[run.recording.name].n_tokens, *self._segments(run)

    def batch_kind(self, work: PromptRun | PatchRun) -> Hashable:
        """The language, whose labels are read, and what the donor is."""
        # By donor, so that a run patched with itself is among the same prompts in both batches.
        if isinstance(work, PromptRun):
            return work.language
        return work.base.language, work.kind

    def measure_batch(self, works: Sequence[Any]) -> list[UnitResult]:
        """Runs, or sweeps."""
        return self._runs(works) if isinstance(works[0], PromptRun) else self._sweeps(works)

    def _measures(self, language: str) -> ConflictMeasures:
        return ConflictMeasures(self.model, self.lens, self.labels[language], self.config)

    def _runs(self, runs: Sequence[PromptRun]) -> list[UnitResult]:
        results, found = [], self._measures(runs[0].language).runs(runs, self.input(*runs))
        for run, (tables, about) in zip(runs, found, strict=True):
            name = {"unit": self.plan.run_id(run)}
            named = {table: [{**name, **one} for one in rows] for table, rows in tables.items()}
            results.append(UnitResult(named, name | self._described(run) | about))
        return results

    def _sweeps(self, sweeps: Sequence[PatchRun]) -> list[UnitResult]:
        bases, donors = ([getattr(one, name) for one in sweeps] for name in ("base", "donor"))
        measures, results = self._measures(bases[0].language), []
        found = measures.sweeps(sweeps, self.input(*bases), self.input(*donors))
        for sweep, (cells, about) in zip(sweeps, found, strict=True):
            name: Row = {"unit": self.plan.sweep_id(sweep.base, sweep.kind)}
            record = name | self._described(sweep.base) | about
            record["donor"] = self._described(sweep.donor)
            results.append(UnitResult({"patching": [{**name, **cell} for cell in cells]}, record))
        return results

    def _described(self, run: PromptRun) -> Row:
        x = self.input(run)
        return {
            **run.identity(),
            **self.config.model_dump(include={"model", "revision", "dtype", "seed", "variant"}),
            "known_defects": sorted(self.known_defects()),
            "spans": {name: rows[0] for name, rows in x.spans.to_json().items()},
            "position_ids": x.position_ids[0].tolist(),
            "token_ids": x.tokens[0].tolist(),
            "label_token_ids": self._label_ids(run.language),
        }

    def summaries(self, run: EmotionResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield "manifest", manifest(self.recordings, run["sounds"])
        made_equal = () if self.config.loudness_dbfs is None else ("rms_dbfs",)
        yield confound_table(run, self.config.label_column, without=made_equal)
        yield from summarise(run)

    def lead(self, run: EmotionResults) -> str:
        """What was asked of which clips."""
        return lead(run)

    def page(self, page: Page, run: EmotionResults) -> None:
        """What was asked, the answers, lens, patching and attention."""
        fill_page(page, run, self.recordings)

    def method(self, run: EmotionResults) -> str:
        """How intervals and recoveries were made."""
        return method(run)
