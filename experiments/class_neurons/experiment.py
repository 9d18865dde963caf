"""Which neurons belong to a class, such as an emotion, and what do they do?

Neurons are selected by how they are active for one half of the speakers: by how often they fire or
how strongly, as many for every class. On the other half they are taken out and made stronger,
beside random neurons, and it is read which input drives them: the audio or the instruction.

Source: arXiv 2601.03115; M-ESN-1 to M-ESN-8.
"""

from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from typing import Any

from hooked_alm.methods.neurons.activity import ActivityLog
from hooked_alm.methods.neurons.sets import NeuronSets

from ..materials.class_items import ClassItem
from ..materials.kept_features import FeatureFiles
from ..materials.neuron_logs import keep_log, read_logs
from ..workbench.experiment import Unit, UnitResult
from ..workbench.results import Row, Tables
from .claims import CLAIMS, CONTROLS
from .measure import NeuronMeasures
from .pages import NeuronReport
from .plan import ChangedItem, NeuronPlan, SelectedNeurons
from .settings import ClassNeuronsConfig
from .tables import MAY_LACK, TABLES
from .truths import TRUTH_SETTINGS, TRUTHS


class ClassNeurons(NeuronReport):
    """Units log some items; further ones select neurons, change them, and exchange inputs."""

    name = "class_neurons"
    title = "Class neurons"
    question = "Which neurons belong to a class, such as an emotion, and what do they do?"
    Config = ClassNeuronsConfig
    tables, may_lack = TABLES, MAY_LACK
    controls, claims = CONTROLS, CLAIMS
    truths, truth_settings = TRUTHS, TRUTH_SETTINGS
    leaves = ("arrays",)
    log: ActivityLog
    """Of the unit under way."""

    @cached_property
    def plan(self) -> NeuronPlan:
        """What is run on these recordings."""
        return NeuronPlan(self.config, self.corpus)

    def identify(self) -> dict[str, Any]:
        """Reads the clips, and makes every prompt."""
        found = super().identify()
        for work in self.plan.conflicts:
            self.n_positions(work)
        neurons = {"blocks": len(self.model.path), "each": self.model.path_cfg.d_mlp}
        return {**found, "halves": self.plan.items.groups, "neurons": neurons}

    def load(self) -> None:
        """Loads the weights."""
        super().load()
        self._sets: dict[FeatureFiles, NeuronSets] = {}
        self._begin_log()

    def _begin_log(self) -> None:
        sizes = len(self.model.path), self.model.path_cfg.d_mlp
        self.log = ActivityLog.empty(len(self.corpus.labels), *sizes)

    # --- Units

    def further_units(self, tables: Tables) -> list[Unit]:
        """What is done with the neurons that the logs give."""
        return self.plan.further_units(tables["logs"])

    def measure(self, unit: Unit) -> UnitResult:
        """Some items, the list of neurons, or the sound of some clips."""
        work = unit.payload
        if isinstance(work, SelectedNeurons):
            sets = self._chosen(work.logs)
            rows = [*sets.rows(filter=self.config.lape_filter)]
            return UnitResult({"neurons": rows, "blocks": [*sets.blocks()]})
        self._begin_log()
        found = super().measure(unit)
        if isinstance(work, tuple) and isinstance(work[0], ClassItem):
            found.tables["logs"] = [keep_log(self.folder, unit.id, self.log)]
        return found

    def _chosen(self, logs: FeatureFiles) -> NeuronSets:
        """The sets that some logs give together; made once in a process."""
        if logs not in self._sets:
            config = self.config
            self._sets[logs] = NeuronSets.of(
                read_logs(self.folder, logs), self.corpus.labels, rate=config.rate,
                selector=config.selector, n_draws=config.n_draws, seed=config.seed,
                filter=config.lape_filter,
            )  # fmt: skip
        return self._sets[logs]

    def batch_kind(self, work: ClassItem | ChangedItem) -> Hashable:
        """The language, whose labels are read, and how many runs it has."""
        return work.prompts[0].language, len(work.prompts)

    def measure_batch(self, works: Sequence[Any]) -> list[UnitResult]:
        """Answers with a log, changed neurons, or exchanged inputs; as the works are."""
        labels = self.labels[works[0].prompts[0].language]
        measures = NeuronMeasures(self.model, labels, self.config)
        first = self.input(*(work.prompts[0] for work in works))
        rows: Iterable[tuple[int, Row]]
        if isinstance(works[0], ClassItem):
            table, (answers, activity) = "answers", measures.answers(works, first)
            classes = [row["cls"] if row["logged"] else None for row in answers]
            numbers: dict[str | None, int] = {
                name: number for number, name in enumerate(self.corpus.labels)
            }
            self.log.add(activity, [numbers.get(one) for one in classes])
            rows = enumerate(answers)
        elif not works[0].exchanges:
            table, rows = "doses", measures.doses(works, first, self._chosen(works[0].logs))
        else:
            runs = [first] + [self.input(*(one.prompts[k] for one in works)) for k in (1, 2)]
            table, rows = "drive", measures.drive(works, runs, self._chosen(works[0].logs))
        found: list[list[Row]] = [[] for _ in works]
        for n, row in rows:
            found[n].append(row)
        records = [self.record_of(work.prompts[0]) for work in works]
        return [UnitResult({table: some}, one) for some, one in zip(found, records, strict=True)]
