"""Tables of a ``prefix_comparison`` run -> summaries with intervals over items.

Source: cards M-002-8 to M-002-14; blocks S-7 and S-8.
"""

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.bootstrap import Interval, stratified_bootstrap
from hooked_alm.methods.statistics.rank_correlation import fisher_z

from ..workbench.intervals import Draws, prefixed
from ..workbench.results import Results
from .settings import PrefixComparisonConfig

PrefixResults = Results[PrefixComparisonConfig]
TABLES = {
    "items": "an item: sizes, losses, divergence and outcomes of the two prefixes at the output",
    "runs": "an item after a prefix, at the output",
    "curves": "an item after a prefix, against b, at a depth",
    "classes": "an item's tokens of one class, a against b, at a depth",
    "mass": "an item's attention after a prefix, to a segment, in a layer",
    "coupling": "an item's rank correlation of attention and ΔNLL, in a layer",
    "positions": "an item whose prefixes were made as long as each other, in one way",
    "matched": "such an item, a against b, at a depth",
}
MAY_LACK = {
    "positions": ("item", "group", "mode", "is_matched", "largest_nll_change", "largest_js"),
    "matched": ("item", "group", "mode", "depth", "delta", "js"),
}
"""Prefixes of one length are matched as they are."""
QUADRANTS = ("G11", "G10", "G01", "G00")


def compared(run: PrefixResults) -> tuple[str, str, str]:
    """Names of the conditions a and b, and of the segment that a has and b has not."""
    names = run.inputs["compared"]
    return names["a"], names["b"], names["segment"]


