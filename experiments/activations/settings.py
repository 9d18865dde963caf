"""Settings of ``activations``."""

from typing import ClassVar, Literal

from pydantic import Field

from hooked_alm.methods.activations.rows import StoreDtype

from ..materials.heard_clips import HeardClipsConfig
from ..materials.point_patterns import PointPatterns
from ..materials.sources import Source
from ..workbench.batches import BatchedConfig, BatchSize, UnitBatches


class ActivationsConfig(BatchedConfig, HeardClipsConfig):
    """Which clips, which points of the model, at which spans, and how they are kept."""

    KNOWN_WITH: ClassVar = ()

    audio: Source = Field(
        default="bundled",
        description="a table of clips (column path; all others become columns of the index), a "
        "folder with a manifest.csv, or a folder of clips",
    )
    points: PointPatterns = Field(
        default=["blocks.*.hook_resid_post"],
        description="hook points: * is anything without a dot, {0,4} either, {0..4} the numbers "
        "from 0 to 4; `hooked-alm hooks MODEL` lists them",
    )
    spans: list[str] = Field(
        default=["audio"],
        min_length=1,
        description="positions that are kept: audio, text, readout, ... or all; of the audio "
        "encoder, audio",
    )
    store_dtype: StoreDtype | None = Field(
        default=None, description="of what is kept; None is that of the run, which loses nothing"
    )
    batch_size: BatchSize = 8
    unit_batches: UnitBatches = 4

    @property
    def kept_dtype(self) -> StoreDtype:
        """Dtype of the stored values."""
        dtype: Literal["float32", "bfloat16", "float16"] = self.store_dtype or self.dtype
        return dtype
