"""Settings of ``sae_features``."""

from typing import Annotated, ClassVar

from pydantic import Field

from hooked_alm.methods.dictionary.specialisation import MIN_CLIPS, SHARE

from ..materials.clip_rows import ClipRowsConfig
from ..materials.dictionaries import DictionaryReaderConfig
from ..materials.held_out_labels import ColumnName
from ..workbench.batches import UnitBatches

LatentNumber = Annotated[int, Field(ge=0, lt=10**7)]


class SAEFeaturesConfig(DictionaryReaderConfig, ClipRowsConfig):
    """Which dictionary is read on which clips, and what of it is shown."""

    KNOWN_WITH: ClassVar = ()

    domain: ColumnName = Field(
        default="prosody_label",
        description="column of the clips' table whose values latents may be specialised in",
    )
    domain_share: float = Field(
        default=SHARE, gt=0.5, le=1, description="of a latent's clips that are of its domain"
    )
    domain_clips: int = Field(
        default=MIN_CLIPS, ge=1, le=10**6, description="in which such a latent is active at least"
    )
    active_share: float = Field(
        default=0.1, ge=0, lt=1,
        description="share of a clip's rows above which a latent is active in it; 0 is any",
    )  # fmt: skip
    n_draws: int = Field(
        default=200, ge=20, le=10_000, description="how often domains are dealt out anew"
    )
    features: tuple[LatentNumber, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="latents that are shown; None is the most specialised, then the strongest",
    )
    n_shown: int = Field(default=8, ge=1, le=100, description="latents, if none are named")
    n_clips: int = Field(default=4, ge=1, le=20, description="clips of each that are played")
    unit_batches: UnitBatches = 4
