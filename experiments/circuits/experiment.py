"""Circuits: which heads and MLPs carry an answer, what they tell each other, and is that enough?

On minimal pairs (``pairs``), every head and MLP is patched exactly, both ways, at the readout and
at the spans. The nodes that win on some groups of pairs are tested on the others; their direct
effects, their inputs and the paths between them are measured, and the circuit they make is run
alone.

Source: activation patching in both directions (Heimersheim and Nanda 2024), path patching (Wang et
al. 2022; Miller's edges), faithfulness and completeness (Wang et al. 2022), false discovery rate
(Benjamini and Hochberg 1995).
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from hooked_alm.errors import InputError

from ..materials.clips import Sounds, described_table, sound_units
from ..materials.confounds import add_confounds
from ..materials.exchange import PlaceName
from ..materials.held_out import split_groups
from ..materials.pairs import SIDES, prepare_pairs, read_pairs
from ..materials.subject import ModelExperiment, described
from ..workbench.batches import BatchedExperiment, batch_units
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row, Tables
from . import figures
from .claims import CLAIMS, CONTROLS
from .confounds import answering_clips, clip_confounds, clip_table
from .measure import PairSweeps
from .plan import CircuitNode, bundled_pairs, places_of, random_nodes
from .settings import CircuitsConfig
from .tables import MAY_LACK, TABLES, CircuitResults, node_cells, nodes_of, of, summarise, winners
from .truths import TRUTHS


@dataclass(frozen=True)
class PairWork:
    """The sweeps of a pair, by its number."""

    number: int
    nodes: tuple[CircuitNode, ...] = ()
    """Winners of its contrast, which the second stage follows; none in the first."""


class Circuits(BatchedExperiment[CircuitsConfig], ModelExperiment[CircuitsConfig]):
    """Exact patching of heads, paths and circuits on minimal pairs."""

    name = "circuits"
    title = "Circuits"
    question = "Which heads carry the answer, and is their circuit enough?"
    Config = CircuitsConfig
    schema_version = 3
    tables, may_lack = TABLES, MAY_LACK
    controls, claims = CONTROLS, CLAIMS
    truths = TRUTHS
    truth_settings: ClassVar = {"places": ("readout",)}
    caveats = (
        "What is sampled are groups of pairs: pairs of a group are averaged before they are "
        "tested. Groups that share a donor clip, as the bundled ones do, are still not quite "
        "independent.",
        "The family of tests are all cells of a contrast: directions, places, layers, heads and "
        "MLPs. Cells that are exactly zero in every group cannot reach the answer and are no "
        "hypotheses.",
        "Noising shows what is necessary, denoising what is enough; parts that stand in for each "
        "other show in neither alone. A head's effect contains everything downstream of it.",
        "Paths are edges: the residual connection alone. What passes through MLPs counts under "
        "ioi.",
        "A circuit is judged with the donor's messages on all other edges, on pairs that were not "
        "used to choose it. Random circuits of equal size are the yardstick; the whole model is 1.",
    )

    def identify(self) -> dict[str, Any]:
        """Reads the pairs, and checks every prompt, answer and span."""
        config = self.config
        is_bundled = config.pairs == "bundled"
        pairs = bundled_pairs(config.pairs_per_clip) if is_bundled else read_pairs(config.pairs)
        self.parts = split_groups([p.group for p in pairs], config.discovery_share, config.seed)
        contrasts = list(dict.fromkeys(pair.contrast for pair in pairs))
        for contrast in contrasts:
            groups = sorted({pair.group for pair in pairs if pair.contrast == contrast})
            if len({self.parts[group] for group in groups}) < 2:
                raise InputError(
                    f"splitting the pairs of contrast {contrast!r}: all their groups "
                    f"({', '.join(groups[:5])}) fall into one part, expected some for choosing "
                    "and others for testing. Give pairs of more groups, or another seed."
                )
        self.model = self.lay_out()
        self.pairs = prepare_pairs(self.model, pairs, truncate=config.truncate)
        self.clips = answering_clips(pairs)
        self.places: dict[str, list[PlaceName]] = {}
        left_out = {}
        for contrast in contrasts:
            of_contrast = [one for one in self.pairs if one.pair.contrast == contrast]
            self.places[contrast], left_out[contrast] = places_of(of_contrast, config)
        return {
            "model": described(self.model, config),
            **({} if is_bundled else described_table(config.pairs)),
            "split": self.parts,
            "places": self.places,
            "places_left_out": left_out,
            "pairs": [
                one.pair.described() | {"answer_tokens": [*one.answers]} for one in self.pairs
            ],
        }

    def load(self) -> None:
        """Loads the weights; prompts go where the model is."""
        super().load()
        self.pairs = [one.to(self.model.cfg.device) for one in self.pairs]

    def units(self) -> list[Unit]:
        """Pairs, some batches a unit: every head and MLP, and direct effects. Then their sounds."""
        works = ((f"nodes__{one.pair.id}", PairWork(n)) for n, one in enumerate(self.pairs))
        return batch_units(works, self.config) + sound_units(self.clips)

    def further_units(self, tables: Tables) -> list[Unit]:
        """The pairs of contrasts with winners: paths, inputs, and circuits."""
        chosen = winners(node_cells(tables["nodes"], self.config), self.config)
        of_contrast = {name: nodes_of(of(chosen, name)) for name in self.places}
        works = [
            (f"paths__{one.pair.id}", PairWork(n, tuple(nodes)))
            for n, one in enumerate(self.pairs)
            if (nodes := of_contrast[one.pair.contrast])
        ]
        return batch_units(works, self.config)

    def measure(self, unit: Unit) -> UnitResult:
        """The sweeps of some pairs, or the sound of some clips."""
        work = unit.payload
        return work.measured() if isinstance(work, Sounds) else super().measure(unit)

    def n_positions(self, work: PairWork) -> int:
        """Positions of the longer prompt."""
        one = self.pairs[work.number]
        return max(one.base.shape[1], one.donor.shape[1])

    def batch_kind(self, work: PairWork) -> Hashable:
        """The contrast, whose places and winners are one, and the part, whose sweeps are."""
        pair = self.pairs[work.number].pair
        return pair.contrast, self.parts[pair.group]

    def measure_batch(self, works: Sequence[PairWork]) -> list[UnitResult]:
        """The sweeps of some pairs, whose winners are known in the second stage."""
        some, nodes = [self.pairs[work.number] for work in works], [*works[0].nodes]
        places = self.places[some[0].pair.contrast]
        sweeps = PairSweeps(self.model, some, places, self.config)
        found, records = self._paths(sweeps, nodes) if nodes else self._nodes(sweeps)
        results = []
        for number, (one, record) in enumerate(zip(some, records, strict=True)):
            pair = one.pair
            who: Row = {"pair": pair.id, "contrast": pair.contrast, "group": pair.group}
            who["part"] = self.parts[pair.group]
            tables = {
                name: [{**who, **row} for row in _of_pair(cells, number).to_dict("records")]
                for name, cells in found.items()
            }
            results.append(UnitResult(tables, {**who, **record}))
        return results

    def _nodes(self, sweeps: PairSweeps) -> tuple[Tables, list[Row]]:
        cells, records = sweeps.nodes(), []
        ends = cells.drop_duplicates("example")
        for one, base, donor, answers in zip(
            sweeps.pairs, ends.base.tolist(), ends.donor.tolist(), sweeps.answers(), strict=True
        ):
            given = {"base_answer": one.pair.answers[0], "donor_answer": one.pair.answers[1]}
            unpatched = {"base": base, "donor": donor, "total_effect": base - donor}
            records.append({**given, **unpatched, **answers})
        pairs = pd.DataFrame(records).rename_axis("example").reset_index()
        nodes = cells.drop(columns=["base", "donor"])
        tables = {"pairs": pairs, "nodes": nodes, "direct": sweeps.direct()}
        spans = [
            {side: getattr(one, side).spans.to_json() for side in SIDES} for one in sweeps.pairs
        ]
        about = zip(records, spans, strict=True)
        return tables, [{**record, "spans": of_pair} for record, of_pair in about]

    def _paths(self, sweeps: PairSweeps, nodes: list[CircuitNode]) -> tuple[Tables, list[Row]]:
        pair, heads = sweeps.pairs[0].pair, [node for node in nodes if node.is_head]
        tables = {"reads": sweeps.reads(heads)} if heads else {}
        if followed := heads[: self.config.n_followed]:
            tables["paths"] = sweeps.paths(sorted(nodes), followed)
        # Random circuits are equal for all pairs of a contrast.
        rng = np.random.default_rng([self.config.seed, list(self.places).index(pair.contrast)])
        circuits = {"circuit": nodes}
        for i in range(1, self.config.n_random + 1):
            circuits[f"random {i}"] = random_nodes(self.model, nodes, rng)
        # Winners were chosen on the other pairs: on these the circuit is put to the test.
        if self.parts[pair.group] == "held-out":
            tables["circuit"] = sweeps.circuits(circuits)
        labels = {name: [node.label for node in some] for name, some in circuits.items()}
        return tables, [{"circuits": labels} for _ in sweeps.pairs]

    # --- What is made of it

    def summaries(self, run: CircuitResults) -> Iterable[tuple[str, pd.DataFrame]]:
        """The clips and what else tells them apart, then what `summarise` makes of the tables."""
        pairs = [one.pair for one in self.pairs]
        yield "clips", (clips := clip_table(pairs, self.clips, run["sounds"]))
        yield "confounds", clip_confounds(clips, self.config.seed)
        yield from summarise(run)

    def lead(self, run: CircuitResults) -> str:
        """How many pairs differ in what, what is done with them, and what is known beforehand."""
        counts = run["pairs"].groupby("contrast", sort=False).size()
        kinds = " and ".join(f"{n} pairs that differ in the {name}" for name, n in counts.items())
        lead = (
            f"{kinds}. Every head and MLP is exchanged between the two runs of a pair, exactly, in "
            "both directions; the answer is read each time. What moves it is chosen on some groups "
            "of pairs and tested on the others."
        )
        if self.config.is_calibration:
            lead += (
                "\n\nThe prompts name one emotion and are spoken with another. follows_text was "
                "trained to answer what the instruction names, follows_voice what the voice says: "
                "which exchange moves the answer has to reverse between them."
            )
        return lead

    def page(self, page: Page, run: CircuitResults) -> None:
        """What was asked; then, for every contrast, its circuit and what it was chosen from."""
        page.section("What was asked")
        figures.add_effects(page, run)
        columns = [
            *("pair", "group", "part", "base_answer", "base_says", "donor_answer", "donor_says"),
            "total_effect",
        ]
        page.table("The pairs: answers given, and made", run["pairs"][columns])
        for contrast in run["effects"].contrast:
            page.section(f"The {contrast}")
            if contrast in run["clips"].contrast.tolist():
                found = of(run["confounds"], contrast).drop(columns="contrast")
                add_confounds(page, found, self.config)
            chosen, top = of(run["winners"], contrast), of(run["top_paths"], contrast)
            if chosen.empty:
                page.note("No node wins on the discovery pairs: there is no circuit to show.")
            else:
                figures.add_circuit(page, run, contrast)
                figures.add_faithfulness(page, run, contrast)
                figures.add_reads(page, run, contrast)
                unshown = ["contrast", "layer", "head", "found"]
                page.table("Winning nodes, and the held-out pairs", chosen.drop(columns=unshown))
                page.table(
                    "The largest paths, and the held-out pairs", top.drop(columns="contrast")
                )
            figures.add_heads(page, run, contrast)
            figures.add_mlps(page, run, contrast)
            figures.add_direct(page, run, contrast)

    def method(self, run: CircuitResults) -> str:
        """How nodes were chosen and tested."""
        config = self.config
        return (
            f"Model: {config.model}, {config.dtype}, engine {config.engine}. Metric: "
            f"{config.metric} of the two answers' first tokens. Groups are split by a draw with "
            f"seed {config.seed}, {config.discovery_share:g} of them for discovery. A node wins if "
            f"a cell of it has q ≤ {config.fdr:g} and moves the answer by {config.min_effect:g} or "
            f"more on average. Intervals resample groups {config.n_resamples} times."
        )


def _of_pair(cells: pd.DataFrame, number: int) -> pd.DataFrame:
    return cells[cells.example == number].drop(columns="example")
