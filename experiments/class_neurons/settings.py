"""Settings of ``class_neurons``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hooked_alm.bundled import EMOTIONAL
from hooked_alm.methods.neurons.activity import NeuronSite
from hooked_alm.methods.statistics.class_neurons import Selector

from ..materials.class_items import ClassItemsConfig
from ..materials.sources import Source
from ..workbench.batches import BatchSize, UnitBatches
from ..workbench.settings import EachOnce, ModelId

Span = Literal["all", "audio", "text", "readout"]
"""Positions of a prompt: every one, or those of a span."""
Alpha = Annotated[float, Field(ge=-1, le=1000)]
OUT, SAME = -1.0, 0.0
"""Strengths that take a neuron out, and leave it as it is."""


class ClassNeuronsConfig(ClassItemsConfig):
    """Which items neurons are logged on, how they are selected, and what is done with them."""

    model: ModelId = "bundled:follows_voice"
    audio: Source = Field(
        default="bundled",
        description="a table of clips, a folder with manifest.csv, or one of OB1-named clips; "
        "bundled: five emotions by twenty speakers",
    )
    only_right: bool = Field(
        default=True, description="neurons are logged on items with the right answer alone"
    )
    log_share: float = Field(
        default=0.5, gt=0, lt=1,
        description="share of the groups that neurons are selected on; the others are judged",
    )  # fmt: skip
    site: NeuronSite = Field(
        default="gate", description="a neuron's value: the activated gate, or its product with up"
    )
    pool: Span = Field(
        default="all", description="positions that are logged; the paper says nothing"
    )
    rate: float = Field(
        default=0.005, gt=0, le=0.2, description="share of all neurons that every class gets"
    )
    lape_filter: float = Field(
        default=0.95, gt=0, le=1, description="share of LAP values that the bar of lape is above"
    )
    selector: Selector = Field(default="mad", description="whose neurons are made stronger")
    alphas: Annotated[tuple[Alpha, ...], EachOnce] = Field(
        default=(-1, -0.5, 0, 0.5, 1, 2, 4),
        max_length=40,
        description="a value becomes (1 + alpha) times what it was; -1 and 0 are among them",
    )
    place: Span = Field(default="all", description="positions at which neurons are changed")
    n_draws: int = Field(
        default=2, ge=1, le=100, description="random sets of each kind that stand beside a class's"
    )
    min_drive: float = Field(
        default=0.02, gt=0, le=1000,
        description="mean of gates; below this sum of effects a share is undefined",
    )  # fmt: skip
    batch_size: BatchSize = 10
    unit_batches: UnitBatches = 1

    @model_validator(mode="after")
    def _fits_together(self) -> "ClassNeuronsConfig":
        if not {OUT, SAME} <= {*self.alphas}:
            raise ValueError("alphas must include -1 and 0")
        return self

    @property
    def source(self) -> Source | Path:
        """Where the clips are."""
        return EMOTIONAL if self.audio == "bundled" else self.audio
