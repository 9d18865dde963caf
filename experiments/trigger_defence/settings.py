"""Settings of ``trigger_defence``, and what the published code's own choices got wrong."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hooked_alm.bundled import DICTIONARIES, PREFIX
from hooked_alm.methods.neurons.activity import NeuronSite
from hooked_alm.methods.robustness.places import NeuronPlace
from hooked_alm.methods.robustness.sensitivity import SensitivityScore

from ..materials.attacks import AttackConfig
from ..workbench.batches import BatchSize
from ..workbench.claims import Defect
from ..workbench.settings import EachOnce

Percent = Annotated[float, Field(gt=0, le=50)]


class TriggerDefenceConfig(AttackConfig):
    """Which clips are attacked, and which neurons are held against it."""

    KNOWN_WITH: ClassVar[tuple[str, ...]] = ()
    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "eps": 0.05, "alpha": 0.0005, "steps": 1000, "stop_loss": 1.0, "clamp": "0_1",
        "donor": "swapped",
    }  # fmt: skip

    places: Annotated[tuple[NeuronPlace, ...], EachOnce] = Field(
        default=("lm", "audio"), min_length=1,
        description="whose neurons are held: the language model's, the audio encoder's",
    )  # fmt: skip
    site: NeuronSite = Field(
        default="gate", description="the activated gate, as published, or its product with up"
    )
    score: SensitivityScore = Field(
        default="abs_sum", description="of a neuron: the published code's, or the paper's"
    )
    normalised: bool = Field(
        default=False, description="scores in standard deviations of a neuron's clean values"
    )
    span: Literal["all", "audio"] = Field(
        default="all", description="rows that are scored and held; all, as published, or the clip's"
    )
    last: int | None = Field(
        default=None, ge=1, le=10**6, description="of these the last that are held; None is all"
    )
    percent: Percent = Field(
        default=5.0, description="of a place's neurons that are held: what claims are about"
    )
    further_percents: tuple[Percent, ...] = Field(
        default=(0.5, 1.0, 2.0, 20.0), max_length=20, description="beside it, for the curves"
    )
    bias: float = Field(default=1.0, ge=-1000, le=1000, description="that is added to neurons")
    every_step: bool = Field(
        default=False, description="bias and prune hold new tokens too; a patch the prompt alone"
    )
    donor: Literal["named", "swapped"] = Field(
        default="named", description="swapped patches a clip with its own values"
    )
    noise: float = Field(
        default=15 / 255, gt=0, le=1, description="of the defence that adds uniform noise: most"
    )
    n_draws: int = Field(
        default=1, ge=1, le=100, description="random sets of neurons of each kind and place"
    )
    dictionary: str | None = Field(
        default=None, min_length=1, max_length=4000,
        description="whose features are patched beside neurons: a folder, or bundled:NAME; None "
        "is a bundled model's own, of other models none",
    )  # fmt: skip
    batch_size: BatchSize = 10

    @model_validator(mode="after")
    def _has_each_percentage_once(self) -> "TriggerDefenceConfig":
        if len({*self.percents}) < len(self.percents):
            raise ValueError("percents must name each once: percent is one beside further_percents")
        return self

    @property
    def percents(self) -> tuple[float, ...]:
        """All that are held, ascending."""
        return tuple(sorted([self.percent, *self.further_percents]))

    @property
    def dictionary_name(self) -> str | None:
        """The dictionary that is read; None is none."""
        own = f"{self.model.partition('+')[0].removeprefix(PREFIX)}_sae"
        has_one = self.model.startswith(PREFIX) and (DICTIONARIES / own).is_dir()
        return self.dictionary or (PREFIX + own if has_one else None)


DEFECTS = (
    Defect("C20", ("attack", "defences"), lambda c: c.attack == "pgd" and c.clamp == "0_1",
           "What is heard is cut to [0, 1]: the negative half of every wave is silenced, by more "
           "than eps, so that an attack is no small perturbation."),
    Defect("C45", ("defences",), lambda config: config.donor == "swapped",
           "Patches write the attacked clip's own values: they change nothing."),
)  # fmt: skip
