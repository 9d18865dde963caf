"""Minimal pairs: clips that differ in one thing, accepted or rejected, and exchanged.

From recordings with labels, pairs are made of two recordings, or of one and a change of it. Each
has to keep the criteria of ``materials.pair_acceptance``; those that do are written as files that
other experiments take. On them, every place and depth is patched both ways, and every head is
patched and removed, which warns of heads that stand in for each other.

Source: M-MP; activation patching in both directions (Heimersheim and Nanda 2024).
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from hooked_alm import HookedALM
from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.reading.labels import LabelSet

from ..materials.clips import described_table
from ..materials.exchange import PairExchange
from ..materials.hearing import Hearing, heard_alike
from ..materials.pair_acceptance import Accepted, accept
from ..materials.pair_candidates import Candidate, ClipVersion, PairMaterial
from ..materials.pair_files import write_pairs
from ..materials.recordings import load_recordings
from ..materials.records import collect
from ..materials.subject import ModelExperiment, described
from ..workbench.batches import BatchedExperiment, batch_units
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row, Tables
from .claims import CLAIMS, CONTROLS
from .measure import PairSweep, heard, places_of, probe_point
from .pages import CAVEATS, fill_page, lead, method
from .settings import MinimalPairsConfig
from .tables import MAY_LACK, TABLES, PairResults, summarise


@dataclass(frozen=True)
class ClipWork:
    """A clip that is measured and heard."""

    clip: ClipVersion


@dataclass(frozen=True)
class SweepWork:
    """The sweeps of an accepted pair."""

    candidate: Candidate
    answers: tuple[str, str]

    @property
    def clip(self) -> ClipVersion:
        """The first of its clips."""
        return self.candidate.a


@dataclass(frozen=True)
class WriteWork:
    """The accepted pairs, which are written together."""

    pairs: tuple[SweepWork, ...]


class MinimalPairs(BatchedExperiment[MinimalPairsConfig], ModelExperiment[MinimalPairsConfig]):
    """Making, judging, writing and exchanging minimal pairs."""

    name = "minimal_pairs"
    title = "Minimal pairs"
    question = "Which pairs of clips differ in one thing alone, and what does exchanging them do?"
    Config = MinimalPairsConfig
    tables, may_lack = TABLES, MAY_LACK
    controls, claims = CONTROLS, CLAIMS
    caveats = CAVEATS
    leaves = ("pairs",)

    def identify(self) -> dict[str, Any]:
        """Reads recordings, makes every pair, and prepares every prompt."""
        config = self.config
        source = CLIPS if config.audio == "bundled" else config.audio
        recordings = load_recordings(source, label_column=config.attribute)
        self.material = PairMaterial(config, recordings)
        self._accepted: Accepted | None = None
        if not self.material.candidates:
            raise InputError(
                f"making pairs of {len(recordings)} recordings: got none of "
                f"{', '.join(config.kinds)}, expected two clips of one speaker and text with other "
                "labels, or whose texts differ in one word. Add such clips, or other kinds."
            )
        self.model = self.lay_out(hears=True)
        self.point = probe_point(self.model, config.probe_point)
        hearing = Hearing(partial(_read, self.model, config))
        clips = collect("hearing", hearing.clip, self.material.versions, _where)
        self.prompts = {
            one.name: self._prompt(one, clip)
            for one, clip in zip(self.material.versions, clips, strict=True)
        }
        self.labels = {key: self._labels(key) for key in self.material.segments}
        return {
            "model": described(self.model, config),
            **described_table(source),
            "recordings": {one.name: one.sha256 for one in recordings},
            "probe_point": self.point,
            "prompts": self.material.segments,
            "answers": self.material.answers,
            "pairs": [[one.id, one.a.name, one.b.name] for one in self.material.candidates],
        }

    def _prompt(self, version: ClipVersion, clip: AudioClip) -> ALMInput:
        segments = self.material.segments[version.recording.name]
        return self.model.prepare([[clip]], segments=segments)

    def _labels(self, recording: str) -> LabelSet:
        """The answers of all recordings that are asked what one is asked."""
        asked, answers = self.material.segments, self.material.answers
        words = sorted({answers[name] for name in asked if asked[name] == asked[recording]})
        if len(words) < 2:
            raise InputError(
                f"scoring answers: got {words[0]!r} alone, expected two at least. Give recordings "
                f"of other labels, or a column answer."
            )
        return LabelSet.from_texts(self.model.tokenizer, {word: word for word in words})

    def load(self) -> None:
        """Loads the weights; prompts go where the model is."""
        super().load()
        device = self.model.cfg.device
        self.prompts = {name: x.to(device) for name, x in self.prompts.items()}

    # --- Units

    def units(self) -> list[Unit]:
        """Clips, some batches a unit: how they sound, and what they are heard as."""
        works = ((f"clip__{one.name}", ClipWork(one)) for one in self.material.versions)
        return batch_units(works, self.config)

    def further_units(self, tables: Tables) -> list[Unit]:
        """The accepted pairs: their sweeps, and one unit that writes them."""
        run = self.results(self.config, {}, tables)
        pairs = self._acceptance(run).pairs.set_index("pair")
        scores = run["clips"].set_index("clip").scores
        accepted = tuple(
            SweepWork(one, self._answered(one, scores))
            for one in self.material.candidates
            if pairs.accepted[one.id]
        )
        works = ((f"pair__{one.candidate.id}", one) for one in accepted)
        written = [Unit("written", WriteWork(accepted))] if accepted else []
        return batch_units(works, self.config) + written

    def _acceptance(self, run: PairResults) -> Accepted:
        """What acceptance comes to: of a run's clips, which are the same whenever it is asked."""
        if self._accepted is None:
            self._accepted = accept(self.material, run["clips"], run.draws)
        return self._accepted

    def _answered(self, one: Candidate, scores: "pd.Series[Any]") -> tuple[str, str]:
        """Answers of both clips; of a changed one, that which the change brings nearest."""
        answer, other = one.answers
        if other is None:
            names = self.labels[one.a.recording.name].names
            gains = dict(
                zip(names, pd.Series(scores[one.b.name]) - scores[one.a.name], strict=True)
            )
            other = max((name for name in names if name != answer), key=gains.__getitem__)
        return answer, other

    def measure(self, unit: Unit) -> UnitResult:
        """Some clips, the sweeps of some pairs, or the files of all."""
        work = unit.payload
        if not isinstance(work, WriteWork):
            return super().measure(unit)
        pairs = [(one.candidate, one.answers) for one in work.pairs]
        return write_pairs(self.folder, self.model, self.material, pairs, self._clip)

    def _clip(self, version: ClipVersion) -> AudioClip:
        return self.prompts[version.name].clips[0]

    def n_positions(self, work: ClipWork | SweepWork) -> int:
        """Positions of a clip's prompt; those of a pair are as long as each other."""
        return self.prompts[work.clip.name].shape[1]

    def batch_kind(self, work: ClipWork | SweepWork) -> Hashable:
        """What is asked, the places that are patched, and what decides how clips are encoded."""
        x, asked = self.prompts[work.clip.name], self.material.segments[work.clip.recording.name]
        return tuple(asked), tuple(places_of(x)), heard_alike(self.model, x.clips)

    def measure_batch(self, works: Sequence[ClipWork | SweepWork]) -> list[UnitResult]:
        """Some clips of one question, or the sweeps of some pairs."""
        sweeps = [one for one in works if isinstance(one, SweepWork)]
        return self._sweeps(sweeps) if sweeps else self._clips([one.clip for one in works])

    def _clips(self, versions: Sequence[ClipVersion]) -> list[UnitResult]:
        config, results = self.config, []
        x = ALMInput.joined([self.prompts[one.name] for one in versions])
        labels = self.labels[versions[0].recording.name]
        said = heard(self.model, x, labels, self.point)
        for one, (state, scores) in zip(versions, said, strict=True):
            clip = self._clip(one)
            row: Row = {"clip": one.name, "recording": one.recording.name, "change": one.change}
            row |= {"frames": sum(clip.n_frames), "tokens": clip.n_tokens, **one.sound(config)}
            row |= {"state": state.tolist(), "scores": scores.tolist()}
            results.append(UnitResult({"clips": [row]}, {"answers": [*labels.names]}))
        return results

    def _sweeps(self, works: Sequence[SweepWork]) -> list[UnitResult]:
        config, sides = self.config, [(one.candidate.a, one.candidate.b) for one in works]
        base, donor = (
            ALMInput.joined([self.prompts[one.name] for one in side])
            for side in zip(*sides, strict=True)
        )
        ids = [[self._first(answer) for answer in one.answers] for one in works]
        metric = LogitDiff([one for one, _ in ids], [other for _, other in ids])
        exchange = PairExchange(
            self.model, base, donor, metric, "error", config.engine, config.max_bytes
        )
        sweep = PairSweep(exchange, places_of(base[0]), self._reference(works[0]))
        tables, results = {"depths": sweep.depths(), "heads": sweep.heads()}, []
        for number, work in enumerate(works):
            one = work.candidate
            who: Row = {"pair": one.id, "attribute": one.attribute, "group": one.group}
            found = {
                name: [
                    {**who, **row}
                    for row in cells[cells.example == number]
                    .drop(columns="example")
                    .to_dict("records")
                ]
                for name, cells in tables.items()
            }
            spans = [self.prompts[side.name].spans.to_json() for side in (one.a, one.b)]
            record = {**who, "answers": [*work.answers], "tokens": ids[number], "spans": spans}
            results.append(UnitResult(found, record))
        return results

    def _first(self, answer: str) -> int:
        return int(self.model.tokenizer(answer, add_special_tokens=False)["input_ids"][0])

    def _reference(self, work: SweepWork) -> ALMInput | None:
        """The first recordings that are asked the same, as they are."""
        if self.config.ablation == "zero":
            return None
        asked = self.material.segments
        own = asked[work.candidate.a.recording.name]
        names = [one.name for one in self.material.recordings if asked[one.name] == own]
        return ALMInput.joined([self.prompts[name] for name in names[: self.config.n_reference]])

    # --- What is made of it

    def summaries(self, run: PairResults) -> Iterable[tuple[str, pd.DataFrame]]:
        """See `summarise`."""
        return summarise(run, self._acceptance(run))

    def lead(self, run: PairResults) -> str:
        """See `pages.lead`."""
        return lead(run)

    def page(self, page: Page, run: PairResults) -> None:
        """See `pages.fill_page`."""
        fill_page(page, run)

    def method(self, run: PairResults) -> str:
        """See `pages.method`."""
        return method(run)


def _where(version: ClipVersion) -> str:
    return version.recording.where


def _read(model: HookedALM, config: MinimalPairsConfig, version: ClipVersion) -> AudioClip:
    """A clip as the model hears it."""
    if version.is_file(config):
        return model.read_clip(version.recording.path, truncate=config.truncate)
    clip = model.read_clip(version.samples(config), truncate=config.truncate)
    return replace(clip, name=version.name)
