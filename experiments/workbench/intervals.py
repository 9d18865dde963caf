"""Means and turning points with their 95 % intervals, as rows of summary tables.

Where fewer than ``MIN_UNITS`` samples or clusters are resampled, both ends are NaN.

Undefined samples (NaN) are left out whole, and counted.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.bootstrap import (
    COVERAGE,
    MIN_UNITS,
    Band,
    Interval,
    Located,
    bootstrap_mean,
    located,
    wilson,
)

Clusters = Sequence[Hashable] | None
"""For each sample what it is drawn together with; None draws samples one by one."""

_HELD = ", ".join(
    f"{100 * mean:.0f} % ({100 * curve:.0f} %) with {n}" for n, (mean, curve) in COVERAGE.items()
)
HOW_MADE = (
    "95 % intervals of means, and of places on mean curves, are expanded percentile bootstrap "
    "intervals; those of shares are Wilson's where it says so (S-7). In simulations with normal "
    "data the former held the mean, and simultaneous bands (in brackets) the whole curve, in "
    f"{_HELD} units, which are what is resampled; with skewed data, and rates near 0 or 1, less "
    f"often. Fewer than {MIN_UNITS} units have no interval."
)
"""What a report says of every interval."""
NOT_DRAWN = (
    f"Where no interval is drawn, there are fewer than {MIN_UNITS} units to resample, or no value."
)
"""What it says beside a figure that lacks one."""


class BestPoint(NamedTuple):
    """The point with the largest mean, and how far it is ahead of the others."""

    at: int
    next: int | None
    """The point that is nearest to it; None where there is no other."""
    lead: float
    """Over that one; NaN where there is no other."""
    lead_low: float
    """Least end of a band that holds for its leads on all others at once."""


@dataclass(frozen=True)
class Draws:
    """Seed and number of the draws behind a run's intervals."""

    seed: int
    n: int

    def mean(
        self,
        values: Float[np.ndarray, " sample *point"],
        clusters: Clusters = None,
        band: Band = "pointwise",
    ) -> Interval:
        """Mean over the samples without a NaN; NaN if none is left."""
        if np.isnan(values.reshape(len(values), -1)).any(axis=1).all():
            nan = np.full(values.shape[1:], np.nan)
            n_omitted = len(values)
            return Interval(mean=nan, low=nan, high=nan, n=0, n_omitted=n_omitted, method="none")
        return bootstrap_mean(
            values, seed=self.seed, n_resamples=self.n, clusters=clusters, band=band,
            nan_policy="omit",
        )  # fmt: skip

    def points(
        self, values: Float[np.ndarray, "sample point"], clusters: Sequence[Hashable]
    ) -> list[dict[str, Any]]:
        """A row per point: mean, low, high, and how many samples and clusters are behind it."""
        found = self.mean(values, clusters)
        defined = ~np.isnan(values).any(axis=1)
        n_clusters = len({label for label, kept in zip(clusters, defined, strict=True) if kept})
        sizes = {"n": found.n, "n_undefined": found.n_omitted, "n_clusters": n_clusters}
        return [numbers(found, i) | sizes for i in range(values.shape[1])]

    def columns(
        self,
        wide: pd.DataFrame,
        level: str = "clip",
        about: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """What each column of a table is, and its row of `points`.

        Args:
            wide: a row per sample, a column per point, such as `DataFrame.pivot` makes.
            level: of its index: what samples are drawn together with.
            about: further columns: a value for all, or one for each.
        """
        found = self.points(wide.to_numpy(np.float64), wide.index.get_level_values(level).tolist())
        columns = wide.columns.to_frame(index=False).assign(**(about or {}))
        return pd.concat([columns, pd.DataFrame(found)], axis=1)

    def row(self, values: Any, clusters: Sequence[Hashable]) -> dict[str, Any]:
        """The row of a single point: see `points`."""
        return self.points(np.asarray(values, np.float64)[:, None], clusters)[0]

    def best(
        self, values: Float[np.ndarray, "sample point"], clusters: Sequence[Hashable]
    ) -> BestPoint:
        """The point with the largest mean, of samples without a NaN, and its lead."""
        best = int(values.mean(axis=0).argmax())
        others = np.delete(np.arange(values.shape[1]), best)
        if not len(others):
            return BestPoint(best, None, np.nan, np.nan)
        leads = self.mean(values[:, [best]] - values[:, others], clusters, "simultaneous")
        nearest = int(leads.mean.argmin())
        lead, low = float(leads.mean[nearest]), float(leads.low.min())
        return BestPoint(best, int(others[nearest]), lead, low)

    def where(
        self,
        values: Float[np.ndarray, "sample point"],
        clusters: Clusters,
        find: Callable[[np.ndarray], np.ndarray],
    ) -> Located:
        """Where the mean curve has an event; see ``statistics.bootstrap.located``."""
        return located(values, find, seed=self.seed, n_resamples=self.n, clusters=clusters)


def numbers(interval: Interval, at: Any = ()) -> dict[str, Any]:
    """``mean``, ``low``, ``high`` and ``n`` of an interval, or of one point of its curve."""
    ends = {name: float(getattr(interval, name)[at]) for name in ("mean", "low", "high")}
    return {**ends, "n": interval.n}


def prefixed(prefix: str, row: dict[str, Any], main: str = "mean") -> dict[str, Any]:
    """The mean and ends of a row under other names: ``{prefix}_{main}``, ``{prefix}_low``, ...

    With an empty ``main`` the mean is called by the prefix alone.
    """
    own = f"{prefix}_{main}" if main else prefix
    return {own: row["mean"], f"{prefix}_low": row["low"], f"{prefix}_high": row["high"]}


def unprefixed(
    prefix: str, row: "Mapping[Any, Any] | pd.Series", main: str = "mean"
) -> dict[str, Any]:
    """``mean``, ``low`` and ``high`` of a row that `prefixed` made part of."""
    names = prefixed(prefix, dict.fromkeys(("mean", "low", "high")), main)
    return dict(zip(("mean", "low", "high"), (row[name] for name in names), strict=True))


def rate(hits: "pd.Series[bool]") -> dict[str, Any]:
    """``k``, ``n``, ``rate`` and its Wilson interval ``low``, ``high``."""
    k, n = int(hits.sum()), len(hits)
    found = numbers(wilson(k, n))
    return {"k": k, "n": n, "rate": found["mean"], "low": found["low"], "high": found["high"]}
