"""How often intervals that say 95 % hold the truth: by kind, distribution and sample size.

    python scripts/coverage.py [--n 2000]

``bootstrap`` is ``hooked_alm.methods.statistics.bootstrap``, measured below its smallest n too;
``plain`` is the same interval of the same draws without its correction for few units. ``error`` is
the standard error of ``bootstrap``. The last rows are Wilson's interval, computed: the mean over
all rates, and the lowest.

    mean        one number per sample
    curve       13 correlated depths, all of them within the simultaneous band
    clusters    n clusters of 1 to 8 samples, which share half of their variance
    difference  n samples less 3n others that spread half as much, resampled apart
    place       from which depth on a rising mean curve stays above zero
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from hooked_alm.methods.statistics import bootstrap
from hooked_alm.methods.statistics.critical_layer import resolve_depths

SIZES = (2, 3, 4, 5, 6, 8, 12, 18, 30)
N_DEPTHS = 13
N_AT_ONCE = 100
"""Samples of one number that share their draws, to save time."""
ROUNDING = 1e-9

Quantile = Callable[[np.ndarray], np.ndarray]
DISTRIBUTIONS: dict[str, tuple[Quantile, float]] = {
    "normal": (lambda p: np.asarray(stats.norm.ppf(p)), 0.0),
    "exponential": (lambda p: -np.log1p(-p), 1.0),
    "lognormal": (lambda p: np.exp(stats.norm.ppf(p)), float(np.exp(0.5))),
    "rate 0.5": (lambda p: (p < 0.5).astype(float), 0.5),
    "rate 0.8": (lambda p: (p < 0.8).astype(float), 0.8),
}
"""Name -> its quantile function, and its mean."""
CORRECTIONS = (bootstrap.widened, lambda z, n_units: z)
"""Ours, and none."""


def held(interval: bootstrap.Interval | bootstrap.Located, truth: float) -> np.ndarray:
    """Whether each point's interval holds the truth."""
    return (interval.low <= truth + ROUNDING) & (interval.high >= truth - ROUNDING)


def mean(n: int, distribution: str, rng: np.random.Generator) -> np.ndarray:
    """Of `N_AT_ONCE` samples of n."""
    quantile, truth = DISTRIBUTIONS[distribution]
    samples = quantile(rng.random((n, N_AT_ONCE)))
    return held(bootstrap.bootstrap_mean(samples, seed=seed_of(rng)), truth)


def curve(n: int, distribution: str, rng: np.random.Generator) -> np.ndarray:
    """Of one sample of n curves, whose depths have the distribution."""
    quantile, truth = DISTRIBUTIONS[distribution]
    walk = rng.normal(size=(n, N_DEPTHS)).cumsum(axis=1) / np.sqrt(np.arange(1, N_DEPTHS + 1))
    samples = quantile(stats.norm.cdf(walk))
    found = bootstrap.bootstrap_mean(samples, seed=seed_of(rng), band="simultaneous")
    return held(found, truth).all(keepdims=True)


def clusters(n: int, distribution: str, rng: np.random.Generator) -> np.ndarray:
    """Of `N_AT_ONCE` samples of n clusters, all with the same sizes."""
    cluster = np.repeat(np.arange(n), rng.integers(1, 9, n))
    shared = rng.normal(size=(n, N_AT_ONCE))[cluster]
    samples = shared + rng.normal(size=shared.shape)
    return held(bootstrap.bootstrap_mean(samples, seed=seed_of(rng), clusters=cluster.tolist()), 0)


def difference(n: int, distribution: str, rng: np.random.Generator) -> np.ndarray:
    """Of `N_AT_ONCE` pairs of samples of n and 3n."""
    few, many = rng.normal(size=(n, N_AT_ONCE)), 0.5 * rng.normal(size=(3 * n, N_AT_ONCE))
    strata = ["few"] * n + ["many"] * 3 * n
    _, found = bootstrap.stratified_bootstrap(
        np.concatenate([few, many]), strata, seed=seed_of(rng), difference=("few", "many")
    )
    assert found is not None, "both strata are there"
    return held(found, 0)


def place(n: int, distribution: str, rng: np.random.Generator) -> np.ndarray:
    """Of one sample of n noisy curves, whose mean is above zero from its middle on."""
    middle = N_DEPTHS // 2
    rising = np.arange(N_DEPTHS) - middle + 0.5
    curves = rising + rng.normal(size=(n, 1)) + rng.normal(size=(n, N_DEPTHS))
    return np.atleast_1d(held(bootstrap.located(curves, resolve_depths, seed=seed_of(rng)), middle))


KINDS = (mean, curve, clusters, difference, place)


def seed_of(rng: np.random.Generator) -> int:
    """A seed for the draws of one interval."""
    return int(rng.integers(2**32))


def coverage(kind: Callable[..., np.ndarray], n: int, distribution: str, n_simulated: int) -> float:
    """Share of the simulated samples whose interval holds the truth."""
    rng, found = np.random.default_rng(n), [np.empty(0)]
    while (n_found := sum(map(len, found))) < n_simulated:
        found.append(kind(n, distribution, rng))
    return float(np.concatenate(found).sum() / n_found)


def wilson(n: int) -> np.ndarray:
    """The exact coverage of Wilson's interval at rates from 0 to 1."""
    rates, counts = np.linspace(0, 1, 1001)[1:-1, None], np.arange(n + 1)
    ends = [bootstrap.wilson(k, n) for k in counts.tolist()]
    low, high = (np.array([getattr(one, end) for one in ends]) for end in ("low", "high"))
    return np.asarray(((low <= rates) & (rates <= high)) * stats.binom.pmf(counts, n, rates)).sum(1)


def rows(n_simulated: int) -> Iterator[str]:
    """Lines of the table."""
    yield f"{'kind':12}{'distribution':14}{'n':>4}{'bootstrap':>11}{'error':>8}{'plain':>8}"
    for kind in KINDS:
        for name in DISTRIBUTIONS if kind in (mean, curve) else ("normal",):
            for n in SIZES:
                shares = []
                for correction in CORRECTIONS:
                    bootstrap.widened = correction
                    shares.append(coverage(kind, n, name, n_simulated))
                error = np.sqrt(shares[0] * (1 - shares[0]) / n_simulated)
                yield (
                    f"{kind.__name__:12}{name:14}{n:4}{shares[0]:11.3f}{error:8.3f}{shares[1]:8.3f}"
                )
    yield f"{'kind':12}{'distribution':14}{'n':>4}{'mean':>11}{'lowest':>8}"
    for n in SIZES:
        yield f"{'Wilson':12}{'all rates':14}{n:4}{wilson(n).mean():11.3f}{wilson(n).min():8.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="samples simulated for each row")
    n_simulated = parser.parse_args().n
    print(f"No interval is shown below n = {bootstrap.MIN_UNITS}.")
    bootstrap.MIN_UNITS = 2
    for row in rows(n_simulated):
        print(row, flush=True)
