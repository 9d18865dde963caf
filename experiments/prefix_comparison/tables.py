"""Tables and shards of a ``prefix_comparison`` run -> summaries with intervals over items.

Source: cards M-002-8 to M-002-14; blocks S-7 and S-8.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.bootstrap import Band, bootstrap_mean, stratified_bootstrap

from ..workbench.controls import FAIL, PASS, SKIPPED
from ..workbench.experiment import Tables
from .measure import LATEST, fisher_z
from .settings import PrefixComparisonConfig

QUADRANTS = ("G11", "G10", "G01", "G00")
ROUNDING = 1e-4
"""Of sums that must be 1, in fp32 over thousands of keys."""
VACUOUS = 1e-3
"""Nats that left padding may move a loss by; more, and it is no rotary model (M-002-14)."""


# --- Means over items, with intervals


def wide(table: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """A row per item, a column per depth or layer, in the order of the table."""
    return table.pivot(index="item", columns=column, values=value).reindex(
        dict.fromkeys(table.item)
    )


def means(
    values: pd.DataFrame,
    groups: Mapping[str, str],
    config: PrefixComparisonConfig,
    *,
    band: Band = "pointwise",
) -> pd.DataFrame:
    """Mean over items of each column, its interval, and how many items and groups it is from.

    Items are resampled by group. One with a NaN is left out whole, and counted.
    """
    columns = list(values.columns)
    kept = values.dropna()
    if kept.empty:
        numbers = dict.fromkeys(("mean", "low", "high"), np.full(len(columns), np.nan))
        sizes = {"n": 0, "n_groups": 0, "n_undefined": len(values)}
        return pd.DataFrame({"x": columns, **numbers, **sizes})
    clusters = [groups[item] for item in kept.index]
    ci = bootstrap_mean(
        kept.to_numpy(np.float64),
        seed=config.seed,
        n_resamples=config.n_resamples,
        clusters=clusters,
        band=band,
    )
    return pd.DataFrame(
        {
            "x": columns,
            "mean": ci.mean,
            "low": ci.low,
            "high": ci.high,
            "n": len(kept),
            "n_groups": len({*clusters}),
            "n_undefined": len(values) - len(kept),
        }
    )


def curve_summary(
    curves: pd.DataFrame, groups: Mapping[str, str], config: PrefixComparisonConfig
) -> pd.DataFrame:
    """Every run against b, by depth; with the band that holds for all depths at once."""
    found = []
    for run, some in curves.groupby("run", sort=False):
        for metric in ("delta", "js", "kl", "kl_back"):
            values = wide(some, "depth", metric)
            table = means(values, groups, config).rename(columns={"x": "depth"})
            both = means(values, groups, config, band="simultaneous")
            table = table.assign(low_all=both.low, high_all=both.high)
            found.append(table.assign(run=run, metric=metric))
    return pd.concat(found, ignore_index=True)


def quadrant_summary(
    curves: pd.DataFrame, items: pd.DataFrame, a: str, config: PrefixComparisonConfig
) -> pd.DataFrame:
    """ΔNLL by quadrant and depth, and G10 − G01, resampled within each quadrant."""
    values = wide(curves[curves.run == a], "depth", "delta")
    of_items = items.set_index("item").reindex(values.index)
    strata = of_items.quadrant.tolist()
    both = {"G10", "G01"} <= {*strata}
    intervals, difference = stratified_bootstrap(
        values.to_numpy(np.float64),
        strata,
        seed=config.seed,
        difference=("G10", "G01") if both else None,
        clusters=of_items.group.tolist(),
        n_resamples=config.n_resamples,
    )
    named = {str(name): intervals[name] for name in QUADRANTS if name in intervals}
    if difference is not None:
        named["G10 − G01"] = difference
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "quadrant": name,
                    "depth": values.columns,
                    "mean": ci.mean,
                    "low": ci.low,
                    "high": ci.high,
                    "n": ci.n,
                }
            )
            for name, ci in named.items()
        ],
        ignore_index=True,
    )


def mass_summary(
    mass: pd.DataFrame, groups: Mapping[str, str], config: PrefixComparisonConfig
) -> pd.DataFrame:
    """Attention by run, segment and layer; items that lack the segment are left out."""
    found = []
    for (run, segment), some in mass.groupby(["run", "segment"], sort=False):
        table = means(wide(some, "layer", "mass"), groups, config).rename(columns={"x": "layer"})
        extra = some.groupby("layer", sort=True)[["density", "without_sink"]].mean()
        table = table.merge(extra.reset_index(), on="layer")
        found.append(table.assign(run=run, segment=segment))
    return pd.concat(found, ignore_index=True)


def coupling_summary(
    coupling: pd.DataFrame, groups: Mapping[str, str], config: PrefixComparisonConfig
) -> pd.DataFrame:
    """Mean correlation by layer, averaged as Fisher's z; items without one are left out."""
    found = []
    for kind in ("rho", "partial"):
        for layer, some in coupling.groupby("layer", sort=True):
            z = some.set_index("item")[[kind]].apply(lambda column: fisher_z(column.to_numpy()))
            row = means(z, groups, config)
            row[["mean", "low", "high"]] = np.tanh(row[["mean", "low", "high"]])
            found.append(row.assign(kind=kind, layer=layer).drop(columns="x"))
    return pd.concat(found, ignore_index=True)


