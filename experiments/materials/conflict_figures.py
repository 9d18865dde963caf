"""Drawings that experiments on conflicts share."""

import pandas as pd
from matplotlib.figure import Figure as Drawing

from ..workbench import figures
from .conflict_runs import EXCHANGES


def draw_handoffs(
    table: pd.DataFrame, x: str, group: str, *, x_label: str, height: float
) -> Drawing:
    """Recoveries of the source span and of the readout, a panel for each exchange.

    Args:
        table: ``recovery_mean`` and its ends by donor, place and group.
        x: column of the place, a block or a depth.
        group: column that tells the curves of a panel apart.
        x_label: what the place is, in words.
        height: of a panel, in inches.
    """
    parts = [
        (some, {"title": f"{one.what.capitalize()} exchanged"})
        for donor, one in EXCHANGES.items()
        if len(some := table[table.donor == donor])
    ]
    return figures.panels(
        figures.curves, parts, height=height, x=x, y="recovery_mean", lo="recovery_low",
        hi="recovery_high", group=group, reference=0.5, x_label=x_label, y_label="recovery",
    )  # fmt: skip