def summarise(run: PrefixResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary, by the name of its file."""
    draws = run.draws
    yield "curves_summary", curve_table(run["curves"], draws)
    yield "quadrants", quadrant_table(run)
    yield "mass_summary", mass_table(run["mass"], draws)
    yield "coupling_summary", coupling_table(run["coupling"], draws)
    yield "runs_summary", run_table(run["runs"], draws)
    yield "classes_summary", class_table(run["classes"], draws)
    yield "positions_summary", position_table(run)


def wide(table: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """A row per item and group, in the order of the table; a column per depth or layer."""
    found = table.pivot(index=["item", "group"], columns=column, values=value)
    return found.loc[list(dict.fromkeys(zip(table.item, table.group, strict=True)))]


def benefit(run: PrefixResults) -> pd.DataFrame:
    """ΔNLL of a against b: a row per item and group, a column per depth."""
    curves = run["curves"]
    return wide(curves[curves.run == compared(run)[0]], "depth", "delta")


def fisher(coupling: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Correlations as Fisher's z: a row per item and group, a column per layer."""
    return wide(coupling, "layer", kind).apply(lambda own: fisher_z(own.to_numpy()))


def groups_of(values: Any) -> list[str]:
    """The group of every row of `wide`: what is resampled together."""
    return values.index.get_level_values("group").tolist()


def means(values: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Mean over items of each column, its interval, and how many items and groups it is from.

    Items are resampled by group. One with a NaN is left out whole, and counted.
    """
    rows = draws.points(values.to_numpy(np.float64), groups_of(values))
    found = pd.DataFrame(rows).rename(columns={"n_clusters": "n_groups"})
    columns = ["mean", "low", "high", "n", "n_groups", "n_undefined"]
    return found[columns].set_axis(values.columns).reset_index()


def curve_table(curves: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Every run against b, by depth; with the band that holds for all depths at once."""
    found = []
    for run, some in curves.groupby("run", sort=False):
        for metric in ("delta", "js", "kl", "kl_back"):
            values = wide(some, "depth", metric)
            both = draws.mean(values.to_numpy(np.float64), groups_of(values), band="simultaneous")
            table = means(values, draws).assign(low_all=both.low, high_all=both.high)
            found.append(table.assign(run=run, metric=metric))
    return pd.concat(found, ignore_index=True)


def by_quadrant(
    values: Any, run: PrefixResults
) -> tuple[dict[Hashable, Interval], Interval | None]:
    """Means over the items of each outcome, and G10 − G01 where both have some.

    Items are resampled within each quadrant, by group.
    """
    of_items = run["items"].set_index("item").quadrant
    strata = of_items.reindex(values.index.get_level_values("item")).tolist()
    return stratified_bootstrap(
        values.to_numpy(np.float64), strata, seed=run.config.seed,
        difference=("G10", "G01") if {"G10", "G01"} <= {*strata} else None,
        clusters=groups_of(values), n_resamples=run.config.n_resamples,
    )  # fmt: skip


def quadrant_table(run: PrefixResults) -> pd.DataFrame:
    """ΔNLL by quadrant and depth, and G10 − G01."""
    values = benefit(run)
    intervals, difference = by_quadrant(values, run)
    named = {**intervals, "G10 − G01": difference}
    parts = []
    for name in (*QUADRANTS, "G10 − G01"):
        if (ci := named.get(name)) is not None:
            ends = {"mean": ci.mean, "low": ci.low, "high": ci.high, "n": ci.n}
            parts.append(pd.DataFrame({"quadrant": name, "depth": values.columns, **ends}))
    return pd.concat(parts, ignore_index=True)


def mass_table(mass: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Attention by run, segment and layer; items that lack the segment are left out."""
    found = []
    for (run, segment), some in mass.groupby(["run", "segment"], sort=False):
        extra = some.groupby("layer")[["density", "without_sink"]].mean()
        table = means(wide(some, "layer", "mass"), draws).merge(extra, on="layer")
        found.append(table.assign(run=run, segment=segment))
    return pd.concat(found, ignore_index=True)


def coupling_table(coupling: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Mean correlation by layer, averaged as Fisher's z; items without one are left out."""
    found = []
    for kind in ("rho", "partial"):
        z = fisher(coupling, kind)
        found += [means(z[[layer]], draws).assign(kind=kind) for layer in z]
    table = pd.concat(found, ignore_index=True)
    ends = ["mean", "low", "high"]
    table[ends] = np.tanh(table[ends])
    return table[[*ends, "n", "n_groups", "n_undefined", "kind", "layer"]]


def run_table(runs: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Each prefix: attention to the segment, ΔNLL at the output, share right; and against a."""
    base = runs[runs.role == "a"].set_index("item")
    found = []
    for (role, run), some in runs.groupby(["role", "run"], sort=False):
        own, groups = some.set_index("item"), some.group.tolist()
        row = {"role": role, "run": run, "n": len(own)}
        for name in ("delta", "mass"):
            change = own[name] - base[name].reindex(own.index)
            row |= prefixed(name, draws.row(own[name], groups), main="")
            row |= prefixed(f"{name}_change", draws.row(change, groups), main="")
        row |= own[["right", "exact", "hit_share"]].mean().to_dict()
        found.append({**row, "n_segment": own.n_segment.max()})
    return pd.DataFrame(found)


def class_table(classes: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """ΔNLL at the output by token class, over the items that have tokens of it."""
    last = classes[classes.depth == classes.depth.max()]
    rows = []
    for name, own in last.groupby("class", sort=False):
        found = prefixed("delta", draws.row(own.delta, own.group.tolist()), main="")
        rows.append({"class": name, "n_items": len(own), "n_tokens": int(own.n.sum()), **found})
    return pd.DataFrame(rows)


def position_table(run: PrefixResults) -> pd.DataFrame:
    """Each way to match lengths: what it moved, and what is left of ΔNLL at the output.

    ``as_run`` gives the same items as they were.
    """
    as_run, matched = run["items"].set_index("item").delta, run["matched"]
    last = matched[matched.depth == matched.depth.max()]
    rows = []
    for mode, some in run["positions"].groupby("mode", sort=False):
        own = last[last["mode"] == mode]
        found = run.draws.row(own.delta, own.group.tolist())
        row = {
            "mode": mode,
            "n_groups": found["n_clusters"],
            "delta": found["mean"],
            "as_run": as_run.reindex(own.item).mean(),
            "all_matched": bool(some.is_matched.all()),
            "largest_nll_change": some.largest_nll_change.max(),
        }
        rows.append({**found, **row})
    columns = ["mode", "n", "n_groups", "delta", "low", "high", "as_run", "all_matched"]
    return pd.DataFrame(rows, columns=[*columns, "largest_nll_change"])
