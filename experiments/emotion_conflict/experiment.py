"""Where does the voice lose against the instruction?

A voice carries a label A, such as an emotion; the instruction names another, T. The experiment
reads the label logits at every depth (lens), exchanges the text's and the voice's part of the run
(patching), and sums attention by segment.

Source: seed 000; M-000-1 to M-000-15.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import pandas as pd

from hooked_alm.audio import read_audio
from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.patching.alignment import align
from hooked_alm.methods.reading.labels import LabelSet

from ..materials.clips import described_table, manifest
from ..materials.confounds import confound_table
from ..materials.hearing import Hearing
from ..materials.instructions import PromptSegments
from ..materials.recordings import Recording, load_recordings, match_loudness
from ..materials.records import collect
from ..materials.subject import ModelExperiment, described
from ..materials.trained_lens import described_lens, open_lens
from ..workbench.batches import bucketed
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


class EmotionConflict(ModelExperiment[EmotionConflictConfig]):
    """The experiment of seed 000, on any model with an audio front-end and any labels."""

    name = "emotion_conflict"
    title = "Emotion conflict"
    question = "Where does the voice lose against the instruction?"
    Config = EmotionConflictConfig
    schema_version = 4
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
        heard = collect(f"hearing {source}", hearing.clip, self.recordings, lambda one: one.where)
        self.clips = {one.name: clip for one, clip in zip(self.recordings, heard, strict=True)}
        self.labels = {
            language: LabelSet.from_texts(
                self.model.tokenizer, self.corpus.words(language), config.label_mode
            )
            for language in self.corpus.languages
        }
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
            work = unit.payload
            runs = (work.base, work.donor) if isinstance(work, PatchRun) else work
            lengths = [self.clips[run.recording.name].n_tokens for run in runs]
            prompts = [(n, *self._segments(run)) for n, run in zip(lengths, runs, strict=True)]
            if isinstance(work, PatchRun):
                if (alike := tuple(prompts)) not in seen:
                    seen.add(alike)
                    self._check_sweep(unit)
                continue
            for run, prompt in zip(runs, prompts, strict=True):
                if prompt not in seen:
                    seen.add(prompt)
                    self.input(run)

    def _check_sweep(self, unit: Unit) -> None:
        base, donor = self.input(unit.payload.base), self.input(unit.payload.donor)
        if self.config.align == "dtw":  # aligns spans of any length, by activations
            return
        try:
            for spans in self.config.patched_spans().values():
                align(base, donor, spans, policy=self.config.align_policies())
        except InputError as error:
            error.add_note(f"This would happen in unit {unit.id}; nothing was run.")
            raise

    def input(self, *runs: PromptRun) -> ALMInput:
        """The prompts of some runs, as one batch."""
        clips = [self.clips[run.recording.name] for run in runs]
        return self.model.prepare(clips, segments=[self._segments(run) for run in runs])

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
        """All runs, then all sweeps."""
        return self.plan.units

    def measure(self, unit: Unit) -> UnitResult:
        """Some forwards with their read-outs, or one sweep."""
        work = unit.payload
        return self._sweep(unit) if isinstance(work, PatchRun) else self._read(work)

    def _measures(self, language: str) -> ConflictMeasures:
        return ConflictMeasures(self.model, self.lens, self.labels[language], self.config)

    def _sweep(self, unit: Unit) -> UnitResult:
        work: PatchRun = unit.payload
        x, donor = self.input(work.base), self.input(work.donor)
        rows, found = self._measures(work.base.language).sweep(work, x, donor)
        record = self._described(work.base, x) | {"donor": self._described(work.donor, donor)}
        return UnitResult({"patching": [{"unit": unit.id, **row} for row in rows]}, record | found)

    def _read(self, runs: Sequence[PromptRun]) -> UnitResult:
        """The runs in batches of one language and about one length; results in their order."""
        config, inputs = self.config, [self.input(run) for run in runs]
        batches = bucketed(
            [x.shape[1] for x in inputs], config.batch_size, config.batch_positions,
            kinds=[run.language for run in runs],
        )  # fmt: skip
        found: dict[int, tuple[dict[str, list[Row]], Row]] = {}
        for batch in batches:
            some = [runs[index] for index in batch]
            x = inputs[batch[0]] if len(batch) == 1 else self.input(*some)
            found |= zip(batch, self._measures(some[0].language).runs(some, x), strict=True)
        tables: dict[str, list[Row]] = defaultdict(list)
        records = []
        for index, run in enumerate(runs):
            of_run, about = found[index]
            name = {"unit": self.plan.run_id(run)}
            for table, rows in of_run.items():
                tables[table] += [{**name, **row} for row in rows]
            records.append({**name, **self._described(run, inputs[index]), **about})
        return UnitResult(dict(tables), {"runs": records})

    def _described(self, run: PromptRun, x: ALMInput) -> Row:
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
        yield "manifest", manifest(self.recordings)
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
