"""Which neurons belong to a class, such as an emotion, and what do they do?

Neurons are selected by how they are active for one half of the speakers: by how often they fire or
how strongly, as many for every class. On the other half they are taken out and made stronger,
beside random neurons, and it is read which input drives them: the audio or the instruction.

Source: arXiv 2601.03115; M-ESN-1 to M-ESN-4, M-ESN-6 to M-ESN-8.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from hooked_alm.methods.neurons.activity import ActivityLog
from hooked_alm.methods.neurons.sets import NeuronSets

from ..materials.conflict_experiment import ConflictExperiment
from ..materials.kept_features import FeatureFiles, arrays_sha256, kept_arrays
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row, Tables
from .claims import CLAIMS, CONTROLS
from .measure import NeuronMeasures, neuron_rows
from .pages import CAVEATS, fill_page, lead, method
from .plan import ChangedItem, NeuronItem, NeuronPlan, SelectedNeurons
from .settings import ClassNeuronsConfig
from .tables import MAY_LACK, TABLES, NeuronResults, summarise
from .truths import TRUTH_SETTINGS, TRUTHS


class ClassNeurons(ConflictExperiment[ClassNeuronsConfig]):
    """Units log some items; further ones select neurons, change them, and exchange inputs."""

    name = "class_neurons"
    title = "Class neurons"
    question = "Which neurons belong to a class, such as an emotion, and what do they do?"
    Config = ClassNeuronsConfig
    tables, may_lack = TABLES, MAY_LACK
    controls, claims, caveats = CONTROLS, CLAIMS, CAVEATS
    truths, truth_settings = TRUTHS, TRUTH_SETTINGS
    leaves = ("arrays",)
    log: ActivityLog
    """Of the unit under way."""

    def places(self) -> list[tuple[str, ...]]:
        """None: inputs are exchanged whole, and nothing is aligned."""
        return []

    @cached_property
    def plan(self) -> NeuronPlan:
        """What is run on these recordings."""
        return NeuronPlan(self.config, self.corpus)

    def identify(self) -> dict[str, Any]:
        """Reads the clips, and makes every prompt."""
        found = super().identify()
        for work in self.plan.conflicts:
            self.n_positions(work)
        halves: dict[str, list[str]] = {}
        for group, half in sorted({*self.plan.halves.values()}):
            halves.setdefault(half, []).append(group)
        neurons = {"blocks": len(self.model.path), "each": self.model.path_cfg.d_mlp}
        return {**found, "halves": halves, "neurons": neurons}

    def load(self) -> None:
        """Loads the weights."""
        super().load()
        self._sets: dict[FeatureFiles, NeuronSets] = {}
        self.log = self._empty_log()

    def _empty_log(self) -> ActivityLog:
        sizes = len(self.model.path), self.model.path_cfg.d_mlp
        return ActivityLog.empty(len(self.corpus.labels), *sizes)

    # --- Units

    def further_units(self, tables: Tables) -> list[Unit]:
        """What is done with the neurons that the logs give."""
        return self.plan.further_units(tables["logs"])

    def measure(self, unit: Unit) -> UnitResult:
        """Some items, the list of neurons, or the sound of some clips."""
        work = unit.payload
        if isinstance(work, SelectedNeurons):
            return self._listed(self._chosen(work.logs))
        self.log = self._empty_log()
        found = super().measure(unit)
        if isinstance(work, tuple) and isinstance(work[0], NeuronItem):
            found.tables["logs"] = [self._kept(unit.id)]
        return found

    def _listed(self, sets: NeuronSets) -> UnitResult:
        blocks = [
            {"block": block, "activity": value}
            for block, value in enumerate(sets.block_activity.tolist())
        ]
        return UnitResult({"neurons": [*neuron_rows(sets, self.config)], "blocks": blocks})

    def _kept(self, unit_id: str) -> Row:
        """Keeps the unit's log in ``arrays``; returns where, as a row of a table."""
        arrays = {name: value.numpy() for name, value in self.log.arrays.items()}
        self.folder.write_arrays(unit_id, arrays)
        return {
            "file": unit_id, "sha256": arrays_sha256(self.folder, unit_id),
            "n_items": int(self.log.items.sum()), "n_rows": int(self.log.rows.sum()),
        }  # fmt: skip

    def _chosen(self, logs: FeatureFiles) -> NeuronSets:
        """The sets that some logs give together; made once in a process."""
        if logs not in self._sets:
            log, config = self._empty_log(), self.config
            for arrays in kept_arrays(self.folder, logs):
                log.merge(ActivityLog(**{k: torch.from_numpy(v) for k, v in arrays.items()}))
            self._sets[logs] = NeuronSets.of(
                log, self.corpus.labels, rate=config.rate, selector=config.selector,
                n_draws=config.n_draws, seed=config.seed, filter=config.lape_filter,
            )  # fmt: skip
        return self._sets[logs]

    def batch_kind(self, work: NeuronItem | ChangedItem) -> Hashable:
        """The language, whose labels are read, and how many runs it has."""
        return work.prompts[0].language, len(work.prompts)

    def measure_batch(self, works: Sequence[Any]) -> list[UnitResult]:
        """Answers with a log, changed neurons, or exchanged inputs; as the works are."""
        labels = self.labels[works[0].prompts[0].language]
        measures = NeuronMeasures(self.model, labels, self.config)
        first = self.input(*(work.prompts[0] for work in works))
        found: list[dict[str, list[Row]]] = [defaultdict(list) for _ in works]
        if isinstance(works[0], NeuronItem):
            rows, activity = measures.answers(works, first)
            names = [*self.corpus.labels]
            self.log.add(
                activity, [names.index(row["cls"]) if row["logged"] else None for row in rows]
            )
            for tables, row in zip(found, rows, strict=True):
                tables["answers"].append(row)
        elif not works[0].exchanges:
            for n, row in measures.doses(works, first, self._chosen(works[0].logs)):
                found[n]["doses"].append(row)
        else:
            runs = [first] + [self.input(*(one.prompts[k] for one in works)) for k in (1, 2)]
            for n, row in measures.drive(works, runs, self._chosen(works[0].logs)):
                found[n]["drive"].append(row)
        records = [self.record_of(work.prompts[0]) for work in works]
        return [UnitResult(dict(t), record) for t, record in zip(found, records, strict=True)]

    # --- What is made of it

    def summaries(self, run: NeuronResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield from super().summaries(run)
        yield from summarise(run)

    def lead(self, run: NeuronResults) -> str:
        """What was logged, selected and changed."""
        return lead(run)

    def page(self, page: Page, run: NeuronResults) -> None:
        """What was answered, the neurons, what they do, and what drives them."""
        fill_page(page, run, self.recordings)

    def method(self, run: NeuronResults) -> str:
        """How neurons were selected, changed and judged."""
        return method(run)
