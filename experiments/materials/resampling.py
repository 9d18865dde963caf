"""What intervals resample: clips, or speakers with all of theirs."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from pydantic import Field

from ..workbench.results import Results, Row
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


OfClips = Results[Any]
"""Results of an experiment whose settings are a `ResampledConfig`."""


def mean_of(run: OfClips, table: pd.DataFrame, column: str) -> Row:
    """Mean of a column of a table, of which a row is a clip, with its interval."""
    return run.draws.row(table[column], run.config.clusters(table))


def over(
    table: pd.DataFrame, column: str, x: str = "depth"
) -> tuple[pd.DataFrame, Float[np.ndarray, "clip x"]]:
    """Clips and speakers, and a column of theirs along another."""
    found = table.pivot(index=["clip", "speaker"], columns=x, values=column)
    return found.index.to_frame(index=False), found.to_numpy(np.float64)


def mean_curve(run: OfClips, table: pd.DataFrame, column: str) -> list[Row]:
    """Mean of a column at every depth from 0 on, with its interval."""
    who, values = over(table, column)
    points = run.draws.points(values, run.config.clusters(who))
    return [{"depth": depth, **point} for depth, point in enumerate(points)]
