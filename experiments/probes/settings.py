"""Settings of ``probes``."""

from typing import Any, ClassVar

from pydantic import Field

from hooked_alm.bundled import PREFIX

from ..materials.heard_clips import HeardClipsConfig
from ..materials.held_out_labels import ColumnName, ControlLabelsConfig
from ..materials.point_patterns import PointPatterns
from ..materials.sources import Source
from ..materials.transcription import SPOKEN
from ..workbench.batches import BatchedConfig, BatchSize, UnitBatches
from ..workbench.settings import ModelId


class ProbesConfig(BatchedConfig, ControlLabelsConfig, HeardClipsConfig):
    """Which columns are read off which points of the model, and what is held out together."""

    KNOWN_WITH: ClassVar = ()

    model: ModelId = f"{PREFIX}follows_voice"
    audio: Source = Field(
        default="bundled",
        description="a table of clips (column path, those of labels and, as far as known, speaker "
        "and text), or a folder with a manifest.csv",
    )
    labels: tuple[ColumnName, ...] = Field(
        default=("prosody_label", "semantic_label"),
        min_length=1,
        max_length=100,
        description="columns that are read; clips with an empty cell are left out of its probes",
    )
    points: PointPatterns | None = Field(
        default=None,
        description="hook points, as patterns: * is anything without a dot, {0..4} the numbers "
        "from 0 to 4; None is the decoder's stream and the audio encoder's, at every depth",
    )
    span: str | None = Field(
        default=None,
        description="positions of the prompt that are averaged, such as audio or readout; None is "
        "the clip's, or the readout of a model that keeps its clip elsewhere; of the encoder "
        "always the clip's frames",
    )
    untrained: bool = Field(
        default=True, description="read the same model with random weights, too"
    )
    batch_size: BatchSize = 8
    unit_batches: UnitBatches = 4

    @property
    def source(self) -> Any:
        """Where the clips are."""
        return SPOKEN if self.audio == "bundled" else self.audio
