"""An experiment on clips under instructions: what it reads, makes, hears and checks beforehand."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float32

from hooked_alm.audio import read_audio
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.patching.placement import Placement
from hooked_alm.methods.reading.labels import LabelSet

from ..workbench.batches import BatchedExperiment
from ..workbench.experiment import Unit, UnitResult
from ..workbench.results import Results, Row
from .clips import Sounds, described_table, manifest
from .conflict_corpus import Corpus
from .conflict_runs import PatchRun, PromptRun
from .conflict_settings import ConflictConfig
from .confounds import confound_table
from .hearing import Hearing, described_clip
from .instructions import PromptSegments
from .recordings import Recording, load_recordings, match_loudness
from .records import collect
from .sources import shown
from .subject import ModelExperiment, described

K = TypeVar("K", bound=ConflictConfig)


@runtime_checkable
class ConflictWork(Protocol):
    """Some runs, and what of them is patched into what."""

    @property
    def prompts(self) -> tuple[PromptRun, ...]:
        """The runs that it makes."""

    @property
    def sweeps(self) -> tuple[PatchRun, ...]:
        """The bases and donors among them."""


@runtime_checkable
class ConflictPlan(Protocol):
    """What is run on the recordings of a corpus."""

    @property
    def runs(self) -> list[PromptRun]:
        """The runs that a reader is shown the prompts of."""

    @property
    def units(self) -> list[Unit]:
        """Units of `ConflictWork`, and of `Sounds`."""

    def impossible_sweeps(self) -> list[str]:
        """Sweeps that were asked for, but that no clip can be the donor of."""
        return []


class ConflictExperiment(BatchedExperiment[K], ModelExperiment[K]):
    """Asks a model about clips, and exchanges what it hears and what it is told."""

    @cached_property
    @abstractmethod
    def plan(self) -> ConflictPlan:
        """What is run."""

    def places(self) -> Sequence[tuple[str, ...]]:
        """Spans that are patched together, of every place; none where nothing is aligned."""
        return ()

    def identify(self) -> dict[str, Any]:
        """Reads the clips, and checks every prompt."""
        config = self.config
        source = config.source
        self.recordings = load_recordings(source, config.n_clips, label_column=config.label_column)
        self.corpus = Corpus(config, self.recordings)
        self.model = self.lay_out(hears=True)
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
            **described_table(source),
            "audio_is_first": max(spans.positions("audio", 0)) < min(spans.positions("text", 0)),
            "labels": list(self.corpus.labels),
            "prompts": self._prompts(),
            "label_token_ids": {language: self.label_ids(language) for language in self.labels},
            "sweeps_without_a_clip_for_the_donor": self.plan.impossible_sweeps(),
            "clips": [
                {"name": one.name, **described_clip(one, self.clips[one.name])}
                for one in self.recordings
            ],
        }

    def _read_clip(self, recording: Recording) -> AudioClip:
        config = self.config
        clip = self.model.read_clip(recording.path, truncate=config.truncate)
        if config.loudness_dbfs is None:
            return clip
        matched = self.model.read_clip(self._samples(recording, clip))
        note = f"scaled to {config.loudness_dbfs:g} dBFS"
        return replace(matched, name=clip.name, notes=(*clip.notes, note))

    def samples(self, recording: Recording) -> Float32[np.ndarray, " sample"]:
        """What is heard of a recording: samples at the model's rate, scaled where that is set."""
        return self._samples(recording, self.clips[recording.name])

    def _samples(self, recording: Recording, clip: AudioClip) -> Float32[np.ndarray, " sample"]:
        waveform = read_audio(
            recording.path, sampling_rate=self.sampling_rate, max_seconds=clip.seconds,
            truncate=True,
        )  # fmt: skip
        level = self.config.loudness_dbfs
        return waveform.samples if level is None else match_loudness(waveform.samples, level)

    @property
    def sampling_rate(self) -> int:
        """The model's, in Hz."""
        assert self.model.prompts is not None
        return int(self.model.prompts.feature_extractor.sampling_rate)

    def _prompts(self) -> dict[str, dict[str, str]]:
        """The first prompt of every language and condition, word for word."""
        found: dict[str, dict[str, str]] = {}
        for run in self.plan.runs:
            said = "".join(text for _, text in self._segments(run))
            found.setdefault(run.language, {}).setdefault(run.condition, said)
        return found

    def label_ids(self, language: str) -> dict[str, Any]:
        """Tokens of every spelling of the labels, by label."""
        labels = self.labels[language]
        return dict(zip(labels.names, labels.spellings, strict=True))

    def _check(self) -> None:
        """Tokenise prompts and align spans, which could fail in the midst of a run.

        Prompts of the same words and as much audio are one for this, of however many clips.
        """
        seen = set[tuple[object, ...]]()
        for unit in self.plan.units:
            for work in () if isinstance(unit.payload, Sounds) else unit.payload:
                self.n_positions(work)
                for sweep in work.sweeps:
                    alike = self._words(sweep.base), self._words(sweep.donor)
                    if alike not in seen:
                        seen.add(alike)
                        self._check_sweep(unit, sweep)

    def _check_sweep(self, unit: Unit, sweep: PatchRun) -> None:
        base, donor = self.input(sweep.base), self.input(sweep.donor)
        if self.config.align == "dtw":  # aligns spans of any length, by activations
            return
        try:
            Placement(self.model, base, donor, self.places(), self.config.align_policies())
        except InputError as error:
            error.add_note(f"This would happen in unit {unit.id}; nothing was run.")
            raise

    def input(self, *runs: PromptRun, heard: Sequence[AudioClip] = ()) -> ALMInput:
        """The prompts of some runs, as one batch.

        Args:
            runs: of the corpus.
            heard: clip of each, in the place of its own.
        """
        clips = heard or [self.clips[run.recording.name] for run in runs]
        return ALMInput.joined([
            self.model.prepare(clip, segments=self._segments(run))
            for run, clip in zip(runs, clips, strict=True)
        ])  # fmt: skip

    def _segments(self, run: PromptRun) -> PromptSegments:
        labels, words = self.corpus.labels, self.corpus.words(run.language).items()
        first = self._turns[run.recording.name] % len(labels)
        return self.corpus.instructions[run.language].segments(
            run.condition,
            {name: word if isinstance(word, str) else word[0] for name, word in words},
            voice=run.recording.label,
            named=run.named,
            # A different label comes first in every clip, so that no place in the list is favoured.
            order=labels[first:] + labels[:first],
        )

    @cached_property
    def _turns(self) -> dict[str, int]:
        return {one.name: place for place, one in enumerate(self.recordings)}

    def units(self) -> list[Unit]:
        """What the plan has, in its order."""
        return self.plan.units

    def measure(self, unit: Unit) -> UnitResult:
        """The works of a unit, or the sound of some clips."""
        work = unit.payload
        return work.measured() if isinstance(work, Sounds) else super().measure(unit)

    def n_positions(self, work: ConflictWork) -> int:
        """Positions of the longest of its runs."""
        return max(map(self._n_positions, work.prompts))

    def _n_positions(self, run: PromptRun) -> int:
        if (words := self._words(run)) not in self._lengths:
            self._lengths[words] = self.input(run).shape[1]
        return self._lengths[words]

    def _words(self, run: PromptRun) -> tuple[object, ...]:
        """What decides a prompt's length: how much is heard, and what is said."""
        return self.clips[run.recording.name].n_tokens, *self._segments(run)

    def record_of(self, run: PromptRun) -> Row:
        """What is kept of a run: its settings, its tokens, and which position is what."""
        x = self.input(run)
        return {
            **run.identity(),
            **self.config.model_dump(include={"model", "revision", "dtype", "seed", "variant"}),
            "known_defects": sorted(self.known_defects()),
            "spans": x.spans.row_to_json(0),
            "position_ids": x.position_ids[0].tolist(),
            "token_ids": x.tokens[0].tolist(),
            "label_token_ids": self.label_ids(run.language),
        }

    def summaries(self, run: Results[K]) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what else than their label tells them apart."""
        yield "manifest", manifest(self.recordings, run["sounds"])
        made_equal = () if self.config.loudness_dbfs is None else ("rms_dbfs",)
        yield confound_table(run, self.config.label_column, without=made_equal)
