"""Means, rates and recoveries with their intervals.

Axes: ``sample`` is the unit that is resampled (an utterance, a task; one speaker's clips only as a
``cluster``); ``*curve`` is whatever is measured per sample, a scalar or a curve over depths.

A NaN is never averaged away: it raises, or with ``nan_policy="omit"`` its whole sample is left out
and counted. A bootstrap interval from fewer units than `MIN_UNITS` is NaN, never zero-width.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from ...errors import InputError
from .draws import drawn_counts

NanPolicy = Literal["raise", "omit"]
Band = Literal["pointwise", "simultaneous"]
Samples = Float[np.ndarray, " sample *curve"]
Replicates = Float[np.ndarray, " resample *curve"]
Curve = Float[np.ndarray, " *curve"]

MIN_UNITS = 6
"""Fewer samples, or clusters where whole clusters are drawn, have no bootstrap interval."""
COVERAGE = {
    6: (0.93, 0.92),
    8: (0.94, 0.93),
    12: (0.95, 0.94),
    18: (0.95, 0.95),
    30: (0.95, 0.95),
}
"""Units -> measured coverage of 95 % intervals of normal data: of a mean, and of a whole curve by
its simultaneous band. ``scripts/coverage.py`` measures it, and other data with it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Interval:
    """A mean or a rate with its confidence interval; 0-d arrays for a scalar."""

    mean: Curve
    low: Curve
    high: Curve
    n: int
    """Samples behind the estimate."""
    n_omitted: int = 0
    """Samples left out because they hold a NaN."""
    confidence: float = 0.95
    method: str


def bootstrap_mean(
    samples: Samples,
    *,
    seed: int,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
    band: Band = "pointwise",
    nan_policy: NanPolicy = "raise",
) -> Interval:
    """Mean over samples with its expanded percentile bootstrap interval.

    Samples are drawn whole, so that a curve keeps its shape. With ``clusters``, whole clusters are
    drawn with all their samples, and the mean stays the mean over samples.

    Args:
        samples: one scalar or curve per sample.
        clusters: for each sample, what it shares with others (speaker, sentence).
        band: ``pointwise``: each point of the curve has the stated coverage, the whole curve less.
            ``simultaneous``: mean ± c·se covers the whole curve, c the quantile of the replicates'
            largest deviation in units of the bootstrap standard error (max-t).
        nan_policy: ``omit`` leaves out, whole, a sample that holds a NaN.

    Returns:
        The mean, and for either band the ends that `widened` gives; NaN below `MIN_UNITS`. They
        cover as `COVERAGE` says; skewed data, and rates near 0 or 1, less (docs/methods.md, S-7).

    Raises:
        InputError: no samples, infinite or (under ``raise``) NaN values, or a bad option.

    Source: Hesterberg 2015 (The American Statistician 69); docs/methods.md, S-7.
    """
    options = _Options(n_resamples, confidence, band, nan_policy)
    return _bootstrap(samples, clusters, seed, options)[0]


def widened(z: float, n_units: int) -> float:
    """How many bootstrap standard errors stand for z standard errors of a spread that is known.

    The spread of a few units is an estimate, hence the t quantile of the tail that z leaves of a
    normal distribution; and the replicates spread by a factor of √((n − 1)/n) too little. A plain
    percentile interval or max-t band makes neither correction.
    """
    t = stats.t.isf(stats.norm.sf(z), n_units - 1)
    return float(t * math.sqrt(n_units / (n_units - 1)))


class Resampled(NamedTuple):
    """Bootstrap replicates of a mean."""

    means: Replicates
    n_units: int
    """Samples or clusters that were drawn from."""


def resampled_means(
    samples: Samples,
    *,
    seed: int | np.random.Generator,
    n_resamples: int,
    clusters: Sequence[Hashable] | None = None,
) -> Resampled:
    """The bootstrap replicates of the mean; NaN throughout where there are fewer than two units.

    Without clusters these are the replicates of ``scipy.stats.bootstrap`` with the same seed.
    Memory for the draws is bounded by `draws.MOST_BYTES`, whatever the number of samples.

    Args:
        samples: finite; see ``bootstrap_mean`` for what raises.
        seed: seed of the draws, or a generator that has been used before.
        clusters: as for ``bootstrap_mean``.

    Raises:
        InputError: fewer than 1000 resamples, or clusters that are not one for each sample.
    """
    samples = samples.astype(np.float64)
    usable_samples(samples, "raise")
    if n_resamples < 1:
        raise InputError(
            f"bootstrapping: got n_resamples={n_resamples}, expected 1000 or more. Raise it."
        )
    labels = range(len(samples)) if clusters is None else clusters
    _check_labels(labels, len(samples), "clusters")
    order = {label: unit for unit, label in enumerate(dict.fromkeys(labels))}
    unit_of = np.array([order[label] for label in labels])
    n_units = len(order)
    if n_units < 2:
        return Resampled(np.full((n_resamples, *samples.shape[1:]), np.nan), n_units)
    # Measured from the first sample, constant data are exactly zero, and its interval has no width.
    origin = samples[0]
    sums = np.zeros((n_units, *samples.shape[1:]))
    np.add.at(sums, unit_of, samples - origin)
    sizes = np.bincount(unit_of).astype(np.float64)

    means = np.empty((n_resamples, *samples.shape[1:]))
    first = 0
    for counts in drawn_counts(seed, n_resamples, n_units):
        # einsum rather than @: a BLAS may sum in another order on another number of threads.
        total = np.einsum("ru,u...->r...", counts, sums)
        size = np.einsum("ru,u->r", counts, sizes).reshape(-1, *[1] * (samples.ndim - 1))
        means[first : first + len(counts)] = origin + total / size
        first += len(counts)
    return Resampled(means, n_units)


