"""What ``grounding`` reads off a model: the answers of whole runs, and what every exchange moves.

The metric is the score of the label that an exchange calls for, minus that of the one it displaces.
Effects are in logits and positive towards what the exchange does. Two readings of a patch, which
answer different questions and are never averaged (S-12):

* ``denoise`` writes the exchanged run's states into the run as asked: what suffices for its answer.
* ``noise`` writes the states of the run as asked into the exchanged one: what that answer needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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

from ..materials.answers import answers_of
from ..materials.conflict_runs import PromptRun
from ..workbench.results import Row
from .plan import INPUTS, GroundingItem
from .settings import SPANS, GroundingConfig

PatchReading = Literal["denoise", "noise"]
READINGS: tuple[PatchReading, ...] = ("denoise", "noise")
MLP = -1
"""What stands for an MLP where heads are numbered."""
Batches = Mapping[str, ALMInput]
"""Input -> the runs of a batch of items in which it is exchanged, a row each."""
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

    def answers(self, runs: Sequence[PromptRun], x: ALMInput) -> list[Row]:
        """What each run of a batch answers; one forward."""
        found = answers_of(self.model, self.labels, x)
        return [
            {
                "heard": run.recording.name,
                "condition": run.condition,
                "named": run.named,
                **row,
                "n_tokens": int(x.attention_mask[n].sum()),
                "n_audio_tokens": len(x.spans.positions("audio", n)),
            }
            for n, (run, row) in enumerate(zip(runs, found, strict=True))
        ]

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
        self, items: Sequence[GroundingItem], base: ALMInput, donors: Batches
    ) -> Iterator[tuple[str, int, Row]]:
        """Table, item and row of every cell, in both readings."""
        for site in self.sites():
            for reading in READINGS:
                effects = {
                    name: self._effects(site, reading, base, donors[name],
                                        [one.sweeps[k].toward for one in items])
                    for k, name in enumerate(donors)
                }  # fmt: skip
                for n, row in self._rows(site, effects):
                    yield site.table, n, {"direction": reading, **row}

    @torch.no_grad()
    def unpatched(
        self, items: Sequence[GroundingItem], base: ALMInput
    ) -> Iterator[tuple[str, int, Row]]:
        """Table, item and row of every site: what changes if a run is patched with itself."""
        for site in self.sites():
            found = self._patched(site, base, base)
            shifts = np.abs(found.values - found.base).max(axis=-1)
            largest = shifts.reshape(-1, len(items)).max(axis=0)
            name = site.options["site"]
            for n, one in enumerate(largest.tolist()):
                yield "unpatched", n, {"site": name, "shift": one}

    def _patched(self, site: SweptSite, base: ALMInput, donor: ALMInput) -> PatchResult:
        config = self.config
        options: PatchOptions = {
            **site.options, "policy": config.align_policies(), "engine": config.engine,
            "max_bytes": config.max_bytes,
        }  # fmt: skip
        return patch(self.model, base, donor, LabelScores(self.labels), **options)

    def _effects(
        self,
        site: SweptSite,
        reading: PatchReading,
        base: ALMInput,
        donor: ALMInput,
        toward: Sequence[tuple[str, str]],
    ) -> tuple[EffectCells, EffectCells, EffectCells]:
        """Effect, total effect and rounding of one exchange, by cell and item.

        Under ``noise`` base and donor change places.
        """
        sides, sign = ((base, donor), 1) if reading == "denoise" else ((donor, base), -1)
        found, item = self._patched(site, *sides), np.arange(len(toward))
        gained, lost = ([self.labels.index(pair[i]) for pair in toward] for i in (0, 1))
        patched, start, end = (
            one[..., item, gained] - one[..., item, lost]
            for one in (found.values, found.base, found.donor)
        )
        effect, total = sign * (patched - start), sign * (end - start)
        return effect, *np.broadcast_arrays(total, found.noise_between_labels, effect)[:2]

    def _rows(
        self, site: SweptSite, effects: Mapping[str, tuple[EffectCells, EffectCells, EffectCells]]
    ) -> Iterator[tuple[int, Row]]:
        """Item and row of every cell of a site; NaN for an input that was not exchanged."""
        least, shape = self.config.min_effect, next(iter(effects.values()))[0].shape
        nothing, columns = np.full(shape, np.nan), dict[str, EffectCells]()
        for name in INPUTS:
            effect, total, _ = effects.get(name, (nothing, nothing, nothing))
            columns |= {f"te_{name}": total, f"effect_{name}": effect}
            columns[f"rec_{name}"] = recovery(effect, 0.0, total, eps=least)
        columns["gc"] = grounding_coefficient(
            columns["effect_audio"], columns["effect_text"], min_effect=least,
            form=self.config.gc_form,
        )  # fmt: skip
        columns["noise"] = np.max([noise for _, _, noise in effects.values()], axis=0)
        for cell in np.ndindex(shape):
            at = {name: values[i] for (name, values), i in zip(site.at.items(), cell, strict=False)}
            if site.table == "nodes":
                at.setdefault("head", MLP)
            yield cell[-1], at | {name: float(values[cell]) for name, values in columns.items()}
