"""Circuits: which heads and MLPs carry an answer, what they tell each other, and is that enough?

On minimal pairs (``pairs``), every head and MLP is patched exactly, both ways, at the readout and
at the spans. The nodes that win on some groups of pairs are tested on the others; their direct
effects, their inputs and the paths between them are measured, and the circuit they make is run
alone.

Source: activation patching in both directions (Heimersheim and Nanda 2024), path patching (Wang et
al. 2022; Miller's edges), faithfulness and completeness (Wang et al. 2022), false discovery rate
(Benjamini and Hochberg 1995). Tables: ``pairs`` (a row per pair), ``nodes``, ``direct``, ``paths``,
``reads``, ``circuit`` (by pair); ``node_cells``, ``winners``, ``top_paths``, ``faithfulness``,
``findings`` (summaries).
"""

from typing import Any

import numpy as np

from hooked_alm.errors import InputError

from ..materials.bundled import PREFIX
from ..materials.held_out import Half, split_groups
from ..materials.pairs import Pair, PreparedPair, prepare_pairs, read_pairs
from ..materials.subject import described, load_subject
from ..workbench.experiment import Experiment, Row, Tables, Unit, UnitResult
from ..workbench.report import Report
from ..workbench.run_folder import RunFolder
from .measure import PairSweeps
from .plan import CircuitNode, bundled_pairs, places_of, random_nodes
from .report import conclude
from .select import node_cells, nodes_of, winners
from .settings import CircuitsConfig, PlaceName

Followed = tuple[PreparedPair, tuple[CircuitNode, ...]]
"""A pair, and the winners of its contrast, largest first."""


class Circuits(Experiment[CircuitsConfig]):
    """Exact patching of heads, paths and circuits on minimal pairs."""

    name = "circuits"
    question = "Which heads carry the answer, and is their circuit enough?"
    Config = CircuitsConfig

    def open(self) -> dict[str, Any]:
        """Load model and pairs, and check every prompt, answer and span before the first unit."""
        config = self.config
        pairs = (
            bundled_pairs(config.pairs_per_clip)
            if config.pairs == "bundled"
            else read_pairs(config.pairs)
        )
        self.parts = split_groups([p.group for p in pairs], config.discovery_share, config.seed)
        _check_groups(pairs, self.parts)
        self.model = load_subject(config)
        self.pairs = prepare_pairs(self.model, pairs, truncate=config.truncate)
        self.places: dict[str, list[PlaceName]] = {}
        left_out = {}
        for contrast in dict.fromkeys(pair.contrast for pair in pairs):
            of_contrast = [one for one in self.pairs if one.pair.contrast == contrast]
            self.places[contrast], left_out[contrast] = places_of(of_contrast, config)
        return {
            "model": described(self.model, config),
            "split": self.parts,
            "places": self.places,
            "places_left_out": left_out,
            "pairs": [
                {**one.pair.described(), "answer_tokens": list(one.answers)} for one in self.pairs
            ],
        }

    def units(self) -> list[Unit]:
        """A unit per pair: every head and MLP, and direct effects."""
        return [Unit(f"nodes__{one.pair.id}", one) for one in self.pairs]

    def further_units(self, tables: Tables) -> list[Unit]:
        """For contrasts with winners, a unit per pair: paths, inputs, and circuits."""
        chosen = winners(node_cells(tables["nodes"], self.config), self.config)
        of_contrast = {
            contrast: tuple(nodes_of(chosen[chosen.contrast == contrast]))
            for contrast in self.places
        }
        return [
            Unit(f"paths__{one.pair.id}", (one, nodes))
            for one in self.pairs
            if (nodes := of_contrast[one.pair.contrast])
        ]

    def run_unit(self, unit: Unit) -> UnitResult:
        """The sweeps of one pair."""
        if isinstance(unit.payload, PreparedPair):
            return self._run_nodes(unit.payload)
        return self._run_paths(unit.payload)

    def _sweeps(self, one: PreparedPair) -> PairSweeps:
        return PairSweeps(self.model, one, self.places[one.pair.contrast], self.config)

    def _identity(self, pair: Pair) -> Row:
        return {
            "pair": pair.id,
            "contrast": pair.contrast,
            "group": pair.group,
            "part": self.parts[pair.group],
        }

    def _run_nodes(self, one: PreparedPair) -> UnitResult:
        who, sweeps = self._identity(one.pair), self._sweeps(one)
        unpatched, nodes = sweeps.nodes()
        about = {
            **who,
            "base_answer": one.pair.answers[0],
            "donor_answer": one.pair.answers[1],
            **unpatched,
            **sweeps.answers(),
        }
        tables = {
            "pairs": [about],
            "nodes": [{**who, **row} for row in nodes],
            "direct": [{**who, **row} for row in sweeps.direct()],
        }
        spans = {"base": one.base.spans.to_json(), "donor": one.donor.spans.to_json()}
        return UnitResult(tables=tables, record={**about, "spans": spans})

    def _run_paths(self, payload: Followed) -> UnitResult:
        one, nodes = payload
        who, sweeps, config = self._identity(one.pair), self._sweeps(one), self.config
        heads = [node for node in nodes if node.kind == "head"][: config.n_followed]
        found = {"paths": sweeps.paths(sorted(nodes), heads), "reads": sweeps.reads(nodes)}
        circuits = {"circuit": list(nodes), **self._random_circuits(one.pair.contrast, nodes)}
        # Winners were chosen on the other pairs: on these the circuit is put to the test.
        is_held_out = self.parts[one.pair.group] == "held-out"
        found["circuit"] = sweeps.circuits(circuits) if is_held_out else []
        return UnitResult(
            tables={name: [{**who, **row} for row in rows] for name, rows in found.items()},
            record={
                **who,
                "circuits": {k: [node.label for node in some] for k, some in circuits.items()},
            },
        )

    def _random_circuits(
        self, contrast: str, nodes: tuple[CircuitNode, ...]
    ) -> dict[str, list[CircuitNode]]:
        """The same for every pair of a contrast."""
        number = list(self.places).index(contrast)
        rng = np.random.default_rng([self.config.seed, number])
        return {
            f"random {i}": random_nodes(self.model, nodes, rng)
            for i in range(1, self.config.n_random + 1)
        }

    def conclude(self, tables: Tables, folder: RunFolder) -> Report:
        """Figures, summaries and findings, from the tables alone."""
        return conclude(
            tables,
            folder,
            self.config,
            n_layers=self.model.cfg.n_layers,
            is_calibration=self.config.model.startswith(PREFIX),
        )


def _check_groups(pairs: list[Pair], parts: dict[str, Half]) -> None:
    for contrast in dict.fromkeys(pair.contrast for pair in pairs):
        found = {parts[pair.group] for pair in pairs if pair.contrast == contrast}
        if len(found) < 2:
            groups = sorted({pair.group for pair in pairs if pair.contrast == contrast})
            raise InputError(
                f"splitting the pairs of contrast {contrast!r}: all their groups "
                f"({', '.join(groups[:5])}) fall into one part, expected some for choosing and "
                "others for testing. Give pairs of more groups, or another seed."
            )
