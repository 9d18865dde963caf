"""Where does the voice lose against the instruction?

A voice carries a label A, such as an emotion; the instruction names another, T. The experiment
reads the label logits at every depth (lens), exchanges the text's and the voice's part of the run
(patching), and sums attention by segment.

Source: seed 000; M-000-1 to M-000-15.
"""

from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from hooked_alm import HookedALM

from ..materials.conflict_experiment import ConflictExperiment
from ..materials.conflict_runs import PatchRun, PromptRun
from ..materials.trained_lens import described_lens, open_lens
from ..workbench.experiment import UnitResult
from ..workbench.page import Page
from ..workbench.results import Row
from .claims import CLAIMS
from .controls import CONTROLS
from .measure import ConflictMeasures
from .pages import CAVEATS, fill_page, lead, method
from .plan import WorkPlan
from .settings import DEFECTS, EmotionConflictConfig
from .tables import MAY_LACK, TABLES, EmotionResults, summarise
from .truths import TRUTHS


class EmotionConflict(ConflictExperiment[EmotionConflictConfig]):
    """The experiment of seed 000, on any model with an audio front-end and any labels."""

    name = "emotion_conflict"
    title = "Emotion conflict"
    question = "Where does the voice lose against the instruction?"
    Config = EmotionConflictConfig
    schema_version = 5
    tables, may_lack = TABLES, MAY_LACK
    defects, controls, claims, caveats = DEFECTS, CONTROLS, CLAIMS, CAVEATS
    truths = TRUTHS

    def lay_out(self, *, hears: bool = False) -> HookedALM:
        """The model, which has the blocks that are to be patched.

        Raises:
            InputError: it lacks some; and see `ModelExperiment.lay_out`.
        """
        model = super().lay_out(hears=hears)
        self.config.patched_layers(model.cfg.n_layers)
        return model

    def identify(self) -> dict[str, Any]:
        """Reads the clips, and checks every prompt."""
        return {**super().identify(), **described_lens(self.config.tuned_lens)}

    def load(self) -> None:
        """Loads the weights, and the lens."""
        super().load()
        self.lens = open_lens(self.config.tuned_lens, self.model, self.config.lens_norm)

    def places(self) -> list[tuple[str, ...]]:
        """Spans that are patched together."""
        return [*self.config.patched_spans().values()]

    @cached_property
    def plan(self) -> WorkPlan:
        """What is run on these recordings."""
        return WorkPlan(self.config, self.corpus)

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
            results.append(UnitResult(named, name | self.record_of(run) | about))
        return results

    def _sweeps(self, sweeps: Sequence[PatchRun]) -> list[UnitResult]:
        bases, donors = ([getattr(one, name) for one in sweeps] for name in ("base", "donor"))
        measures, results = self._measures(bases[0].language), []
        found = measures.sweeps(sweeps, self.input(*bases), self.input(*donors))
        for sweep, (cells, about) in zip(sweeps, found, strict=True):
            name: Row = {"unit": self.plan.sweep_id(sweep.base, sweep.kind)}
            record = name | self.record_of(sweep.base) | about
            record["donor"] = self.record_of(sweep.donor)
            results.append(UnitResult({"patching": [{**name, **cell} for cell in cells]}, record))
        return results

    def summaries(self, run: EmotionResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield from super().summaries(run)
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
