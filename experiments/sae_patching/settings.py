"""Settings of ``sae_patching``."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from hooked_alm.methods.patching.alignment import AlignPolicy

from ..materials.conflict_settings import ConflictConfig
from ..materials.dictionaries import DictionaryReaderConfig
from ..materials.held_out_labels import ColumnName
from ..workbench.batches import BatchSize
from ..workbench.claims import Defect
from ..workbench.settings import EachOnce, ModelId

NumberOfLatents = Annotated[int, Field(ge=1, lt=10**6)]


class SAEPatchingConfig(DictionaryReaderConfig, ConflictConfig):
    """Which features of which dictionary are exchanged, in which clips, under what instructions."""

    KNOWN_WITH: ClassVar = (*ConflictConfig.KNOWN_WITH, "dictionary", "point")

    model: ModelId = "bundled:follows_voice"
    batch_size: BatchSize = 4
    conditions: Annotated[tuple[Literal["audio_only", "conflict"], ...], EachOnce] = Field(
        default=("audio_only", "conflict"),
        min_length=1,
        description="what is asked, each apart: audio_only names no label, conflict another one",
    )
    donor: Literal["clip", "mean"] = Field(
        default="clip",
        description="features that are written in: of a clip of the other label, position by "
        "position; or their mean over such clips, for clips that are not as long as each other",
    )
    sizes: Annotated[tuple[NumberOfLatents, ...], EachOnce] = Field(
        default=(1, 3, 10, 30, 90),
        min_length=1,
        max_length=20,
        description="latents of either label that are exchanged, those most above in its clips",
    )
    n_latents: NumberOfLatents = Field(
        default=10, description="the one of sizes that claims and strengths are about"
    )
    alphas: Annotated[tuple[Annotated[float, Field(gt=0, le=100)], ...], EachOnce] = Field(
        default=(0.25, 0.5, 1.5, 2.0),
        max_length=20,
        description="strengths beside 1 of the exchange, and of the push that is as far",
    )
    group: ColumnName | None = Field(
        default=None,
        description="column: latents are chosen on clips of other values than the tested ones; "
        "None is speaker, else every clip by itself; of the bundled clips, language",
    )
    align: AlignPolicy = Field(
        default="error",
        description="clips that are not as long as their donors; means need no alignment",
    )

    @property
    def held_out_with(self) -> str | None:
        """Column of what latents are chosen without."""
        return "language" if self.group is None and self.audio == "bundled" else self.group

    @model_validator(mode="after")
    def _sizes_and_conditions(self) -> "SAEPatchingConfig":
        if self.n_latents not in self.sizes:
            raise ValueError(f"n_latents must be one of sizes, {[*self.sizes]}")
        return self


DEFECTS = (
    Defect("C10", ("edits",), lambda config: config.align == "min_len" and config.donor == "clip",
           "Positions are matched from the start: after a length change, wrongly."),
)  # fmt: skip
