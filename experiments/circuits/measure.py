"""What ``circuits`` measures on one pair, as rows of tidy tables.

Every effect is given as ``toward``: how far the patch moves the metric towards the donor's answer,
in the metric's unit. Noising patches the base with the donor, denoising the donor with the base;
the metric is the base's answer against the donor's in both.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from hooked_alm import HookedALM
from hooked_alm.methods.patching.choice import per_query_head
from hooked_alm.methods.patching.metrics import LogitDiff, LogProb, Metric, Prob
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import all_edges, patch_edges, path_patch
from hooked_alm.methods.patching.results import PatchResult

from ..materials.pairs import PreparedPair
from ..workbench.experiment import Row
from .plan import DIRECTIONS, EMBED, EVERY_SENDER, LOGITS, CircuitNode, Direction, edges_among
from .settings import PLACES, CircuitsConfig, PlaceName

ROUNDING = 1e-4
"""Effects below this are rounding of fp32 logits, and count as none."""


def metric_of(one: PreparedPair, config: CircuitsConfig) -> Metric:
    """The base's answer against the donor's, in the unit that was asked for."""
    base, donor = one.answers
    if config.metric == "logit_diff":
        return LogitDiff(base, donor)
    return LogProb(base) if config.metric == "log_prob" else Prob(base)


class PairSweeps:
    """The sweeps of one pair on one model."""

    def __init__(
        self,
        model: HookedALM,
        one: PreparedPair,
        places: Sequence[PlaceName],
        config: CircuitsConfig,
    ) -> None:
        self.model, self.one, self.config, self.names = model, one, config, list(places)
        self.places = [PLACES[name] for name in places]
        self.metric = metric_of(one, config)
        self.options: dict[str, Any] = {
            "policy": config.align_policies(),
            "engine": config.engine,
            "max_bytes": config.max_bytes,
        }

    def _sides(self, direction: Direction) -> tuple[Any, Any]:
        sides = self.one.base, self.one.donor
        return sides if direction == "noising" else sides[::-1]

    def nodes(self) -> tuple[Row, list[Row]]:
        """The pair unpatched, and every head and MLP patched at every place, both ways."""
        rows, metrics = [], {}
        for direction in DIRECTIONS:
            base, donor = self._sides(direction)
            sweep = partial(
                patch, self.model, base, donor, self.metric, places=self.places, **self.options
            )
            heads, mlps = sweep(site="z", heads="each"), sweep(site="mlp_out")
            metrics[direction] = float(heads.base[0]), float(heads.donor[0])
            rows += self._node_rows(heads, direction) + self._node_rows(mlps, direction)
        clean, corrupt = metrics["noising"]
        return {"base": clean, "donor": corrupt, "total_effect": clean - corrupt}, rows

    def _node_rows(self, found: PatchResult, direction: Direction) -> list[Row]:
        """A row for each cell; an MLP's head is −1."""
        shape = len(found.axes["layer"]), -1, len(self.places)
        toward, recovery, values = (
            array.reshape(shape)
            for array in (self._toward(found, direction), found.recovery, found.values)
        )
        heads = range(toward.shape[1]) if "head" in found.axes else [-1]
        return [
            {
                "direction": direction,
                "place": place,
                "layer": layer,
                "head": head,
                "value": float(values[layer, i, j]),
                "toward": float(toward[layer, i, j]),
                "recovery": float(recovery[layer, i, j]),
            }
            for layer in range(len(toward))
            for i, head in enumerate(heads)
            for j, place in enumerate(self.names)
        ]

    def _toward(self, found: PatchResult, direction: Direction) -> np.ndarray:
        effect = found.effect if direction == "denoising" else -found.effect
        return np.where(np.abs(effect) < ROUNDING, 0.0, effect)

    def direct(self) -> list[Row]:
        """What every node tells the logits at the readout: directly, and through MLPs."""
        rows = []
        for direction in DIRECTIONS:
            base, donor = self._sides(direction)
            for mode in ("edge", "ioi"):
                found = path_patch(
                    self.model, base, donor, self.metric, list(EVERY_SENDER), LOGITS,
                    mode=mode, **self.options,
                )  # fmt: skip
                effects = self._toward(found, direction).reshape(-1)
                senders = found.axes["sender"]
                rows += [
                    {"direction": direction, "mode": mode, "sender": sender, "toward": effect}
                    for sender, effect in zip(senders, effects.tolist(), strict=True)
                ]
        return rows

    def paths(self, nodes: Sequence[CircuitNode], heads: Sequence[CircuitNode]) -> list[Row]:
        """What the embedding and each node of a circuit tell q, k and v of some heads, by place.

        Noising: a message of the donor is sent into the base.
        """
        senders = [EMBED, *(node.sender for node in nodes)]
        receivers = [at for node in heads for at in node.receivers.values()]
        rows = []
        for mode in self.config.path_modes if heads else ():
            found = path_patch(
                self.model, self.one.base, self.one.donor, self.metric, senders, receivers,
                mode=mode, places=self.places, kv="query", **self.options,
            )  # fmt: skip
            effects = self._toward(found, "noising")[..., 0]
            rows += [
                {
                    "mode": mode,
                    "sender": sender,
                    "receiver": receiver,
                    "place": place,
                    "toward": float(effects[i, j, k]),
                }
                for i, sender in enumerate(found.axes["sender"])
                for j, receiver in enumerate(found.axes["receiver"])
                for k, place in enumerate(self.names)
                if np.isfinite(effects[i, j, k])
            ]
        return rows

    def reads(self, nodes: Sequence[CircuitNode]) -> list[Row]:
        """Everything that a head reads, exchanged at one place: q, k and v on their own."""
        parts = {
            at: (node, part)
            for node in nodes
            if node.kind == "head"
            for part, at in node.receivers.items()
        }
        if not parts:
            return []
        found = path_patch(
            self.model, self.one.base, self.one.donor, self.metric, [EVERY_SENDER], list(parts),
            places=self.places, kv="query", **self.options,
        )  # fmt: skip
        effects = self._toward(found, "noising")[0, ..., 0]
        return [
            {
                "layer": node.layer,
                "head": node.head,
                "input": part,
                "place": place,
                "toward": float(effects[j, k]),
            }
            for j, (node, part) in enumerate(parts.values())
            for k, place in enumerate(self.names)
        ]

    def circuits(self, circuits: Mapping[str, Sequence[CircuitNode]]) -> list[Row]:
        """Circuits alone (all other edges from the donor) and the rest without them."""
        with per_query_head(self.model, True):
            every = all_edges(self.model)
        sets = {("every edge", "removed"): every}
        for name, nodes in circuits.items():
            inside = set(edges_among(nodes))
            sets[name, "alone"] = [edge for edge in every if edge not in inside]
            sets[name, "removed"] = [edge for edge in every if edge in inside]
        found = patch_edges(
            self.model, self.one.base, self.one.donor, self.metric,
            {" ".join(key): edges for key, edges in sets.items()}, kv="query", **self.options,
        )  # fmt: skip
        clean, corrupt = float(found.base[0]), float(found.donor[0])
        total = clean - corrupt
        return [
            {
                "circuit": name,
                "what": what,
                "n_edges": len(edges) if what == "removed" else len(every) - len(edges),
                "value": float(value),
                # 1: as good as the whole model; 0: as the donor's prompt.
                "share": (float(value) - corrupt) / total if abs(total) >= ROUNDING else np.nan,
            }
            for ((name, what), edges), value in zip(
                sets.items(), found.values[:, 0, 0], strict=True
            )
        ]

    @torch.no_grad()
    def answers(self) -> Row:
        """What is answered to the two prompts, and whether it begins as the pair says."""
        row: Row = {}
        for name, x, answer in zip(
            ("base", "donor"), (self.one.base, self.one.donor), self.one.answers, strict=True
        ):
            top = int(self.model(x)[0, -1].argmax())
            row[f"{name}_says"] = self.model.tokenizer.decode([top])
            row[f"{name}_as_given"] = top == answer
        return row
