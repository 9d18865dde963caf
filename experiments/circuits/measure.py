"""What ``circuits`` measures on some pairs of a contrast, as tidy tables.

Every effect is given as ``toward`` (see `materials.exchange`), in the metric's unit, which is the
base's answer against the donor's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.choice import per_query_head
from hooked_alm.methods.patching.metrics import LogitDiff, LogProb, Metric, Prob
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import all_edges, patch_edges, path_patch

from ..materials.exchange import DIRECTIONS, NO_EFFECT, PLACES, PairExchange, PlaceName
from ..materials.pairs import PreparedPair
from ..workbench.results import Row
from . import plan
from .plan import CircuitNode
from .settings import CircuitsConfig


def metric_of(pairs: Sequence[PreparedPair], config: CircuitsConfig) -> Metric:
    """Each base's answer against its donor's, in the unit that was asked for."""
    base, donor = zip(*(one.answers for one in pairs), strict=True)
    if config.metric == "logit_diff":
        return LogitDiff(base, donor)
    return LogProb(base) if config.metric == "log_prob" else Prob(base)


@dataclass(frozen=True)
class PairSweeps:
    """The sweeps of some pairs that run together; ``example`` is the number of one."""

    model: HookedALM
    pairs: Sequence[PreparedPair]
    places: Sequence[PlaceName]
    config: CircuitsConfig

    @cached_property
    def base(self) -> ALMInput:
        """Prompts that are patched in noising, a row each."""
        return ALMInput.joined([one.base for one in self.pairs])

    @cached_property
    def donor(self) -> ALMInput:
        """Prompts that are patched in denoising, a row each."""
        return ALMInput.joined([one.donor for one in self.pairs])

    @cached_property
    def _exchange(self) -> PairExchange:
        config = self.config
        return PairExchange(
            self.model, self.base, self.donor, metric_of(self.pairs, config),
            config.align_policies(), config.engine, config.max_bytes,
        )  # fmt: skip

    @property
    def _spans(self) -> list[tuple[str, ...]]:
        return [PLACES[name] for name in self.places]

    def nodes(self) -> pd.DataFrame:
        """Every head and plan.MLP patched at every place, both ways; the pair unpatched beside."""
        sites: list[dict[str, Any]] = [{"site": "z", "heads": "each"}, {"site": "mlp_out"}]
        parts = [
            self._exchange.cells(patch, direction, places=self._spans, **site)
            for direction in DIRECTIONS
            for site in sites
        ]
        cells = pd.concat(parts, ignore_index=True).fillna({"head": plan.MLP}).astype({"head": int})
        columns = ["direction", "place", "layer", "head", "value", "toward", "recovery", "noise"]
        return cells[["example", *columns, "base", "donor"]]

    def direct(self) -> pd.DataFrame:
        """What every node tells the logits at the readout: directly, and through MLPs."""
        parts = [
            self._exchange.cells(
                path_patch, direction, list(plan.EVERY_SENDER), plan.LOGITS, mode=mode
            )
            for direction in DIRECTIONS
            for mode in ("edge", "ioi")
        ]
        return pd.concat(parts)[["example", "direction", "mode", "sender", "toward"]]

    def paths(self, nodes: Sequence[CircuitNode], heads: Sequence[CircuitNode]) -> pd.DataFrame:
        """What the embedding and each node of a circuit tell q, k and v of some heads, by place.

        Noising: a message of the donor is sent into the base.
        """
        senders = [plan.EMBED, *(node.sender for node in nodes)]
        parts = [self._heard(senders, heads, mode=mode) for mode in self.config.path_modes]
        # A receiver that comes before the sender hears nothing of it.
        cells = pd.concat(parts).dropna(subset="toward")
        return cells[["example", "mode", "sender", "receiver", "place", "toward", "noise"]]

    def reads(self, heads: Sequence[CircuitNode]) -> pd.DataFrame:
        """Everything that a head reads, exchanged at one place: q, k and v on their own."""
        cells = self._heard([plan.EVERY_SENDER], heads)
        cells = cells.join(plan.heads_named(cells.receiver))
        return cells[["example", "layer", "head", "input", "place", "toward"]]

    def _heard(self, senders: list[Any], heads: Sequence[CircuitNode], **mode: Any) -> pd.DataFrame:
        receivers = [at for node in heads for at in node.receivers]
        options = {"places": self._spans, "kv": "query", **mode}
        return self._exchange.cells(path_patch, "noising", senders, receivers, **options)

    def circuits(self, circuits: Mapping[str, Sequence[CircuitNode]]) -> pd.DataFrame:
        """Circuits alone (all other edges from the donor) and the rest without them."""
        with per_query_head(self.model, True):
            every = all_edges(self.model)
        sets, sizes = {"every edge removed": every}, [len(every)]
        for name, nodes in circuits.items():
            inside = plan.edges_among(nodes)
            sets[f"{name} alone"] = [edge for edge in every if edge not in inside]
            sets[f"{name} removed"] = [edge for edge in every if edge in inside]
            sizes += [len(inside)] * 2
        cells = self._exchange.cells(patch_edges, "noising", sets, kv="query")
        cells[["circuit", "what"]] = cells.edges.str.rsplit(" ", n=1, expand=True)
        # 1: as good as the whole model; 0: as the donor's prompt.
        total = cells.base - cells.donor
        cells["share"] = (cells.value - cells.donor) / total.where(total.abs() >= NO_EFFECT)
        cells["n_edges"] = cells.edges.map(dict(zip(sets, sizes, strict=True)))
        return cells[["example", "circuit", "what", "n_edges", "value", "share"]]

    @torch.no_grad()
    def answers(self) -> list[Row]:
        """What is answered to both prompts of each pair, and whether it begins as the pair says."""
        rows: list[Row] = [{} for _ in self.pairs]
        for side, (name, x) in enumerate({"base": self.base, "donor": self.donor}.items()):
            said = self.model(x)[:, -1].argmax(-1).tolist()
            for row, one, top in zip(rows, self.pairs, said, strict=True):
                row[f"{name}_says"] = self.model.tokenizer.decode([top])
                row[f"{name}_as_given"] = top == one.answers[side]
        return rows
