"""Intervals of what is fitted anew without each part of the items, where no mean is taken."""

import math

import numpy as np
from jaxtyping import Float
from scipy import stats

from .bootstrap import MIN_UNITS, Interval


def delete_a_group(
    without: Float[np.ndarray, " group"], whole: float, *, confidence: float = 0.95
) -> Interval:
    """The estimate with the interval of the delete-a-group jackknife.

    ``whole ± t sqrt((g - 1) / g Σ (θ_i - θ̄)²)``, t of g − 1 degrees of freedom: of the mean of
    groups of one size it is the t interval of the groups' means.

    Args:
        without: the estimate from all items but those of each group; a group without one, NaN,
            leaves the interval unknown.
        whole: the estimate from all.
        confidence: of the interval.

    Returns:
        Ends that are NaN below `MIN_UNITS` groups.

    Source: Kott 2001 (Journal of Official Statistics 17, 521); S-14.
    """
    g, reach = len(without), math.nan
    if g >= MIN_UNITS:
        spread = float(((without - without.mean()) ** 2).sum())
        reach = float(stats.t.isf((1 - confidence) / 2, g - 1)) * math.sqrt((g - 1) / g * spread)
    low, high = (np.asarray(whole + sign * reach) for sign in (-1, 1))
    return Interval(
        mean=np.asarray(whole), low=low, high=high, n=g, confidence=confidence, method="jackknife"
    )
