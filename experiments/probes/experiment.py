"""What can be read off a model's states about a clip, at every depth?

Held-out probes of any column of a table of clips, at any hook points, beside what tells the column
without the model, and without its training.

Source: Beyond Transcription (arXiv 2508.15882), Hewitt and Liang (arXiv 1909.03368), Voita and
Titov (arXiv 2003.12298); M-BT-5, M-BT-6.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from hooked_alm.errors import InputError
from hooked_alm.inputs import AudioClip
from hooked_alm.methods.activations.depths import PlacedPoint, placed_points
from hooked_alm.methods.activations.means import PromptMeans, means_of

from ..materials.clips import Sounds, described_table, manifest, sound_units
from ..materials.hearing import heard_alike
from ..materials.held_out_labels import described_labels, held_out_labels
from ..materials.kept_features import FeatureSource, keep_features
from ..materials.probe_claims import PROBE_CONTROLS, PROBE_DEFECTS, probe_claims
from ..materials.probe_fits import OF_THE_CLIP, ProbeFit, clip_baselines, fit_units
from ..materials.probe_pages import fill_with_probes
from ..materials.probe_tables import PROBE_TABLES, ProbeResults, summarise
from ..materials.random_weights import UntrainedToo
from ..materials.recordings import load_clips
from ..materials.records import collect
from ..materials.subject import described
from ..workbench.batches import bucketed, heaviest
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Tables
from .pages import CAVEATS, lead, method
from .settings import ProbesConfig


class Probes(UntrainedToo[ProbesConfig]):
    """Units keep the features of some clips; further ones fit probes of a column and a point."""

    name = "probes"
    title = "Probes"
    question = "What can be read off the model's states about a clip, at every depth?"
    Config = ProbesConfig
    schema_version = 2
    tables, controls, caveats = PROBE_TABLES, PROBE_CONTROLS, CAVEATS
    claims = probe_claims("decodable", "learnt", "deeper", "selective")
    defects = PROBE_DEFECTS
    leaves = ("arrays",)

    def identify(self) -> dict[str, Any]:
        """Reads the clips and the table, and makes the folds."""
        config = self.config
        self.clips = load_clips(config.source)
        self.labels = held_out_labels(self.clips, config)
        self.model = self.lay_out(hears=True)
        self.kept, self.points = placed_points(self.model, config.points)
        if config.untrained:
            self.check_drawable()
        numbers = range(len(self.clips))
        self._positions = collect("hearing the clips", self._n_tokens, numbers, self._where)
        self._check_span(self._clip(0))
        return {
            "model": described(self.model, config),
            **described_table(config.source),
            "clips": {clip.name: clip.sha256 for clip in self.clips},
            "labels": [*described_labels(self.labels)],
            "points": {one.name: [one.stream, one.depth] for one in self.points},
            "span": self._span,
            "baselines": OF_THE_CLIP,
        }

    def _where(self, number: int) -> str:
        return self.clips[number].where

    def _n_tokens(self, number: int) -> int:
        return self._clip(number).n_tokens

    def _clip(self, number: int) -> AudioClip:
        return self.config.read(self.model, self.clips[number])

    def _check_span(self, clip: AudioClip) -> None:
        """Refuse a span that prompts lack, before anything runs."""
        x = self.config.heard(self.model, [clip], stand_in="en")
        if any(one.kind == "prompt" for one in self.kept) and self._span not in x.spans:
            raise InputError(
                f"averaging over the span {self._span!r}: expected one of {', '.join(x.spans)}."
            )

    @property
    def _span(self) -> str:
        """Positions of the prompt that are averaged."""
        if self.config.span is not None:
            return self.config.span
        return "readout" if self.model.audio and self.model.audio.is_memory else "audio"

    # --- Units

    def units(self) -> list[Unit]:
        """Units for the features of some clips, by who hears them, then for how the clips sound."""
        size = self.config.batch_size * self.config.unit_batches
        sources: list[FeatureSource] = ["model"]
        sources += ["untrained"] if self.config.untrained else []
        units = [
            Unit(f"{source}__{first:06d}", (source, range(len(self.clips))[first : first + size]))
            for source in sources
            for first in range(0, len(self.clips), size)
        ]
        return units + sound_units(self.clips)

    def further_units(self, tables: Tables) -> list[Unit]:
        """A unit for each column and baseline, and each column, point and model."""
        points: dict[FeatureSource, list[PlacedPoint]] = {"model": self.points}
        if self.config.untrained:
            points["untrained"] = self.points
        return fit_units(self.labels, OF_THE_CLIP, points, tables["features"])

    def measure(self, unit: Unit) -> UnitResult:
        """Features of some clips, how they sound, or the probes of a column and a point."""
        work = unit.payload
        if isinstance(work, Sounds):
            return work.measured()
        if isinstance(work, ProbeFit):
            return work.result(self.folder, [one.name for one in self.clips], self.config)
        return self._heard(unit.id, *work)

    def _heard(self, unit_id: str, source: FeatureSource, clips: range) -> UnitResult:
        """Keeps the features of some clips."""
        self.become(is_trained=source == "model")
        heard = {number: self._clip(number) for number in clips}
        batches = bucketed(
            [self._positions[number] for number in clips], self.config.batch_size,
            self.config.batch_positions,
            kinds=[heard_alike(self.model, [heard[number]]) for number in clips],
        )  # fmt: skip
        found: dict[int, dict[str, Any]] = {}
        for batch in batches:
            some = [clips[i] for i in batch]
            features = self.batch_features([heard[number] for number in some], some)
            for row, number in enumerate(some):
                found[number] = {name: values[row] for name, values in features.items()}
                if source == "model":
                    found[number] |= clip_baselines(heard[number])
        return keep_features(self.folder, unit_id, source, [found[number] for number in clips])

    def batch_features(self, clips: Sequence[AudioClip], numbers: Sequence[int]) -> PromptMeans:
        """Features of clips that are heard together.

        Args:
            clips: as the encoder reads them.
            numbers: of these, among the run's.
        """
        x = self.config.heard(self.model, clips)
        return means_of(self.model, x, self.kept, self._span)

    def try_batch(self, size: int) -> int:
        """See `TriesBatches`."""
        some = heaviest(self._positions, size, self.config.batch_positions)
        self.batch_features([self._clip(number) for number in some], some)
        return len(some)

    # --- What is made of it

    def summaries(self, run: ProbeResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the probes."""
        yield "manifest", manifest(self.clips, run["sounds"])
        yield from summarise(run)

    def lead(self, run: ProbeResults) -> str:
        """What was read of what."""
        return lead(run)

    def page(self, page: Page, run: ProbeResults) -> None:
        """Every column by depth."""
        fill_with_probes(page, run)

    def method(self, run: ProbeResults) -> str:
        """How probes and intervals were made."""
        return method(run)