class Located(NamedTuple):
    """Where a mean curve has an event."""

    at: float
    """The place on the mean curve; NaN if it has none."""
    low: float
    high: float
    """Ends of the interval over resampled means; NaN without a place, or below `MIN_UNITS`."""
    undefined: float
    """Share of the resampled means without the event; the interval is that of the others."""


def located(
    curves: Float[np.ndarray, "sample point"],
    find: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Located:
    """The place where the mean curve has an event, and its expanded percentile interval.

    Places are whole numbers more often than not: the interval holds every place between its ends.

    Args:
        curves: one finite curve per sample.
        find: curves -> for each where the event is (such as a depth), NaN if it has none.
        clusters: as for ``bootstrap_mean``.

    Source: S-7, for a statistic of the mean curve.
    """
    at = float(find(curves.mean(axis=0)[None])[0])
    drawn, n_units = resampled_means(curves, seed=seed, n_resamples=n_resamples, clusters=clusters)
    drawn = drawn[np.isfinite(drawn).all(axis=1)]  # NaN throughout where one unit is all there is
    found = find(drawn) if len(drawn) else np.empty(0)
    found = found[np.isfinite(found)]
    undefined = 1 - len(found) / len(drawn) if len(drawn) else 1.0
    low = high = np.asarray(np.nan)
    if len(found) and np.isfinite(at):
        low, high = _limits(Resampled(found, n_units), np.asarray(at), confidence)
    return Located(at, float(low), float(high), undefined)


def stratified_bootstrap(
    samples: Samples,
    strata: Sequence[Hashable],
    *,
    seed: int,
    difference: tuple[Hashable, Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    nan_policy: NanPolicy = "raise",
) -> tuple[dict[Hashable, Interval], Interval | None]:
    """Mean and interval of each stratum, and of one stratum minus another.

    Every stratum is resampled on its own and keeps its size. The difference is that of the two
    strata's means within the same replicate; its ``n`` counts both, and its interval is as wide as
    the units of the smaller one ask for.

    Args:
        strata: for each sample, its stratum.
        difference: ``(a, b)`` asks for the mean of a minus the mean of b.
        clusters: as in ``bootstrap_mean``, drawn whole within each stratum.

    Raises:
        InputError: as ``bootstrap_mean``; or ``difference`` names an unknown or the same stratum.

    Source: docs/methods.md, S-8.
    """
    _check_labels(strata, len(samples), "strata")
    members: dict[Hashable, list[int]] = {}
    for i, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(i)
    names = [*members]
    if difference is not None and (difference[0] == difference[1] or {*difference} - {*names}):
        raise InputError(
            f"comparing two strata: got {difference!r}, expected two different ones of {names}. "
            "Check the labels."
        )
    rng = np.random.default_rng(seed)
    options = _Options(n_resamples, confidence, "pointwise", nan_policy)
    if clusters is not None:
        _check_labels(clusters, len(samples), "clusters")
    drawn = {}
    for name, chosen in members.items():
        together = None if clusters is None else [clusters[i] for i in chosen]
        drawn[name] = _bootstrap(samples[chosen], together, rng, options)
    groups = {name: interval for name, (interval, _) in drawn.items()}
    if difference is None:
        return groups, None
    (a, drawn_a), (b, drawn_b) = (drawn[name] for name in difference)
    mean = np.asarray(a.mean - b.mean)
    both = Resampled(drawn_a.means - drawn_b.means, min(drawn_a.n_units, drawn_b.n_units))
    low, high = _limits(both, mean, confidence)
    return groups, replace(
        a, mean=mean, low=low, high=high, n=a.n + b.n, n_omitted=a.n_omitted + b.n_omitted
    )


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """The rate k/n with its Wilson score interval, at any n; NaN for n = 0.

    Over all rates it covers 95 to 96 % on average, though a rate within 1/n of 0 or 1 as little as
    83 % (docs/methods.md, S-7). It takes the n to be independent.

    Raises:
        InputError: counts that are not 0 ≤ k ≤ n, or a confidence that is not between 0 and 1.
    """
    if not 0 <= k <= n:
        raise InputError(f"a rate of {k} in {n}: expected 0 ≤ k ≤ n. Check the counts.")
    mean = low = high = np.asarray(np.nan)
    if n:
        ci = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
        mean, low, high = np.asarray(k / n), np.asarray(ci.low), np.asarray(ci.high)
    return Interval(mean=mean, low=low, high=high, n=n, confidence=confidence, method="Wilson")


def recovery(
    patched: np.ndarray | float,
    base: np.ndarray | float,
    donor: np.ndarray | float,
    *,
    eps: float = 1e-4,
) -> np.ndarray:
    """Recovery (patched − base)/(donor − base): 0 if the patch did nothing, 1 if everything.

    NaN where |donor − base| < eps: there is no effect to recover, and the ratio is rounding noise
    (the default is well above that of fp32 logits). Count the NaN when you report a mean.
    """
    base = np.asarray(base, np.float64)
    effect = np.asarray(donor, np.float64) - base
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (np.asarray(patched, np.float64) - base) / effect
    return np.where(np.abs(effect) < eps, np.nan, ratio)


def handoff_index(
    recovery: Float[np.ndarray, "curve block"], includes_half: bool = False
) -> Int[np.ndarray, " curve"]:
    """The first index from which a curve stays below one half (S-11); its length if none.

    For the recovery of a span that is patched block by block, it is where the span's information
    has been handed off: what comes later no longer reads it there. With ``includes_half``, one half
    counts as below; 1 − recovery of the place it arrives at then gives where that stays at half or
    above.
    """
    below = recovery <= 0.5 if includes_half else recovery < 0.5
    n_settled = np.logical_and.accumulate(below[:, ::-1], axis=1).sum(axis=1)
    return np.asarray(recovery.shape[1] - n_settled)


class _Options(NamedTuple):
    n_resamples: int
    confidence: float
    band: Band
    nan_policy: NanPolicy


def _bootstrap(
    samples: Samples,
    clusters: Sequence[Hashable] | None,
    seed: int | np.random.Generator,
    options: _Options,
) -> tuple[Interval, Resampled]:
    """The mean's interval, and the replicates that it comes from."""
    kept = usable_samples(samples, options.nan_policy)
    if clusters is not None:
        _check_labels(clusters, len(samples), "clusters")
        clusters = [clusters[i] for i in np.flatnonzero(kept).tolist()]
    values = samples[kept].astype(np.float64)
    drawn = resampled_means(values, seed=seed, n_resamples=options.n_resamples, clusters=clusters)
    # From the first sample on: the mean of equal values is that value, to the last bit.
    mean = np.asarray(values[0] + (values - values[0]).mean(axis=0))
    low, high = _limits(drawn, mean, options.confidence, options.band)
    return Interval(
        mean=mean,
        low=low,
        high=high,
        n=len(values),
        n_omitted=len(samples) - len(values),
        confidence=options.confidence,
        method=f"expanded bootstrap, {options.band}",
    ), drawn


def _limits(
    drawn: Resampled, mean: Curve, confidence: float, band: Band = "pointwise"
) -> tuple[np.ndarray, np.ndarray]:
    if not 0 < confidence < 1:
        raise InputError(
            f"an interval of confidence {confidence}: expected a number between 0 and 1. "
            "0.95 is the usual one."
        )
    means, n_units = drawn
    if n_units < MIN_UNITS:
        return np.full(mean.shape, np.nan), np.full(mean.shape, np.nan)
    if band == "pointwise":
        tail = stats.norm.sf(widened(stats.norm.isf((1 - confidence) / 2), n_units))
        low, high = np.quantile(means, [tail, 1 - tail], axis=0)
        return np.asarray(low), np.asarray(high)
    error = means.std(axis=0, ddof=1)
    deviation = np.abs(means - mean) / np.where(error > 0, error, 1)
    largest = deviation.reshape(len(means), -1).max(axis=1)
    width = widened(float(np.quantile(largest, confidence)), n_units) * error
    return np.asarray(mean - width), np.asarray(mean + width)


def usable_samples(samples: Samples, nan_policy: NanPolicy) -> Bool[np.ndarray, " sample"]:
    """True at the samples to use: all, or under ``omit`` those without a NaN.

    Raises:
        InputError: infinite or unwanted NaN values, or nothing left.
    """
    points = samples.reshape(len(samples), math.prod(samples.shape[1:]))
    infinite, nan = np.isinf(points).any(axis=1), np.isnan(points).any(axis=1)
    if infinite.any() or (nan_policy == "raise" and nan.any()):
        raise InputError(
            f"statistics over {len(samples)} samples: got NaN in {nan.sum()} and infinite values "
            f"in {infinite.sum()} of them (the first is sample {(nan | infinite).argmax()}), "
            'expected finite numbers. Pass nan_policy="omit" to leave out and count NaN samples.'
        )
    if nan.all():
        raise InputError(
            f"statistics over {len(samples)} samples: got {nan.sum()} with NaN, expected at least "
            "one without. Check what was measured."
        )
    return ~nan


def _check_labels(labels: Sequence[Hashable], n: int, which: str) -> None:
    if len(labels) != n:
        raise InputError(
            f"bootstrapping: got {len(labels)} {which} for {n} samples, expected one for each."
        )
