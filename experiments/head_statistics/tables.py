"""Tables of a ``head_statistics`` run: moments of all units, merged in their order."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.reading.head_norms import CONTRIBUTION, HEAD_QUANTITIES, KEPT, OUTPUT
from hooked_alm.methods.statistics.moments import Moments

from ..workbench.results import Results
from .settings import HeadStatisticsConfig

HeadResults = Results[HeadStatisticsConfig]
TABLES = {
    "heads": "moments of a head's norms and cosine, over one half of a unit's items",
    "layers": "moments of the share that a layer's sum keeps, over one half of a unit's items",
    "items": "a question as it was asked",
    "units": "how far a unit's norms are from what must hold of them",
}


def merged(table: pd.DataFrame, name: str, half: int | None = None) -> Moments:
    """Moments of all units, or of one half of the items; a value per head or layer."""
    total = Moments()
    for (_, number), part in table.groupby(["unit", "half"], sort=False):
        if half in (None, number):
            mean, m2 = (part[f"{name}_{what}"].to_numpy() for what in ("mean", "m2"))
            total = total.merge(Moments(int(part.n.iloc[0]), mean, m2))
    return total


def head_table(run: HeadResults) -> pd.DataFrame:
    """A row per head: mean and standard deviation of each quantity, and its rank in the layer."""
    table = run["heads"][["layer", "head"]].drop_duplicates(ignore_index=True)
    for name in HEAD_QUANTITIES:
        moments = merged(run["heads"], name)
        std = moments.std(ddof=run.config.ddof)
        table = table.assign(**{"n": moments.n, f"{name}_mean": moments.mean, f"{name}_std": std})
    order = table.groupby("layer")[f"{CONTRIBUTION}_mean"].rank(ascending=False, method="first")
    return table.assign(rank_in_layer=order.astype(int))


def layer_table(run: HeadResults) -> pd.DataFrame:
    """A row per layer: mean, least and most over its heads, and the share that is kept."""
    kept = merged(run["layers"], KEPT)
    table = pd.DataFrame({"layer": np.arange(len(kept.mean)), "n": kept.n})
    for name in (OUTPUT, CONTRIBUTION):
        values = layer_by_head(run["head_statistics"], f"{name}_mean")
        table[name], table[f"{name}_low"] = values.mean(1), values.min(1)
        table[f"{name}_high"] = values.max(1)
    return table.assign(kept_mean=kept.mean, kept_std=kept.std(ddof=run.config.ddof))


def layer_by_head(heads: pd.DataFrame, column: str) -> Float[np.ndarray, "layer head"]:
    """A column of ``head_statistics`` as an array."""
    return heads[column].to_numpy().reshape(heads.layer.nunique(), -1)
