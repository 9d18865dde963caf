"""How codes carry known factors: how well, each factor in how few codes, each code for how few.

Disentanglement, completeness and informativeness (DCI) of Eastwood and Williams 2018, with a Lasso
of each factor, as in Mariotte et al. 2025 for dictionaries of sound.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ...errors import InputError
from ..statistics.probing import standardised

NEEDED = "pip install 'hooked_alm[probes]'"
ALPHA = 0.1
"""Weight of the Lasso's penalty, on standardised codes and factors (M-SAE-6)."""
MOST_STEPS = 10_000
Importances = Float[np.ndarray, "code factor"]
"""How much of each factor is read off each code: none negative."""


def disentanglement(weights: Importances) -> Float[np.ndarray, " code"]:
    """1 − H / ln(number of factors) of each code's weights over the factors.

    1 is a code for one factor alone, 0 one for all alike; NaN of codes that nothing is read off,
    and where there is one factor.
    """
    return 1 - _entropy(weights.T)


def completeness(weights: Importances) -> Float[np.ndarray, " factor"]:
    """1 − H / ln(number of codes) of each factor's weights over the codes.

    1 is a factor that one code has alone; NaN of factors that are read off none, and where there is
    one code.
    """
    return 1 - _entropy(weights)


def code_shares(weights: Importances) -> Float[np.ndarray, " code"]:
    """Share of each code in all weights, by which codes count; NaN where there are none."""
    with np.errstate(invalid="ignore"):
        return np.asarray(weights.sum(axis=1) / weights.sum())


def mean_disentanglement(weights: Importances) -> float:
    """Disentanglement of all codes, each by its share: Σ ρ_i D_i, and no mean of it (C40)."""
    shares = code_shares(weights)
    is_used = shares > 0
    if not is_used.any():
        return math.nan
    return float((shares[is_used] * disentanglement(weights)[is_used]).sum())


def _entropy(weights: Float[np.ndarray, "n other"]) -> Float[np.ndarray, " other"]:
    """Entropy down each column, over its largest value; NaN of none, and of one row."""
    n = len(weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = weights / weights.sum(axis=0)
        terms = np.where(p > 0, p * np.log(p), np.where(np.isnan(p), np.nan, 0.0))
        return np.asarray(-terms.sum(axis=0) / (np.log(n) if n > 1 else np.nan))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FactorReading:
    """What Lassos read of factors off codes; factors are in units of their training spread."""

    weights: Importances
    """Absolute coefficients of Lassos of all items."""
    weights_without: Float[np.ndarray, "fold code factor"]
    """Those of Lassos of all items but a fold's."""
    errors: Float[np.ndarray, "item factor"]
    """Squared, of each item by the Lasso of the other folds; NaN where it lacks the factor."""
    null_errors: Float[np.ndarray, "item factor"]
    """Likewise, of the mean of the other folds."""
    r2_learnt: Float[np.ndarray, " factor"]
    """R² of Lassos of all items on these, which many codes make large of nothing (C44)."""
    unfinished: Int[np.ndarray, " factor"]
    """Lassos that did not come to their end."""

    @property
    def r2(self) -> Float[np.ndarray, " factor"]:
        """Held out: 1 − Σ error / Σ error of the training mean; negative if that tells more."""
        return np.asarray(1 - np.nansum(self.errors, axis=0) / np.nansum(self.null_errors, axis=0))


def read_factors(
    codes: Float[np.ndarray, "item code"],
    factors: Float[np.ndarray, "item factor"],
    folds: Int[np.ndarray, " item"],
    *,
    alpha: int | float = ALPHA,
) -> FactorReading:
    """Reads every factor off the codes by Lassos, of all items and of all folds but one each.

    Args:
        codes: of the items; standardised on the items that a Lasso learns from.
        factors: likewise; NaN where an item's is not known, which is then left out.
        folds: of the items, from 0; what belongs together is in one.
        alpha: weight of the penalty.

    Raises:
        InputError: one fold, or a factor that does not vary among the items that are learnt.
        ImportError: scikit-learn is not installed.

    Source: Eastwood and Williams 2018 (ICLR), section 3; M-SAE-6.
    """
    n_folds, (n, n_factors) = int(folds.max()) + 1, factors.shape
    if n_folds < 2:
        raise InputError("reading factors off codes: got one fold, expected two or more.")
    if still := np.flatnonzero(~varying(factors, folds)).tolist():
        raise InputError(
            f"reading factors off codes: factors {still} are the same in all items of some folds' "
            "training, expected them to vary. Leave them out, or give other items."
        )
    every = np.zeros((1 + n_folds, codes.shape[1], n_factors))
    errors, null_errors = np.full((n, n_factors), np.nan), np.full((n, n_factors), np.nan)
    r2, unfinished = np.zeros(n_factors), np.zeros(n_factors, np.int64)
    for j in range(n_factors):
        known = np.isfinite(factors[:, j])
        for fit, fold in enumerate([-1, *range(n_folds)]):
            learnt, asked = known & (folds != fold), known & (folds == fold)
            x, x_asked = standardised(codes[learnt], codes[asked])
            y, y_asked = standardised(factors[learnt, j : j + 1], factors[asked, j : j + 1])
            lasso, is_finished = _fitted(x, y[:, 0], alpha)
            every[fit, :, j] = np.abs(lasso.coef_)
            unfinished[j] += not is_finished
            if fold < 0:
                r2[j] = lasso.score(x, y[:, 0])
            elif asked.any():
                errors[asked, j] = (y_asked[:, 0] - lasso.predict(x_asked)) ** 2
                null_errors[asked, j] = y_asked[:, 0] ** 2
    return FactorReading(
        weights=every[0], weights_without=every[1:], errors=errors, null_errors=null_errors,
        r2_learnt=r2, unfinished=unfinished,
    )  # fmt: skip


def varying(
    factors: Float[np.ndarray, "item factor"], folds: Int[np.ndarray, " item"]
) -> Bool[np.ndarray, " factor"]:
    """Whether the items that have a factor differ in it, whichever fold is held out."""
    found = np.ones(factors.shape[1], bool)
    for fold in range(int(folds.max()) + 1):
        for j, values in enumerate(factors[folds != fold].T):
            found[j] &= len({*values[np.isfinite(values)].tolist()}) > 1
    return found


def _fitted(
    x: Float[np.ndarray, "item code"], y: Float[np.ndarray, " item"], alpha: int | float
) -> tuple[Any, bool]:
    """A Lasso, and whether it came to its end."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso  # takes as long to import as all the rest

    lasso = Lasso(alpha=alpha, max_iter=MOST_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        lasso.fit(x, y)
    return lasso, lasso.n_iter_ < MOST_STEPS