def run_summary(
    runs: pd.DataFrame, groups: Mapping[str, str], config: PrefixComparisonConfig
) -> pd.DataFrame:
    """Each prefix: attention to the segment, ΔNLL at the output, share right; and against a."""
    base = runs[runs.role == "a"].set_index("item")
    found = []
    for (role, run), some in runs.groupby(["role", "run"], sort=False):
        own = some.set_index("item")
        row: dict[str, Any] = {"role": role, "run": run, "n": len(own)}
        for name in ("delta", "mass"):
            row |= _interval(name, own[name], groups, config)
            change = own[name] - base[name].reindex(own.index)
            row |= _interval(f"{name}_change", change, groups, config)
        row["right"] = own.right.mean() if own.right.notna().any() else np.nan
        row["exact"] = own.exact.mean()
        row["hit_share"] = own.hit_share.mean()
        found.append(row)
    return pd.DataFrame(found)


def _interval(
    name: str, values: pd.Series, groups: Mapping[str, str], config: PrefixComparisonConfig
) -> dict[str, float]:
    one = means(values.to_frame(name), groups, config).iloc[0]
    return {name: one["mean"], f"{name}_low": one["low"], f"{name}_high": one["high"]}


def position_summary(
    tables: Tables, groups: Mapping[str, str], config: PrefixComparisonConfig
) -> pd.DataFrame:
    """Each way to match lengths: what it moved, and what is left of ΔNLL at the output.

    ``as_run`` gives the same items as they were.
    """
    columns = [
        "mode",
        "n",
        "n_groups",
        "delta",
        "low",
        "high",
        "as_run",
        "all_matched",
        "largest_nll_change",
    ]
    if "positions" not in tables:
        return pd.DataFrame(columns=columns)
    items = tables["items"].set_index("item")
    found = []
    for mode, some in tables["positions"].groupby("mode", sort=False):
        curve = tables["matched"]
        last = curve[(curve["mode"] == mode) & (curve.depth == curve.depth.max())]
        values = last.set_index("item").delta
        numbers = _interval("delta", values, groups, config)
        found.append(
            {
                "mode": mode,
                "n": len(values),
                "n_groups": len({groups[item] for item in values.index}),
                "delta": numbers["delta"],
                "low": numbers["delta_low"],
                "high": numbers["delta_high"],
                "as_run": items.delta.reindex(values.index).mean(),
                "all_matched": bool(some.is_matched.all()),
                "largest_nll_change": some.largest_nll_change.max(),
            }
        )
    return pd.DataFrame(found, columns=columns)


def class_summary(
    classes: pd.DataFrame, groups: Mapping[str, str], config: PrefixComparisonConfig
) -> pd.DataFrame:
    """ΔNLL at the output by token class, over the items that have tokens of it."""
    last = classes[classes.depth == classes.depth.max()]
    rows = []
    for name, some in last.groupby("class", sort=False):
        own = some.set_index("item")
        numbers = _interval("delta", own.delta, groups, config)
        rows.append({"class": name, "n_items": len(own), "n_tokens": int(own.n.sum()), **numbers})
    return pd.DataFrame(rows)


# --- Controls


def controls(tables: Tables, a: str, b: str, positions: pd.DataFrame) -> pd.DataFrame:
    """What has to come out if the numbers are what they claim to be."""
    mass, runs, curves = tables["mass"], tables["runs"], tables["curves"]
    whole = mass[mass.run.isin([a, b]) & (mass.segment != LATEST)]
    sums = whole.groupby(["item", "run", "layer"])["mass"].sum()
    original = runs[runs.run.str.startswith("original ")].set_index("item")
    base = runs[runs.role == "a"].set_index("item").reindex(original.index)
    same = (original[["nll", "delta", "mass"]] - base[["nll", "delta", "mass"]]).abs()
    out_of_range = np.maximum(curves.js - math.log(2), -curves.js)
    left = positions[positions["mode"] == "left_pad"].largest_nll_change
    checks: list[tuple[str, pd.Series, float]] = [
        ("attention to all segments sums to 1", (sums - 1).abs(), ROUNDING),
        ("the original content put in again changes nothing", same.stack(), 0.0),
        ("JS lies between 0 and ln 2", out_of_range.clip(lower=0), 1e-6),
        ("matched runs predict the first token at one position id",
         (~positions.all_matched.astype(bool)).astype(float), 0.0),
        ("left padding changes nothing, as rotary embeddings imply (so it controls nothing)",
         left.astype(float), VACUOUS),
    ]  # fmt: skip
    rows = []
    for control, off, allowed in checks:
        largest = float(off.max()) if len(off) else np.nan
        verdict = SKIPPED if not len(off) else PASS if largest <= allowed else FAIL
        rows.append(
            {"control": control, "largest": largest, "allowed": allowed, "verdict": verdict}
        )
    return pd.DataFrame(rows)
