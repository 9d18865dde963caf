"""Settings of ``sae_train``."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary.autoencoder import Architecture, DictionaryConfig
from hooked_alm.methods.dictionary.recipes import RECIPES, RecipeName
from hooked_alm.methods.dictionary.training import DictionaryTraining

from ..materials.checkpoints import StepsPerCheckpoint
from ..materials.clip_rows import HeldOutClipsConfig
from ..materials.point_patterns import PointPatterns
from ..workbench.settings import MOST_BYTES

OF_RUNS = (
    *("model", "revision", "components", "lora", "dtype", "device_map", "attn_implementation"),
    *("audio", "prompt", "language", "truncate"),
)
"""Settings that decide what a model makes of clips."""
PrefixShare = Annotated[float, Field(gt=0, le=1)]


class SAETrainConfig(HeldOutClipsConfig):
    """Which rows of which clips, and how dictionaries of them are trained."""

    KNOWN_WITH: ClassVar = ()

    store: str | None = Field(
        default=None,
        description="folder of stored activations, such as RUN/activations/encoder of "
        "`hooked-alm run activations`: rows that are learnt instead of those of runs",
    )
    points: PointPatterns = Field(
        default=["blocks.1.hook_resid_post"],
        description="hook points, all of the decoder or all of the audio encoder, or points of the "
        "store. * is anything without a dot, {0,4} either, {0..4} the numbers from 0 to 4; "
        "`hooked-alm hooks MODEL` lists a model's",
    )
    recipe: RecipeName | None = Field(
        default=None, description="defaults as somebody has published them; None is ours"
    )
    architecture: Architecture = Field(
        default="batchtopk",
        description="which latents are active: the k largest of a row, of a batch, those above a "
        "learnt threshold, as batchtopk with prefixes that reconstruct alone, or (standard) all "
        "that are positive, kept few by an L1 penalty",
    )
    pool: Literal["none", "mean"] = Field(
        default="none",
        description="mean learns one row a clip, the mean of its rows; no run is then judged with "
        "reconstructions in its place",
    )
    expansion: float = Field(
        default=8, gt=0, le=1000, description="latents of a dictionary for each number of a row"
    )
    n_latents: int | None = Field(
        default=None, ge=1, le=10**8, description="of a dictionary; None is by expansion"
    )
    k: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="active latents a row; of jumprelu, aimed at. None is 32, or a twelfth of a "
        "row's width where that is less; standard has none",
    )
    prefix_shares: list[PrefixShare] = Field(
        default=[1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0],
        min_length=1,
        max_length=32,
        description="of matryoshka: shares of the latents that reconstruct alone",
    )
    n_dictionaries: int = Field(
        default=2, ge=1, le=16, description="of every point, from seeds of their own: seed and on"
    )
    noise: bool = Field(
        default=True,
        description="train as many on noise of the rows' mean and covariance, which has no "
        "directions to find",
    )
    n_rows: int = Field(
        default=1_000_000,
        ge=1,
        le=10**12,
        description="rows that training sees; those seen again count",
    )
    step_rows: int = Field(default=1024, ge=2, le=10**7, description="rows of a step")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="at its highest; None is 2e-4 / sqrt(latents / 16384)",
    )
    decay_share: float = Field(
        default=0.2, ge=0, le=1, description="last share of the steps, over which the rate falls"
    )
    aux_weight: float = Field(
        default=1 / 32, ge=0, le=1000, description="of the loss that revives dead latents"
    )
    l1_weight: float = Field(
        default=0.2, ge=0, le=1000, description="of standard's penalty, of rows of mean square 1"
    )
    is_centred: bool = Field(
        default=True, description="b_dec is learnt and taken from rows first; else there is none"
    )
    is_tied: bool = Field(default=False, description="the encoder is the directions themselves")
    keeps_norms: bool = Field(default=True, description="directions keep norm 1")
    dead_after: int | None = Field(
        default=None,
        ge=1,
        le=10**12,
        description="rows without activity after which a latent is dead; None is 2 % of all",
    )
    resample_every: int = Field(
        default=0,
        ge=0,
        le=10**9,
        description="steps after which latents that are never positive begin anew; 0 is never",
    )
    steps_per_checkpoint: StepsPerCheckpoint = 200
    max_bytes: int = Field(
        default=2**29,
        ge=1,
        le=MOST_BYTES,
        description="rows that are held and shuffled together; where all fit, clips run once",
    )

    @property
    def n_steps(self) -> int:
        """Steps of the training."""
        return max(self.n_rows // self.step_rows, 1)

    @property
    def seeds(self) -> list[int]:
        """Seed of each dictionary of a point."""
        return [self.seed + number for number in range(self.n_dictionaries)]

    def shape(self, width: int) -> DictionaryConfig:
        """The dictionary of rows of a width.

        Raises:
            InputError: more active latents than there are.
        """
        d_sae = self.n_latents or max(round(self.expansion * width), 1)
        k = None if self.architecture == "standard" else self.k or max(min(32, width // 12), 1)
        prefixes: tuple[int, ...] = ()
        if self.architecture == "matryoshka":
            prefixes = tuple(sorted({max(round(d_sae * share), 1) for share in self.prefix_shares}))
        return DictionaryConfig(
            d_in=width, d_sae=d_sae, architecture=self.architecture, k=k, prefixes=prefixes
        )

    def training(self) -> DictionaryTraining:
        """Loss, schedule and what counts as dead."""
        return DictionaryTraining(
            n_steps=self.n_steps,
            batch_size=self.step_rows,
            learning_rate=self.learning_rate,
            decay_share=self.decay_share,
            aux_weight=self.aux_weight,
            l1_weight=self.l1_weight,
            is_centred=self.is_centred,
            is_tied=self.is_tied,
            keeps_norms=self.keeps_norms,
            dead_after=self.dead_after,
            resample_every=self.resample_every,
        )

    @property
    def subject(self) -> str:
        """The store, or the model."""
        return self.store or self.model

    @property
    def provenance(self) -> dict[str, str]:
        """Where every number of the recipe is from; given, where it was changed."""
        known = RECIPES[self.recipe].settings if self.recipe else {}
        return {
            name: source if getattr(self, name) == value else "given"
            for name, (value, source) in known.items()
        }

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_recipe(cls, values: dict[str, Any]) -> dict[str, Any]:
        chosen = [one.values for name, one in RECIPES.items() if name == values.get("recipe")]
        return {**(chosen[0] if chosen else {}), **values}

    @model_validator(mode="after")
    def _has_one_source(self) -> "SAETrainConfig":
        fields = SAETrainConfig.model_fields
        said = [name for name in OF_RUNS if getattr(self, name) != fields[name].get_default()]
        if self.store and said:
            raise ValueError(
                f"rows of a store are learnt as they are, {', '.join(said)} would decide nothing: "
                "leave out either store or these"
            )
        return self

    @model_validator(mode="after")
    def _has_no_useless_k(self) -> "SAETrainConfig":
        if self.architecture == "standard" and self.k is not None:
            raise ValueError(
                f"k={self.k} decides nothing of standard, whose l1_weight keeps latents few: leave "
                "k out, or take another architecture"
            )
        return self

    @model_validator(mode="after")
    def _can_be_trained(self) -> "SAETrainConfig":
        try:
            self.training()
        except InputError as error:
            raise ValueError(str(error)) from None
        if 1 not in self.prefix_shares:
            raise ValueError("prefix_shares must have 1 among them: the whole dictionary")
        return self
