"""Maps of what every head does, block by block."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from ..workbench import figures


def draw_head_maps(
    maps: Mapping[str, pd.DataFrame],
    every: "pd.Series[float]",
    n_blocks: int,
    *,
    y: str = "layer",
    value: str = "toward",
    unit: str = "logits",
) -> Figure:
    """Heads by blocks, from bottom to top: red moves the answer on, blue away.

    Args:
        maps: title of a panel -> a row per head.
        every: effects that share one scale, whether they are shown or not.
        n_blocks: of the model.
        y: column of the block.
        value: column of the effect.
        unit: of the effect.
    """
    return figures.panels(
        figures.heat_map, [(part, {"title": title}) for title, part in maps.items()],
        height=max(2.6, 1.4 + 0.3 * n_blocks), x="head", y=y, value=value,
        value_label=f"effect ({unit})", centre=0, limits=figures.ends_of(every), decimals=2,
        is_upwards=True,
    )  # fmt: skip
