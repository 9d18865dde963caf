"""What intervals resample: clips, or speakers with all of theirs."""

from collections.abc import Iterator, Sequence
from typing import Literal

import pandas as pd
from pydantic import Field

from ..workbench.settings import ExperimentConfig
from .clips import ClipFile

SPEAKER = "speaker"
"""Column of a table of clips."""


class ResampledConfig(ExperimentConfig):
    """Settings of experiments whose items are clips."""

    cluster: Literal["item", "speaker"] = Field(
        default="item", description="what intervals resample: clips, or speakers with all of theirs"
    )

    @property
    def resampled(self) -> str:
        """What is resampled, in words."""
        return "clips" if self.cluster == "item" else "speakers"

    def clusters(self, who: pd.DataFrame) -> list[str]:
        """What each of some rows, with the columns clip and speaker, is resampled with."""
        return who["clip" if self.cluster == "item" else SPEAKER].tolist()

    def unnamed(self, clips: Sequence[ClipFile]) -> Iterator[str]:
        """Clips that do not say whose they are, where speakers are resampled."""
        for one in clips:
            if self.cluster == SPEAKER and not one.cells.get(SPEAKER):
                yield f"{one.where}: {SPEAKER}: missing, and cluster resamples speakers"
