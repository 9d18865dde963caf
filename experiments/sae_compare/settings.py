"""Settings of ``sae_compare``."""

from typing import ClassVar

from pydantic import Field

from ..materials.clip_rows import ClipRowsConfig
from ..materials.dictionaries import DictionaryEntry, NamedDictionary
from ..materials.feature_readings import FeatureReadingConfig
from ..materials.held_out_labels import ColumnName
from ..workbench.batches import UnitBatches


class SAECompareConfig(ClipRowsConfig, FeatureReadingConfig):
    """Which dictionaries are compared, on which clips, and what is read off them."""

    KNOWN_WITH: ClassVar = ()

    dictionaries: tuple[DictionaryEntry, ...] = Field(
        default=(
            NamedDictionary(path="bundled:follows_voice_sae"),
            NamedDictionary(path="bundled:follows_voice_sae_1"),
        ),
        min_length=1,
        max_length=32,
        description="folders of sae_train or SAELens, ae.pt of dictionary_learning, bundled:NAME; "
        "or {path: ..., name: ..., point: ..., architecture: ...} where files do not say",
    )
    labels: tuple[ColumnName, ...] = Field(
        default=("prosody_label",),
        min_length=1,
        max_length=100,
        description="columns of the clips' table that are read off few features",
    )
    unit_batches: UnitBatches = 4
