"""Tests for few samples, where an interval alone says little."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from .bootstrap import usable_samples
from .draws import drawn_signs

Alternative = Literal["two-sided", "greater", "less"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Significance:
    """A p-value, its statistic, and the number of samples."""

    p: float
    statistic: float
    n: int
    """Samples that the test used."""
    method: str


def sign_test(
    values: Float[np.ndarray, " sample"], alternative: Alternative = "two-sided"
) -> Significance:
    """Exact sign test of a median of zero; zeros carry no sign and are left out of ``n``.

    The statistic is the number of positive values. Without a non-zero value, p is 1.
    """
    usable_samples(values, "raise")
    positive, n = int((values > 0).sum()), int((values != 0).sum())
    p = float(stats.binomtest(positive, n, alternative=alternative).pvalue) if n else 1.0
    method = f"exact sign test, {alternative}"
    return Significance(p=p, statistic=float(positive), n=n, method=method)


def sign_flip_test(
    values: Float[np.ndarray, " sample"],
    *,
    seed: int,
    n_resamples: int = 20_000,
    alternative: Alternative = "two-sided",
) -> Significance:
    """Permutation test of a zero mean: under it, each value's sign is a coin toss.

    Exact where 2^n ≤ ``n_resamples``, else by seeded draws (p is then at least 1/(draws + 1)).
    NaN for a single value.
    """
    usable_samples(values, "raise")
    kind = "exact" if 2 ** len(values) <= n_resamples else f"{n_resamples} draws"
    method = f"sign-flip test of the mean, {alternative}, {kind}"
    if len(values) < 2:
        return Significance(p=np.nan, statistic=float(values[0]), n=1, method=method)
    values = values.astype(np.float64)
    if kind != "exact":
        p = _p_of_tosses(values, seed, n_resamples, alternative)
        return Significance(p=p, statistic=float(values.mean()), n=len(values), method=method)
    result = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        alternative=alternative,
    )
    p, mean = float(result.pvalue), float(result.statistic)
    return Significance(p=p, statistic=mean, n=len(values), method=method)


def _p_of_tosses(
    values: Float[np.ndarray, " sample"], seed: int, n_resamples: int, alternative: Alternative
) -> float:
    """As ``scipy.stats.permutation_test`` finds it, which would hold all draws at once."""
    tossed = drawn_signs(seed, n_resamples, len(values))
    null = np.concatenate([np.einsum("rs,s->r", signs, values) for signs in tossed]) / len(values)
    mean = values.mean()
    # Sums of the same values in another order are the same mean.
    rounding = 100 * np.finfo(np.float64).eps * abs(mean)
    n_beyond = {
        "less": 1 + (null <= mean + rounding).sum(),
        "greater": 1 + (null >= mean - rounding).sum(),
    }
    n_beyond["two-sided"] = 2 * min(n_beyond.values())
    return min(1.0, float(n_beyond[alternative] / (n_resamples + 1)))
