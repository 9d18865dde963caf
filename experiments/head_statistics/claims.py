"""What a ``head_statistics`` run says: findings in words, and the controls that can undo them."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

from hooked_alm.methods.statistics.bootstrap import bootstrap_mean
from hooked_alm.methods.statistics.moments import Moments

from ..workbench.controls import FAIL, PASS
from ..workbench.findings import MIN_ITEMS, Finding, judged, shown
from .measure import CONTRIBUTION, OUTPUT
from .settings import HeadStatisticsConfig

ALIKE = 0.9
"""Rank correlation from which on two orders of heads are called the same."""
MOST_ROUNDING = {"float32": 1e-4, "bfloat16": 0.01, "float16": 0.005}
"""Relative: what an identity may be off by. The model rounds the attention's output to its dtype,
half a unit of which is 4e-3 in bf16 (measured there: 8e-4)."""


def findings(
    whole: Mapping[str, Moments],
    halves: Mapping[str, tuple[Moments, ...]],
    n_items: int,
    checks: pd.DataFrame,
    config: HeadStatisticsConfig,
) -> dict[str, Finding]:
    """Every claim of the report, by name."""
    failed = checks[checks.verdict == FAIL].control.tolist()
    few = {f"only {n_items} items": n_items < 2 * MIN_ITEMS}
    few |= {f"the control '{name}' failed": True for name in failed}
    first, second = halves[CONTRIBUTION]
    stable = (
        rank_correlations(first.mean, second.mean)
        if first.n and second.n
        else np.full(len(whole[OUTPUT].mean), np.nan)
    )
    stands_in = rank_correlations(whole[OUTPUT].mean, whole[CONTRIBUTION].mean)
    return {
        "stable": _alike(
            "What heads write ranks them alike on either half of the questions", stable, few, config
        ),
        "stands in": _alike(
            "The norm of a head's output ranks heads as what they write does",
            stands_in, few, config,
        ),
    }  # fmt: skip


def rank_correlations(
    one: Float[np.ndarray, "layer head"], other: Float[np.ndarray, "layer head"]
) -> Float[np.ndarray, " layer"]:
    """Spearman's ρ over the heads of each layer; NaN where a layer's heads are all alike."""
    ranks = [rankdata(values, axis=1) for values in (one, other)]
    a, b = (values - values.mean(axis=1, keepdims=True) for values in ranks)
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(len(size), np.nan), where=size > 0)


def controls(units: pd.DataFrame, config: HeadStatisticsConfig) -> pd.DataFrame:
    """What has to come out if the norms are what they claim to be."""
    allowed = MOST_ROUNDING[config.dtype]
    off = {
        "the heads' contributions, along their sum, add up to its norm": units.identity_error.max(),
        "no sum is longer than its parts together": max(units.most_kept.max() - 1, 0.0),
    }
    return pd.DataFrame(
        [
            {
                "control": name,
                "largest": float(value),
                "allowed": allowed,
                "verdict": PASS if value <= allowed else FAIL,
            }
            for name, value in off.items()
        ]
    )


def _alike(
    claim: str,
    by_layer: Float[np.ndarray, " layer"],
    why_not: Mapping[str, bool],
    config: HeadStatisticsConfig,
) -> Finding:
    usable = by_layer[np.isfinite(by_layer)]
    if len(usable):
        ci = bootstrap_mean(usable, seed=config.seed, n_resamples=2000)
        mean, low, high = float(ci.mean), float(ci.low), float(ci.high)
    else:
        mean = low = high = np.nan
    why_not = {**why_not, f"the interval is not above {ALIKE}": not low > ALIKE}
    numbers = {"mean": mean, "low": low, "high": high, "n": len(usable)}
    facts = (
        f"Spearman's ρ over the heads of a layer, mean of {len(usable)} layers: {shown(numbers, 3)}"
    )
    return judged(claim, facts, why_not, numbers=numbers, unit="rank correlation")
