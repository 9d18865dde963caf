"""What ``prefix_comparison`` says: findings in words, made from its tables (card M-002-15)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.bootstrap import stratified_bootstrap

from ..workbench.controls import FAIL
from ..workbench.experiment import Tables
from ..workbench.findings import MIN_ITEMS, Finding, judged, shown
from .measure import fisher_z
from .settings import PrefixComparisonConfig
from .tables import means, wide

NATS = "nats per token"


def findings(
    tables: Tables,
    summaries: Tables,
    compared: tuple[str, str, str],
    config: PrefixComparisonConfig,
) -> dict[str, Finding]:
    """Every claim of the report, by name."""
    a, b, segment = compared
    items = tables["items"]
    groups = dict(zip(items.item, items.group, strict=True))
    own = tables["curves"][tables["curves"].run == a]
    curve = wide(own, "depth", "delta")
    found = {
        "output": _output(curve, items, a, b, config),
        "window": _window(curve, summaries["curves"], a, b, groups, config),
        "quadrants": _quadrants(curve, items, a, b, config),
        "coupling": _coupling(tables["coupling"], segment, groups, config),
    }
    of_runs = summaries["runs"].set_index("run")
    neutral = f"neutral {segment}"
    if neutral in of_runs.index:
        found["content"] = _content(tables["runs"], a, neutral, segment, groups, config)
    for mode in ("gap", "filler"):
        rows = summaries["positions"]
        rows = rows[rows["mode"] == mode]
        if len(rows):
            found[f"position: {mode}"] = _position(rows.iloc[0].to_dict(), mode)
    failed = summaries["controls"]
    failed = failed[failed.verdict == FAIL].control
    # Rotary or not: a padding that acts is a fact about the model, no fault.
    failed = [one for one in failed if not one.startswith("left padding")]
    if failed:
        why = [f"the control '{name}' failed" for name in failed]
        found = {name: one.doubted(*why) for name, one in found.items()}
    return found


def _unsure(row: Mapping[str, Any]) -> dict[str, bool]:
    # Items of one group are one observation, however many they are.
    n, n_groups = int(row["n"]), int(row["n_groups"])
    what = "items" if n == n_groups else "groups of items"
    return {
        f"only {n_groups} {what}": n_groups < MIN_ITEMS,
        "the interval includes 0": not (row["low"] > 0 or row["high"] < 0),
    }


def _mean_row(
    values: pd.Series, groups: Mapping[str, str], config: PrefixComparisonConfig
) -> dict[str, Any]:
    return dict(means(values.to_frame("x"), groups, config).iloc[0])


def _output(
    curve: pd.DataFrame, items: pd.DataFrame, a: str, b: str, config: PrefixComparisonConfig
) -> Finding:
    groups = dict(zip(items.item, items.group, strict=True))
    row = _mean_row(curve[curve.columns[-1]], groups, config)
    claim = f"With {a} the continuation is {'likelier' if row['mean'] < 0 else 'less likely'}"
    facts = (
        f"ΔNLL ({a} − {b}) at the output {shown(row)} {NATS}, JS {items.js.mean():.3f} of at most "
        f"0.693, {int(row['n'])} items"
    )
    return judged(f"{claim} than with {b}", facts, _unsure(row), numbers=row, unit=NATS)


def _window(
    curve: pd.DataFrame,
    summary: pd.DataFrame,
    a: str,
    b: str,
    groups: Mapping[str, str],
    config: PrefixComparisonConfig,
) -> Finding:
    """The longest run of depths that differ from 0 under the band for all depths at once."""
    own = summary[(summary.run == a) & (summary.metric == "delta")]
    differs = ((own.low_all > 0) | (own.high_all < 0)).to_numpy()
    signs = np.where(differs, np.sign(own["mean"].to_numpy()), 0)
    first, last = _longest(signs)
    if first is None or last is None:
        claim = f"{a} and {b} differ from some depth on"
        why = {"no depth differs from 0 under the simultaneous band": True}
        return judged(claim, f"{len(curve)} items", why, numbers={"n": len(curve)}, unit=NATS)
    depths = own.depth.to_numpy()
    row = _mean_row(curve[depths[first : last + 1]].mean(axis=1), groups, config)
    claim = f"{a} and {b} differ at depths {depths[first]}–{depths[last]} of {depths[-1]}"
    facts = f"Mean ΔNLL over these depths {shown(row)} {NATS}, {int(row['n'])} items"
    return judged(claim, facts, _unsure(row), numbers=row, unit=NATS)


def _longest(signs: np.ndarray) -> tuple[int | None, int | None]:
    """Ends of the longest stretch of one sign; the deeper one of two as long."""
    best: tuple[int | None, int | None] = (None, None)
    length, start = 0, 0
    for i, sign in enumerate(signs):
        if i == 0 or sign != signs[i - 1]:
            start = i
        if sign and i - start + 1 >= length:
            best, length = (start, i), i - start + 1
    return best


def _quadrants(
    curve: pd.DataFrame, items: pd.DataFrame, a: str, b: str, config: PrefixComparisonConfig
) -> Finding:
    of_items = items.set_index("item").reindex(curve.index)
    strata = of_items.quadrant
    counts = {name: int((strata == name).sum()) for name in ("G11", "G10", "G01", "G00")}
    n_groups = items.groupby("quadrant").group.nunique()
    sizes = ", ".join(f"{name} {n}" for name, n in counts.items())
    claim = f"The benefit of {a} is larger where only {a} succeeds than where only {b} does"
    if not counts["G10"] or not counts["G01"]:
        why = {"G10 or G01 has no item": True}
        return judged(
            claim, f"Items by outcome: {sizes}", why, numbers={"n": len(strata)}, unit=NATS
        )
    values = curve[curve.columns[-1]].to_numpy(np.float64)
    _, ci = stratified_bootstrap(
        values, strata.tolist(), seed=config.seed, difference=("G10", "G01"),
        clusters=of_items.group.tolist(), n_resamples=config.n_resamples,
    )  # fmt: skip
    assert ci is not None
    row = {"mean": float(ci.mean), "low": float(ci.low), "high": float(ci.high), "n": ci.n}
    sizes_of = [int(n_groups[name]) for name in ("G10", "G01")]
    why = {
        f"only {sizes_of[0]} and {sizes_of[1]} items or groups of them": min(sizes_of) < MIN_ITEMS,
        "the interval of G10 − G01 is not below 0": not row["high"] < 0,
    }
    facts = (
        f"ΔNLL at the output, G10 − G01 {shown(row)} {NATS}; items: {sizes}. A description: the "
        "outcome comes of the same probabilities"
    )
    return judged(claim, facts, why, numbers=row, unit=NATS)


def _coupling(
    coupling: pd.DataFrame,
    segment: str,
    groups: Mapping[str, str],
    config: PrefixComparisonConfig,
) -> Finding:
    """Mean over layers, so that no layer is picked for its result."""
    by_item = wide(coupling, "layer", "partial")
    z = pd.DataFrame(fisher_z(by_item.to_numpy(np.float64)), by_item.index, by_item.columns)
    defined = z.notna().any(axis=1)
    claim = f"Tokens whose prediction attends to {segment} more benefit more"
    if not defined.any():
        why = {"no item has tokens enough for a correlation": True}
        return judged(claim, f"{len(z)} items", why, numbers={}, unit="correlation")
    row = _mean_row(z[defined].mean(axis=1), groups, config)
    row |= {name: np.tanh(row[name]) for name in ("mean", "low", "high")}
    why = {**_unsure(row), "the correlation is not below 0": not row["high"] < 0}
    facts = (
        f"Rank correlation of attention and ΔNLL given position and class, mean over layers "
        f"{shown(row)}, {int(row['n'])} of {len(z)} items"
    )
    return judged(claim, facts, why, numbers=row, unit="correlation")


def _content(
    runs: pd.DataFrame,
    a: str,
    neutral: str,
    segment: str,
    groups: Mapping[str, str],
    config: PrefixComparisonConfig,
) -> Finding:
    before, after = (runs[runs.run == name].set_index("item").delta for name in (a, neutral))
    row = _mean_row((after - before.reindex(after.index)).dropna(), groups, config)
    claim = f"The content of {segment} makes the continuation likelier"
    facts = (
        f"Neutral content of the same length raises the loss by {shown(row)} {NATS}, "
        f"{int(row['n'])} items"
    )
    why = {**_unsure(row), "it does not rise": not row["low"] > 0}
    return judged(claim, facts, why, numbers=row, unit=NATS)


def _position(row: Mapping[str, Any], mode: str) -> Finding:
    numbers = {"mean": row["delta"], **{key: row[key] for key in ("low", "high", "n", "n_groups")}}
    why = {
        **_unsure(numbers),
        "its sign is another than as run": np.sign(row["delta"]) != np.sign(row["as_run"]),
    }
    claim = f"The difference stays when lengths are matched by {mode}"
    facts = f"ΔNLL at the output {shown(numbers)} {NATS}, as run {row['as_run']:.2f}"
    return judged(claim, facts, why, numbers=numbers, unit=NATS)
