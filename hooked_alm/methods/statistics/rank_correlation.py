"""Rank correlations, with or without what other variables explain (M-002-12)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

MOST_CORRELATED = 0.999
"""Where Fisher's z is cut off: a perfect rank correlation of few samples is infinite."""


def spearman(x: Float[np.ndarray, " token"], y: Float[np.ndarray, " token"]) -> float:
    """Rank correlation; NaN where one of the two is constant, or there are fewer than 3."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


def partial_spearman(
    x: Float[np.ndarray, " token"], y: Float[np.ndarray, " token"], classes: Sequence[str]
) -> float:
    """Rank correlation of what position in the continuation and token class do not explain.

    Ranks of both are regressed on the rank of the position and on indicators of the classes; NaN
    where these leave fewer than three degrees of freedom, or nothing of one of the two.
    """
    indicators = np.array([[one == name for name in sorted({*classes})[1:]] for one in classes])
    columns = [np.ones(len(x)), np.arange(len(x), dtype=np.float64), *indicators.T.astype(float)]
    design = np.stack(columns, axis=1)
    if len(x) - design.shape[1] < 3:
        return float("nan")
    ranks = [stats.rankdata(values) for values in (x, y)]
    left = [one - design @ np.linalg.lstsq(design, one, rcond=None)[0] for one in ranks]
    size = [float(np.linalg.norm(one)) for one in left]
    # What is left of a column that the design explains is rounding.
    if min(size) < 1e-9 * len(x):
        return float("nan")
    return float(left[0] @ left[1] / (size[0] * size[1]))


def fisher_z(rho: Float[np.ndarray, " *sample"]) -> Float[np.ndarray, " *sample"]:
    """``arctanh`` of correlations, cut off at ±0.999; NaN stays."""
    return np.arctanh(np.clip(rho, -MOST_CORRELATED, MOST_CORRELATED))
