"""Means of items in cells and along curves, and where information leaves one place for another.

An *item* is a clip with a target label T; intervals resample clips, because a clip's items share
everything but a word.

Source: S-7 and S-11.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.bootstrap import handoff_index

from ..workbench.intervals import Draws
from ..workbench.results import Row, parts_by
from .conflict_runs import EXCHANGES


def curves(
    items: pd.DataFrame, x: str | list[str], y: str
) -> tuple[pd.DataFrame, Float[np.ndarray, "item x"], list[Any]]:
    """What the items are, their curves, and the values of ``x``, or of several columns together."""
    wide = items.pivot(index=["clip", "target"], columns=x, values=y)
    return wide.index.to_frame(index=False), wide.to_numpy(np.float64), list(wide.columns)


def mean_curve(items: pd.DataFrame, x: str, y: str, draws: Draws) -> list[Row]:
    """The mean curve with its band, a row per point."""
    what, values, points = curves(items, x, y)
    found = draws.points(values, what["clip"].tolist())
    return [{x: point, "measure": y, **row} for point, row in zip(points, found, strict=True)]


def means_by(
    table: pd.DataFrame, measures: Sequence[str], by: list[str], x: str, draws: Draws
) -> pd.DataFrame:
    """Mean curves of several measures, by group."""
    # A group is a copy: of what is read alone, as a table may have millions of rows.
    table = table[["clip", "target", *by, x, *measures]]
    rows = [
        names | row
        for names, part in parts_by(table, *by)
        for measure in measures
        for row in mean_curve(part, x, measure, draws)
    ]
    return pd.DataFrame(rows).drop(columns="n_clusters")


def cell_means(
    table: pd.DataFrame, measures: Sequence[str], by: list[str], draws: Draws
) -> pd.DataFrame:
    """Means of several measures in every cell, over the items that are defined there.

    Args:
        table: a row per item and cell.
        measures: columns that are averaged.
        by: columns that tell cells apart.
        draws: of the intervals, which resample clips.

    Returns:
        A row per cell and ``measure``.
    """
    parts = []
    for measure in measures:
        what, values, cells = curves(table, by, measure)
        rows = _means_of_defined(values, what["clip"].tolist(), draws)
        about = pd.DataFrame(cells, columns=by).assign(measure=measure)
        parts.append(pd.concat([about, pd.DataFrame(rows)], axis=1))
    return pd.concat(parts, ignore_index=True).rename(columns={"n_clusters": "n_clips"})


def _means_of_defined(
    values: Float[np.ndarray, "item cell"], clips: Sequence[str], draws: Draws
) -> list[Row]:
    """A row per cell; those that are defined for the same items are resampled together."""
    patterns, which = np.unique(np.isnan(values), axis=1, return_inverse=True)
    rows: list[Row] = [{}] * values.shape[1]
    for pattern in range(patterns.shape[1]):
        cells = np.flatnonzero(which.ravel() == pattern)
        for cell, row in zip(cells, draws.points(values[:, cells], clips), strict=True):
            rows[cell] = row
    return rows


def handoffs(cells: pd.DataFrame, x: str, draws: Draws) -> pd.DataFrame:
    """Where information leaves its own span for good, and where it is at the readout for good.

    ``leaves``: the first place from which the span's mean recovery stays below one half (S-11);
    ``arrives``: the first from which the readout's stays at one half or above. NaN if there is no
    such place; ``undefined`` is the share of the replicates without one.

    Args:
        cells: ``recovery`` by clip, target, donor, span and place.
        x: column of the place, a block or a depth.
        draws: of the intervals.
    """
    rows = []
    spans = [(donor, span) for donor, one in EXCHANGES.items() for span in (one.span, "readout")]
    for donor, span in spans:
        part = cells[(cells.donor == donor) & (cells.span == span)]
        if part.empty:
            continue
        event = "arrives" if span == "readout" else "leaves"
        row = {"donor": donor, "span": span, "event": event, "n": 0, "undefined": 1.0}
        if len(part := part[part.recovery.notna()]):
            what, values, places = curves(part, x, "recovery")
            find = partial(_handoff_places, places=places, is_arrival=event == "arrives")
            found = draws.where(values, what["clip"].tolist(), find)
            row |= {x: found.at, **found._asdict(), "n": len(values)}
        rows.append(row)
    columns = ["donor", "span", "event", x, "low", "high", "undefined", "n"]
    return pd.DataFrame(rows, columns=columns)


def _handoff_places(
    recovery: Float[np.ndarray, "curve place"], places: list[int], is_arrival: bool
) -> Float[np.ndarray, " curve"]:
    index = handoff_index(1 - recovery if is_arrival else recovery, is_arrival)
    return np.array([*places, np.nan])[index]
