"""Prompts enriched by their own early states: what helps is chosen on some clips, judged on others.

Source: AudioLens, section on improving without training; M-AL-5, C47.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, TypeVar, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.enrich import (
    EnrichControl,
    Enrichment,
    EnrichMode,
    check_blocks,
    enrich,
    enriching_states,
)
from hooked_alm.methods.patching.metrics import LabelScores
from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.reading.lens import residual_rows

from ..workbench.claims import Defect
from ..workbench.experiment import Unit
from ..workbench.intervals import prefixed
from ..workbench.results import ItemRows, Tables, joined, parts_by
from ..workbench.settings import EachOnce, EngineBytes
from .attribute_answers import CHANGED, WHO, AttributeAnswers, OfAttributes
from .attribute_experiment import AttributeExperiment, AttributeWork
from .attribute_prompts import AttributePrompt, AttributesConfig
from .held_out import split_clips
from .resampling import mean_of

DepthOrBlock = Annotated[int, Field(ge=0, le=10_000)]


class EnrichmentConfig(AttributesConfig):
    """What enriches what, and on which clips that is chosen."""

    enrich_modes: Annotated[tuple[EnrichMode, ...], EachOnce] = Field(
        default=("add", "average"),
        description="of enrichment; average_input skips the block, () is no enrichment",
    )
    enrich_sources: tuple[DepthOrBlock, ...] | None = Field(
        default=None, min_length=1, description="depths whose states enrich others; None is all"
    )
    enrich_layers: tuple[DepthOrBlock, ...] | None = Field(
        default=None, min_length=1, description="blocks whose output is enriched; None is all"
    )
    coefficient: float = Field(default=1.0, ge=-1e6, le=1e6, description="of what is added")
    enrich_controls: Annotated[tuple[EnrichControl, ...], EachOnce] = Field(
        default=get_args(EnrichControl), description="what else the chosen block is enriched with"
    )
    validation_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of the clips on which source, block and mode "
        "of the enrichment are chosen; it is judged on the others"
    )  # fmt: skip
    engine: Engine = Field(
        default="fast", description="of the sweeps; hooks is one whole forward per cell"
    )
    max_bytes: EngineBytes = 2**28


ENRICHMENT_DEFECTS = (
    Defect("C47", ("enrichment", "enrichment_search"), lambda c: "average_input" in c.enrich_modes,
           "The average is taken with what enters the block, and replaces what leaves it: the "
           "block is skipped."),
    Defect("M-AL-5", ("enrichment",), lambda c: bool(c.enrich_modes) and not c.enrich_controls,
           "Nothing else enriches the block: a gain may be that of any change of its norm."),
)  # fmt: skip
ENRICHED = Enrichment._fields
ENRICHMENTS = {
    "enrichment_search": "a question enriched by one depth after one block, to choose from",
    "enrichment": "a question of another clip enriched as chosen, or by what should not help",
}
_CELL = (*WHO, *CHANGED, *ENRICHED)
ENRICHMENTS_MAY_LACK = {"enrichment_search": _CELL, "enrichment": (*_CELL, "donor")}
"""Columns that are read of tables that some settings leave empty."""


class EnrichmentSearch(AttributeWork):
    """A prompt enriched by every depth after every block, in every mode."""


@dataclass(frozen=True)
class EnrichmentTest(AttributeWork):
    """A prompt of another clip, enriched as chosen, and by what must not help."""

    chosen: Enrichment
    """What was best on the clips of the search."""
    other: AttributePrompt | None
    """The same of a clip of another label; None where there is none."""

    @property
    def prompts(self) -> tuple[AttributePrompt, ...]:
        """Both of them."""
        return (self.prompt,) if self.other is None else (self.prompt, self.other)


@dataclass(frozen=True, eq=False)
class EnrichmentMeasures(AttributeAnswers):
    """The answers of a batch whose states are enriched."""

    config: EnrichmentConfig

    def draws(self) -> list[np.random.Generator]:
        """Draws of every prompt."""
        return [one.random(self.config.seed) for one in self.prompts]

    def search(self) -> ItemRows:
        """Every mode, block and source, but for those later than what a block could be given."""
        config, rows = self.config, residual_rows(self.model, self.x)[:, :, 0]
        sources = [*(config.enrich_sources or range(len(self.model.path)))]
        every = joined(
            self._enriched(rows[sources], sources, config.enrich_layers, mode)
            for mode in config.enrich_modes
        )
        return [[row for row in found if row["source"] <= row["layer"]] for found in every]

    @torch.no_grad()
    def enriched(self, chosen: Enrichment, other: ALMInput | None) -> ItemRows:
        """The chosen enrichment, and its controls."""
        rows = residual_rows(self.model, self.x)[:, :, 0]
        others = None if other is None else residual_rows(self.model, other)[:, :, 0]
        states = enriching_states(
            rows, chosen.source, self.config.enrich_controls, self.draws(), others
        )
        return self._enriched(
            torch.stack([*states.values()]), [chosen.source] * len(states), [chosen.layer],
            chosen.mode, donor=np.array([*states])[:, None, None],
        )  # fmt: skip

    def _enriched(
        self,
        states: Float[Tensor, "source batch d_model"],
        sources: Sequence[int],
        layers: Sequence[int] | None,
        mode: EnrichMode,
        **about: Any,
    ) -> ItemRows:
        config = self.config
        swept = enrich(
            self.model, self.x, states, LabelScores(self.labels), layers=layers, mode=mode,
            coefficient=config.coefficient, engine=config.engine, max_bytes=config.max_bytes,
        )  # fmt: skip
        layer = np.array(swept.axes["layer"])[:, None]
        at = {**self.who, "source": np.array(sources)[:, None, None], "layer": layer}
        return self.rows({**at, **self.changed(swept), "mode": mode, **about})


def chosen_enrichment(search: pd.DataFrame | None) -> dict[str, Enrichment]:
    """Attribute -> what helped most on the clips of the search: hits first, then the margin."""
    if search is None or search.empty:
        return {}
    cells = search.groupby(["attribute", *ENRICHED], sort=False)[["hit", "margin"]].mean()
    best = cells.sort_values(["hit", "margin"], ascending=False, kind="stable").reset_index()
    best = best.drop_duplicates("attribute").set_index("attribute")[[*ENRICHED]]
    return {str(name): Enrichment(*row) for name, *row in best.itertuples()}


def enrichments(run: OfAttributes) -> pd.DataFrame:
    """What the chosen enrichment and its controls bring, on other clips."""
    table, names = run["enrichment"], ("attribute", "donor", *ENRICHED)
    table = table.assign(hits_gained=table.hit - table.base_hit)
    nothing = dict.fromkeys(("mean", "low", "high"), np.nan)
    columns = [*names, *prefixed("gain", nothing), *prefixed("hits_gained", nothing), "n"]
    rows = [
        {**own, **prefixed("gain", mean_of(run, part, "gain")),
         **prefixed("hits_gained", mean_of(run, part, "hits_gained")), "n": len(part)}
        for own, part in parts_by(table, *names)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


E = TypeVar("E", bound=EnrichmentConfig)


class EnrichmentExperiment(AttributeExperiment[E]):
    """Enriches prompts, beside whatever else it does with them."""

    def identify(self) -> dict[str, Any]:
        """Reads the clips, and checks every prompt and what is to be enriched."""
        inputs = super().identify()
        sources, layers = self.config.enrich_sources, self.config.enrich_layers
        check_blocks(len(self.model.path), enrich_sources=sources, enrich_layers=layers)
        return {**inputs, "validation": sorted(self.searched)}

    @cached_property
    def searched(self) -> set[str]:
        """Clips on which an enrichment is chosen; it is judged on the others."""
        who = pd.DataFrame([{**one.cells, "clip": one.name} for one in self.recordings])
        groups, config = self.config.clusters(who), self.config
        parts = split_clips(who["clip"], groups, config.validation_share, config.seed)
        return {name for name, part in parts.items() if part == "discovery"}

    def searches(self) -> list[Unit]:
        """The search for an enrichment; nothing where there is no mode of it."""
        asked = [self.asked(*item) for item in self.items if item[0].name in self.searched]
        return self.batched(map(EnrichmentSearch, asked if self.config.enrich_modes else []))

    def further_units(self, tables: Tables) -> list[Unit]:
        """The enrichment that was best on some clips, on the others."""
        asked = [self.asked(*item) for item in self.items if item[0].name not in self.searched]
        return self.batched(
            EnrichmentTest(one, chosen, self.of_another_label(one))
            for name, chosen in chosen_enrichment(tables.get("enrichment_search")).items()
            for one in asked
            if one.attribute == name
        )

    def batch_kind(self, work: AttributeWork) -> Hashable:
        """The prompt's, and what is enriched how."""
        kind = super().batch_kind(work)
        if isinstance(work, EnrichmentTest):
            return kind, work.chosen, work.other is None
        return kind

    def enriched(
        self, works: Sequence[AttributeWork], ours: EnrichmentMeasures
    ) -> dict[str, ItemRows]:
        """Table -> rows of a batch of searches, or of tests; nothing of other works."""
        first = works[0]
        if isinstance(first, EnrichmentTest):
            others = [other for work in works for other in work.prompts[1:]]
            other = self.prompts.input(*others) if others else None
            return {"enrichment": ours.enriched(first.chosen, other)}
        return {"enrichment_search": ours.search()} if isinstance(first, EnrichmentSearch) else {}
