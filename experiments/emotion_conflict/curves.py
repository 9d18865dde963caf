"""Means over clips along depths and blocks with their intervals, and where they turn.

An *item* is a clip with a target label T; intervals resample clips, because a clip's items share
everything but a word.

Source: seed 000; M-000-6, M-000-7, M-000-11, S-7 and S-11.
"""

from functools import partial
from typing import get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.critical_layer import CriticalMethod, critical_layers

from ..materials.item_curves import curves, mean_curve
from ..workbench.intervals import Draws, prefixed, rate
from ..workbench.results import Results
from .settings import EmotionConflictConfig

STRATA = ("language", "voice", "intensity")
MEAN_CURVE = "(mean curve)"
"""Stands for the file in ``critical_layers`` where a row is about the mean over clips."""


def delta_curves(items: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Mean Δlogit by condition and depth with its pointwise band, over all clips and by stratum."""
    rows = []
    for condition, part in items.groupby("condition", sort=False):
        strata = {"all": part}
        for column in STRATA:
            for value, some in part[part[column] != ""].groupby(column, sort=False):
                strata[f"{column}={value}"] = some
        for stratum, some in strata.items():
            names = {"condition": condition, "stratum": stratum}
            rows += [names | row for row in mean_curve(some, "depth", "delta", draws)]
    table = pd.DataFrame(rows).drop(columns=["measure", "n_undefined"])
    return table.rename(columns={"n_clusters": "n_clips"})


def critical_layer_table(items: pd.DataFrame, run: Results[EmotionConflictConfig]) -> pd.DataFrame:
    """ℓ* by all five definitions: of every clip's curve, and of every condition's mean curve."""
    config = run.config
    # Without the final norm the output is on another scale than the depths before it.
    exclude_last = config.lens_norm == "none" and config.lens_depths == "all"
    methods = sorted(get_args(CriticalMethod), key=lambda one: one != config.critical_method)
    parts = []
    for condition, part in items.groupby("condition", sort=False):
        what, values, _ = curves(part, "depth", "delta")
        for method in methods:
            names = {"condition": condition, "method": method}
            find = partial(critical_layers, method=method, exclude_last=exclude_last)
            is_rise = method == "half_rise"
            turned = _rising(values, values.mean(axis=0)[None]) if is_rise else values
            whole = run.draws.where(turned, what["clip"].tolist(), find)
            found = {"depth": whole.at, "low": whole.low, "high": whole.high, "n": len(values)}
            mean = {"file": MEAN_CURVE} | names | found | {"undefined": whole.undefined}
            depths = find(_rising(values, values) if is_rise else values)
            each = {"file": what["clip"], **names, "depth": depths, "n": 1}
            each["target"] = what["target"]
            parts += [pd.DataFrame([mean]), pd.DataFrame(each)]
    table = pd.concat(parts, ignore_index=True)
    table.insert(4, "relative_depth", table.depth / run.n_blocks)
    return table


def _rising(
    values: Float[np.ndarray, "item depth"], judged_by: Float[np.ndarray, "judge depth"]
) -> Float[np.ndarray, "item depth"]:
    """The curves for ``half_rise``, which looks for a rise: turned over where the voice won.

    Each is judged by a curve of its own, or all by one.
    """
    return np.where(judged_by[:, -1:] < 0, -values, values)


def patching_summary(patching: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Flip rate, logit shift and recovery by donor, span and block (M-000-11).

    A recovery is undefined where donor and base hardly differ; such items are counted.
    """
    rows = []
    measures = ["flip", "shift", "recovery"]
    patching = patching[["clip", "target", "donor", "span", "block", *measures]]
    for (donor, span), part in patching.groupby(["donor", "span"], sort=False):
        flips = part.groupby("block").flip.agg(lambda cells: [rate(cells > 0)])
        shifts, recoveries = (
            mean_curve(part, "block", measure, draws) for measure in ("shift", "recovery")
        )
        for (block, [flip]), shift, recovery in zip(flips.items(), shifts, recoveries, strict=True):
            rows.append(
                {
                    **{"donor": donor, "block": block, "span": span, "n": flip["n"]},
                    **prefixed("flip", {**flip, "mean": flip["rate"]}, "rate"),
                    **prefixed("shift", shift),
                    **prefixed("recovery", recovery),
                    "n_undefined": recovery["n_undefined"],
                }
            )
    ends = [f"{what}_{end}" for what in ("shift", "recovery") for end in ("mean", "low", "high")]
    columns = ["donor", "block", "span", "n", "flip_rate", "flip_low", "flip_high", *ends]
    return pd.DataFrame(rows, columns=[*columns, "n_undefined"])
