"""What controls, defects and numbers make of the claims of ``head_statistics``."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from hooked_alm.experiments.head_statistics.experiment import HeadStatistics
from hooked_alm.experiments.head_statistics.settings import HeadStatisticsConfig
from hooked_alm.experiments.head_statistics.tables import HeadResults
from hooked_alm.methods.reading.head_norms import CONTRIBUTION, HEAD_QUANTITIES, OUTPUT

N_LAYERS, N_HEADS, N_ITEMS = 12, 6, 40
UNITS = ("items00000", "items00020")


def cases() -> HeadResults:
    """Results of two units in which later heads write more, in either half."""
    cells = [
        {"unit": unit, "half": half, "layer": layer, "head": head, "n": N_ITEMS // 4}
        for unit in UNITS
        for half in (0, 1)
        for layer in range(N_LAYERS)
        for head in range(N_HEADS)
    ]
    heads = pd.DataFrame(cells)
    for name in HEAD_QUANTITIES:
        heads[f"{name}_mean"] = 1 + heads["head"] + heads.layer / 7 + heads.half / 9
        heads[f"{name}_m2"] = 0.5
    layers = heads[heads["head"] == 0][["unit", "half", "layer", "n"]].assign(
        kept_mean=0.5, kept_m2=0.1
    )
    units = pd.DataFrame(
        {"unit": UNITS, "n_items": N_ITEMS // 2, "identity_error": 1e-6, "most_kept": 0.9}
    )
    items = pd.DataFrame({"unit": np.repeat(UNITS, N_ITEMS // 2), "is_cut": False})
    tables = {"heads": heads, "layers": layers, "items": items, "units": units}
    return summed_up(HeadResults(HeadStatisticsConfig(), {"model": {"blocks": N_LAYERS}}, tables))


def summed_up(run: HeadResults) -> HeadResults:
    """The results with summaries of its own."""
    run = replace(run, tables=dict(run.tables))
    for name, table in HeadStatistics(run.config).summaries(run):
        run.tables[name] = table
    return run


def changed(table: str, **columns: object) -> Callable[[HeadResults], HeadResults]:
    """Results with other columns; functions make them from their table."""
    return lambda run: summed_up(
        replace(run, tables={**run.tables, table: run[table].assign(**columns)})
    )


def _of_half(rows: pd.DataFrame) -> "pd.Series[float]":
    """Heads of the second half in the opposite order."""
    mean = rows[f"{CONTRIBUTION}_mean"]
    return mean.where(rows.half == 0, 20 - mean)


BROKEN = {
    "the heads' contributions, along their sum, add up to its norm": changed(
        "units", identity_error=[1e-6, 2e-3]
    ),
    "no sum is longer than its parts together": changed("units", most_kept=[1.2, 0.9]),
}
OTHER_WAY = {
    "stable": changed("heads", **{f"{CONTRIBUTION}_mean": _of_half}),
    "stands in": changed("heads", **{f"{OUTPUT}_mean": lambda rows: 20 - rows["head"]}),
}
