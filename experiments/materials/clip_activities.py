"""What a dictionary finds in every clip, kept in a run's folder, and pooled over some of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from hooked_alm.methods.dictionary.steering import Activity

from ..workbench.run_folder import RunFolder
from .kept_features import ClipFeatures, FeatureFiles, kept_features

PARTS = ("mean", "frequency", "rows")
COUNT = "n"


def activity_features(activity: Activity) -> ClipFeatures:
    """The activity of a clip's rows, for ``keep_features``."""
    parts = {name: getattr(activity, name).numpy() for name in PARTS}
    return {**parts, COUNT: np.array([activity.n], np.float32)}


@dataclass(frozen=True, eq=False)
class ClipActivities:
    """The activity of every clip of a run."""

    kept: Mapping[str, NDArray[np.float32]]

    def of(self, chosen: Bool[np.ndarray, " clip"]) -> Activity:
        """Over all rows of some clips.

        Raises:
            InputError: no clip is chosen.
        """
        parts = (torch.from_numpy(self.kept[name][chosen]) for name in PARTS)
        counts = self.kept[COUNT][chosen, 0].tolist()
        each = zip(*parts, map(int, counts), strict=True)
        return Activity.pooled([Activity(*one) for one in each])


@lru_cache(maxsize=1)  # those of a run, which its units share
def read_activities(folder: RunFolder, files: FeatureFiles) -> ClipActivities:
    """What was kept of all clips, in the order in which they were read.

    Raises:
        InputError: a file that is not as its unit left it.
    """
    return ClipActivities({name: kept_features(folder, name, files) for name in (*PARTS, COUNT)})
