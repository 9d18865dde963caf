"""Is an answer grounded in the voice or in the instruction, and which parts carry either?

In a conflict the clip and the instruction are exchanged, one at a time: in the whole prompt, at
every depth and span of the stream, and in every head and MLP. The grounding coefficient is the
voice's share of what both exchanges move.

Source: seed 003; M-GC.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property

import pandas as pd

from ..materials.answers import answers_of, lengths_of
from ..materials.conflict_experiment import ConflictExperiment
from ..materials.conflict_runs import ExchangedRun
from ..workbench.experiment import UnitResult
from ..workbench.page import Page
from ..workbench.results import Row
from .claims import CLAIMS
from .controls import CONTROLS
from .measure import GroundingMeasures
from .pages import CAVEATS, fill_page, lead, method
from .plan import GroundingPlan
from .settings import DEFECTS, SPANS, GroundingConfig
from .tables import TABLES, GroundingResults, summarise
from .truths import TRUTHS


class Grounding(ConflictExperiment[GroundingConfig]):
    """Grounding coefficients of depths, spans, heads and MLPs, in both readings of patching."""

    name = "grounding"
    title = "Grounding"
    question = "Is the answer grounded in the voice or in the instruction, and where?"
    Config = GroundingConfig
    tables = TABLES
    defects, controls, claims, caveats = DEFECTS, CONTROLS, CLAIMS, CAVEATS
    truths = TRUTHS

    def places(self) -> list[tuple[str, ...]]:
        """Spans that are patched together."""
        return [*SPANS.values()]

    @cached_property
    def plan(self) -> GroundingPlan:
        """What is run on these recordings."""
        return GroundingPlan(self.config, self.corpus)

    def batch_kind(self, work: ExchangedRun) -> Hashable:
        """The language, whose labels are read, and what can be exchanged."""
        return work.base.language, tuple(work.runs)

    def measure_batch(self, works: Sequence[ExchangedRun]) -> list[UnitResult]:
        """Answers, sweeps in both readings, and the items patched with themselves."""
        labels = self.labels[works[0].base.language]
        measures = GroundingMeasures(self.model, labels, self.config)
        runs = {role: [work.runs[role] for work in works] for role in works[0].runs}
        inputs = {role: self.input(*some) for role, some in runs.items()}
        found: list[dict[str, list[Row]]] = [defaultdict(list) for _ in works]
        for role, some in runs.items():
            answers = answers_of(self.model, labels, x := inputs[role])
            for n, (one, answer) in enumerate(zip(some, answers, strict=True)):
                about = {"role": role, "heard": one.recording.name, "condition": one.condition}
                found[n]["runs"].append({**about, "named": one.named, **answer, **lengths_of(x, n)})
        base = inputs.pop("base")
        for table, n, row in [
            *measures.cells(works, base, inputs), *measures.unpatched(works, base)
        ]:  # fmt: skip
            found[n][table].append(row)
        return [
            UnitResult.of(work.identity(), tables, self._record(work))
            for work, tables in zip(works, found, strict=True)
        ]

    def _record(self, work: ExchangedRun) -> Row:
        donors = {one.kind: self.record_of(one.donor) for one in work.sweeps}
        return {"pair": work.pair, **self.record_of(work.base), "donors": donors}

    def summaries(self, run: GroundingResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield from super().summaries(run)
        yield from summarise(run)

    def lead(self, run: GroundingResults) -> str:
        """What is exchanged in which clips."""
        return lead(run)

    def page(self, page: Page, run: GroundingResults) -> None:
        """What was asked and answered, the stream, and heads and MLPs."""
        fill_page(page, run, self.recordings)

    def method(self, run: GroundingResults) -> str:
        """How effects, coefficients and intervals were made."""
        return method(run)
