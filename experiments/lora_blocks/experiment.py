"""Blocks of a LoRA adapter: which of them change the answer, and do the large ones?

A model is asked with an adapter, without it, and with the update of one block switched on alone or
off alone, which says what each block does. Beside it stand what is usually read in its place: norms
of the updates, a lens at every depth, and what blocks write.

Source: M-LO-2, M-LO-3, M-LO-8; C41.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from hooked_alm.errors import InputError
from hooked_alm.methods.adapters.outputs import OutputSpectra, used_directions
from hooked_alm.methods.adapters.switching import adapted_blocks
from hooked_alm.methods.adapters.turning import LEAST_CLIPS, TurnedStream
from hooked_alm.methods.adapters.updates import update_sizes

from ..materials.conflict_experiment import ConflictExperiment
from ..materials.conflict_runs import PromptRun, run_id
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from .claims import CLAIMS, CONTROLS
from .measure import AdapterMeasures
from .pages import CAVEATS, fill_page, lead, method
from .plan import UPDATES, LoraBlocksPlan
from .settings import N_COMBINED, LoraBlocksConfig
from .tables import MAY_LACK, TABLES, LoraResults, summarise
from .truths import TRUTHS


class LoraBlocks(ConflictExperiment[LoraBlocksConfig]):
    """An adapter, block by block."""

    name = "lora_blocks"
    title = "Blocks of an adapter"
    question = "Which blocks of a LoRA adapter change the answer?"
    Config = LoraBlocksConfig
    tables, may_lack = TABLES, MAY_LACK
    controls, claims, caveats = CONTROLS, CLAIMS, CAVEATS
    truths = TRUTHS
    merges_lora: ClassVar = False

    def identify(self) -> dict[str, Any]:
        """Reads the clips, and refuses a model without an adapter.

        Raises:
            InputError: no adapter was named; and see `ConflictExperiment.identify`.
        """
        inputs = super().identify()
        if "lora" not in self.model.sources:
            raise InputError(
                f"switching the blocks of an adapter of {self.config.model!r}: got none. Name its "
                "folder, as PEFT saved it: -s lora=FOLDER"
            )
        return {**inputs, "centred": self.model.path_cfg.normalization_type == "LN"}

    def load(self) -> None:
        """Loads the weights, and the adapter beside them.

        Raises:
            InputError: none of the adapter is in the blocks; too many blocks for Shapley values.
        """
        super().load()
        blocks = adapted_blocks(self.model)
        if self.config.shapley and len(blocks) > N_COMBINED:
            raise InputError(
                f"Shapley values of {len(blocks)} blocks: expected {N_COMBINED} at most. Leave "
                "shapley out: blocks are switched one by one."
            )

    @cached_property
    def plan(self) -> LoraBlocksPlan:
        """What is run on these recordings."""
        return LoraBlocksPlan(self.config, self.corpus)

    def batch_kind(self, work: PromptRun) -> Hashable:
        """The language, whose labels are read."""
        return work.language

    def measure(self, unit: Unit) -> UnitResult:
        """Some runs, or the updates themselves and what they do to all clips together."""
        if unit.id != UPDATES:
            return super().measure(unit)
        turned, spectra = TurnedStream(self.model), OutputSpectra(self.model)
        for runs in self.plan.compared():
            self._measures(runs).add_to(turned, spectra)
        found = {"sizes": [asdict(one) for one in update_sizes(self.model)]}
        found["spectra"] = [used_directions(one)._asdict() for one in spectra.found()]
        if len(self.recordings) >= LEAST_CLIPS:
            found["similarity"] = [one._asdict() for one in turned.similarity(self.config.seed)]
        return UnitResult(found)

    def measure_batch(self, works: Sequence[PromptRun]) -> list[UnitResult]:
        """Everything of some runs."""
        tables = self._measures(works).tables(shapley=self.config.shapley)
        results = []
        for n, run in enumerate(works):
            who = {"item": run_id(self.corpus, run), **run.identity()}
            who = {name: who[name] for name in ("item", "clip", "voice", "target", "condition")}
            record = {"item": who["item"], **self.record_of(run)}
            own = {name: rows[n] for name, rows in tables.items()}
            results.append(UnitResult.of(who, own, record))
        return results

    def _measures(self, runs: Sequence[PromptRun]) -> AdapterMeasures:
        """Of some runs in one language."""
        labels = self.labels[runs[0].language]
        return AdapterMeasures(self.model, labels, runs, self.input(*runs))

    def summaries(self, run: LoraResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield from super().summaries(run)
        yield from summarise(run)

    def lead(self, run: LoraResults) -> str:
        """What was asked, with which adapter."""
        return lead(run)

    def page(self, page: Page, run: LoraResults) -> None:
        """Blocks, sizes, depths and contributions."""
        fill_page(page, run)

    def method(self, run: LoraResults) -> str:
        """How effects and intervals were made."""
        return method(run)
