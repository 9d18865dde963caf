"""What ``grounding`` reads off a model: what every exchange moves, in both readings.

The metric is the score of the label that an exchange calls for, minus that of the one it displaces.
Effects are in logits and positive towards what the exchange does. Two readings of a patch, which
answer different questions and are never averaged (S-12):

* ``denoise`` writes the exchanged run's states into the run as asked: what suffices for its answer.
* ``noise`` writes the states of the run as asked into the exchanged one: what that answer needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.metrics import LabelScores
from hooked_alm.methods.patching.options import PatchOptions
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.results import PatchResult
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.statistics.bootstrap import recovery
from hooked_alm.methods.statistics.grounding import grounding_coefficient

from ..materials.conflict_runs import INPUTS, ExchangedRun
from ..workbench.results import Row
from .settings import SPANS, GroundingConfig

PatchReading = Literal["denoise", "noise"]
READINGS: tuple[PatchReading, ...] = ("denoise", "noise")
MLP = -1
"""In place of a head: an MLP."""
PARTS = ("te", "effect", "rec")
"""What is measured of an exchange: its total effect, a cell's, and the recovery."""
EffectCells = Float[np.ndarray, "*cell example"]


class SweptSite(NamedTuple):
    """A site that is swept, the table that it fills, and the columns that name its cells."""

    table: Literal["grounding", "nodes"]
    options: PatchOptions
    at: Mapping[str, Sequence[int | str]]
    """Column -> its value by the index of the cell, axis by axis."""


@dataclass(frozen=True, eq=False)
class GroundingMeasures:
    """A model, the labels that it is read with, and the settings of a run."""

    model: HookedALM
    labels: LabelSet
    config: GroundingConfig

    def sites(self) -> Iterator[SweptSite]:
        """The stream at every depth; every head, and every MLP."""
        blocks, heads = range(len(self.model.path)), range(self.model.path_cfg.n_heads)
        spans, parts = [*SPANS], [*SPANS.values()]
        # Depth 0 is what the first block reads, any other what the block before it leaves.
        depths: PatchOptions = {"site": "resid_pre", "layers": (0,), "places": parts}
        yield SweptSite("grounding", depths, {"depth": [0], "span": spans})
        depths = {"site": "resid_post", "places": parts}
        yield SweptSite("grounding", depths, {"depth": [b + 1 for b in blocks], "span": spans})
        own = self.config.node_spans
        nodes: PatchOptions = {"site": "z", "heads": "each", "places": own}
        yield SweptSite("nodes", nodes, {"block": blocks, "head": heads, "span": own})
        yield SweptSite("nodes", {"site": "mlp_out", "places": own}, {"block": blocks, "span": own})

    @torch.no_grad()
    def cells(
        self, items: Sequence[ExchangedRun], base: ALMInput, donors: Mapping[str, ALMInput]
    ) -> Iterator[tuple[str, int, Row]]:
        """Table, item and row of every cell, in both readings."""
        for site, reading in product(self.sites(), READINGS):
            columns = self._columns(site, reading, items, base, donors)
            for cell in np.ndindex(columns["gc"].shape):
                ticks = zip(site.at.items(), cell, strict=False)
                at = {"direction": reading} | {name: values[i] for (name, values), i in ticks}
                if site.table == "nodes":
                    at.setdefault("head", MLP)
                found = {name: float(values[cell]) for name, values in columns.items()}
                yield site.table, cell[-1], at | found

    @torch.no_grad()
    def unpatched(
        self, items: Sequence[ExchangedRun], base: ALMInput
    ) -> Iterator[tuple[str, int, Row]]:
        """Table, item and row of every site: what changes if a run is patched with itself."""
        for site in self.sites():
            shifts = np.abs(self._patched(site, base, base).effect).max(axis=-1)
            largest = shifts.reshape(-1, len(items)).max(axis=0)
            for n, one in enumerate(largest.tolist()):
                yield "unpatched", n, {"site": site.options["site"], "shift": one}

    def _patched(self, site: SweptSite, base: ALMInput, donor: ALMInput) -> PatchResult:
        options: PatchOptions = {**site.options, **self.config.patch_options()}
        return patch(self.model, base, donor, LabelScores(self.labels), **options)

    def _columns(
        self,
        site: SweptSite,
        reading: PatchReading,
        items: Sequence[ExchangedRun],
        base: ALMInput,
        donors: Mapping[str, ALMInput],
    ) -> dict[str, EffectCells]:
        """What a site's cells do, by cell and item; NaN for an input that was not exchanged.

        Under ``noise`` base and donor change places.
        """
        config, sign, noises = self.config, 1 if reading == "denoise" else -1, []
        found: dict[tuple[str, str], Any] = dict.fromkeys(product(INPUTS, PARTS), np.nan)
        for k, (name, donor) in enumerate(donors.items()):
            result = self._patched(site, *(base, donor)[::sign])
            lead = result.contrast(*zip(*(one.sweeps[k].toward for one in items), strict=True))
            effect, total = sign * lead.effect, sign * lead.total_effect
            recovered = recovery(effect, 0.0, total, eps=config.min_effect)
            found |= zip(product([name], PARTS), (total, effect, recovered), strict=True)
            noises.append(result.noise_between_labels)
        columns = {f"{part}_{name}": one for (name, part), one in found.items()}
        columns = {name: np.broadcast_to(one, effect.shape) for name, one in columns.items()}
        columns["gc"] = grounding_coefficient(
            columns["effect_audio"], columns["effect_text"], min_effect=config.min_effect,
            form=config.gc_form,
        )  # fmt: skip
        return columns | {"noise": np.broadcast_to(np.max(noises, axis=0), effect.shape)}
