"""Intervals, tests and moments against hand-checkable numbers, scipy and numpy."""

import itertools

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy import stats

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics import bootstrap
from hooked_alm.methods.statistics.bootstrap import (
    COVERAGE,
    MIN_UNITS,
    Interval,
    bootstrap_mean,
    located,
    recovery,
    resampled_means,
    stratified_bootstrap,
    widened,
    wilson,
)
from hooked_alm.methods.statistics.moments import Moments
from hooked_alm.methods.statistics.significance import sign_flip_test, sign_test


def limits(interval: Interval) -> tuple[object, object]:
    return interval.low.tolist(), interval.high.tolist()


def curves(n: int = 18, depths: int = 5) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(n, depths)) + np.arange(depths)


@pytest.mark.parametrize("band", ["pointwise", "simultaneous"])
@pytest.mark.parametrize("clusters", [None, [0, 0, 0, 1, 1, 2, 2, 3, 4, 5]])
def test_constant_has_a_zero_width_interval(band: str, clusters: list[int] | None) -> None:
    # 0.1 ten times sums to 0.9999999999999999, so the plain mean would be another number.
    constant = np.tile([0.1, -1 / 3, 1e9 / 7], (10, 1))
    got = bootstrap_mean(constant, seed=0, band=band, clusters=clusters)  # type: ignore[arg-type]
    assert np.array_equal(got.mean, constant[0])
    assert limits(got) == (constant[0].tolist(), constant[0].tolist())


def test_two_values() -> None:
    values = np.array([0.0, 1.0])
    means, n_units = resampled_means(values, seed=0, n_resamples=40_000)
    assert n_units == 2
    shares = [float((means == mean).mean()) for mean in (0, 0.5, 1)]
    assert sum(shares) == 1
    # Three standard errors of a share of ½ in 40 000 draws.
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.0075)


def test_seed_reproduces() -> None:
    for clusters in (None, [i % 6 for i in range(18)]):
        first, again, other = (
            bootstrap_mean(curves(), seed=seed, clusters=clusters, n_resamples=200)
            for seed in (7, 7, 8)
        )
        assert limits(first) == limits(again) != limits(other)


def test_widened_by_hand() -> None:
    """Source: a table of the t distribution; t₅ = 2.571 and t₁₇ = 2.110 leave 2.5 %."""
    for n, t in ((6, 2.571), (18, 2.110)):
        assert widened(1.96, n) == pytest.approx(t * (n / (n - 1)) ** 0.5, abs=1e-3)
    assert widened(3.0, 6) / 3.0 > widened(1.96, 6) / 1.96, "far tails of t are heavier still"
    assert widened(1.96, 10**6) == pytest.approx(1.96, abs=1e-4)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_equals_scipy_at_the_expanded_level(confidence: float) -> None:
    n = 18
    expanded = stats.t.ppf((1 + confidence) / 2, n - 1) * (n / (n - 1)) ** 0.5
    samples = curves()
    theirs = stats.bootstrap(
        (samples,),
        np.mean,
        n_resamples=999,
        confidence_level=1 - 2 * stats.norm.sf(expanded),
        method="percentile",
        rng=np.random.default_rng(3),
    )
    means = resampled_means(samples, seed=3, n_resamples=999).means
    np.testing.assert_allclose(means.T, theirs.bootstrap_distribution, rtol=0, atol=1e-14)
    got = bootstrap_mean(samples, seed=3, n_resamples=999, confidence=confidence)
    np.testing.assert_allclose(got.mean, samples.mean(0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(got.low, theirs.confidence_interval.low, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.high, theirs.confidence_interval.high, rtol=0, atol=1e-12)


def test_curves_are_resampled_whole() -> None:
    first = curves()[:, 0]
    means = resampled_means(np.stack([first, 2 * first], 1), seed=0, n_resamples=100).means
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0], rtol=0, atol=1e-14)
    assert means[:, 0].std() > 0.1


def test_singleton_clusters_are_no_clusters() -> None:
    samples = curves()
    plain = bootstrap_mean(samples, seed=0)
    clustered = bootstrap_mean(samples, seed=0, clusters=[f"speaker {i}" for i in range(18)])
    assert limits(plain) == limits(clustered)


def test_clusters_are_drawn_whole_and_weigh_by_their_samples() -> None:
    values, clusters = np.array([0.0, 0.0, 0.0, 1.0]), ["a", "a", "a", "b"]
    means, n_units = resampled_means(values, seed=0, n_resamples=500, clusters=clusters)
    # Draws aa, ab or ba, bb.
    assert (set(means.tolist()), n_units) == ({0.0, 0.25, 1.0}, 2)
    assert float(bootstrap_mean(values, seed=0, clusters=clusters).mean) == 0.25


def test_clusters_follow_their_samples_when_nan_is_omitted() -> None:
    values, clusters = np.array([np.nan, 0.0, 0.0, *range(1, 6)]), ["a", "a", *"abcdef"]
    got = bootstrap_mean(values, seed=0, clusters=clusters, nan_policy="omit")
    expected = bootstrap_mean(values[1:], seed=0, clusters=clusters[1:])
    assert limits(got) == limits(expected)
    assert got.low < got.mean < got.high


def test_simultaneous_band_is_the_max_t_band_widened() -> None:
    samples = curves(depths=30)
    point = bootstrap_mean(samples, seed=0)
    band = bootstrap_mean(samples, seed=0, band="simultaneous")
    means = resampled_means(samples, seed=0, n_resamples=2000).means
    error = means.std(0, ddof=1)
    largest = (np.abs(means - samples.mean(0)) / error).max(axis=1)
    expected = widened(float(np.quantile(largest, 0.95)), 18)
    np.testing.assert_allclose((band.high - band.mean) / error, expected, rtol=1e-12)
    np.testing.assert_allclose((band.mean - band.low) / error, expected, rtol=1e-12)
    inside_pointwise = ((means >= point.low) & (means <= point.high)).all(1).mean()
    assert inside_pointwise < 0.8
    assert band.method != point.method


def covered(n: int, n_simulated: int = 500) -> tuple[float, float, float]:
    """Measured coverage of n normal units: means, curves of 5 depths, clusters of 1 to 4."""
    rng = np.random.default_rng(n)
    values = rng.normal(size=(n, n_simulated))
    cluster = np.repeat(np.arange(n), rng.integers(1, 5, n))
    grouped = values[cluster] + rng.normal(size=(len(cluster), n_simulated))
    means = bootstrap_mean(values, seed=0)
    clusters = bootstrap_mean(grouped, seed=0, clusters=cluster.tolist())
    held = [((one.low <= 0) & (one.high >= 0)).mean() for one in (means, clusters)]
    walks = rng.normal(size=(n_simulated // 2, n, 5)).cumsum(axis=2)
    bands = [
        bootstrap_mean(walk, seed=seed, band="simultaneous", n_resamples=1000)
        for seed, walk in enumerate(walks)
    ]
    whole = np.mean([((one.low <= 0) & (one.high >= 0)).all() for one in bands])
    return float(held[0]), float(whole), float(held[1])


@pytest.mark.parametrize("n", [MIN_UNITS, 18])
def test_coverage_is_what_is_said(n: int) -> None:
    """95 % intervals of normal data cover as `COVERAGE` says; clusters as means do."""
    mean, curve = COVERAGE[n]
    # Three standard errors of 500 samples, and of 250 curves.
    assert covered(n) == (
        pytest.approx(mean, abs=0.034),
        pytest.approx(curve, abs=0.048),
        pytest.approx(mean, abs=0.034),
    )


def test_coverage_needs_the_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain percentile interval and the plain max-t band cover less than is said."""
    monkeypatch.setattr(bootstrap, "widened", lambda z, n_units: z)
    mean, curve = COVERAGE[MIN_UNITS]
    plain = covered(MIN_UNITS)
    assert plain[0] < mean - 0.034
    assert plain[1] < curve - 0.048
    assert plain[2] < mean - 0.034


def test_few_units_have_no_interval() -> None:
    """Not of their mean, nor of a curve, of a difference, of clusters, or of a place."""
    few, enough = curves(MIN_UNITS - 1), curves(MIN_UNITS)
    for samples, is_known in ((few, False), (enough, True)):
        for band in ("pointwise", "simultaneous"):
            for clusters in (None, range(len(samples))):
                got = bootstrap_mean(samples, seed=0, band=band, clusters=clusters)  # type: ignore[arg-type]
                assert np.isfinite(got.mean).all()
                assert (np.isfinite([got.low, got.high]) == is_known).all()
        found = located(samples, lambda means: means.argmax(axis=1) * 1.0, seed=0)
        assert (found.at, found.undefined) == (4, 0)
        assert (np.isfinite([found.low, found.high]) == is_known).all()
    clustered = bootstrap_mean(curves(18), seed=0, clusters=[i % 5 for i in range(18)])
    assert np.isnan([clustered.low, clustered.high]).all()
    both, strata = np.concatenate([few, enough]), ["few"] * len(few) + ["enough"] * len(enough)
    groups, difference = stratified_bootstrap(both, strata, seed=0, difference=("enough", "few"))
    assert difference is not None
    known = {name: np.isfinite(one.low).all() for name, one in groups.items()}
    assert known == {"few": False, "enough": True}
    assert np.isfinite(difference.mean).all()
    assert np.isnan([difference.low, difference.high]).all()


def test_nan_raises_or_is_counted() -> None:
    samples = curves()
    samples[[3, 8], 2] = np.nan
    message = (
        r"over 18 samples: got NaN in 2 and infinite values in 0 of them \(the first is sam.* 3"
    )
    with pytest.raises(InputError, match=message):
        bootstrap_mean(samples, seed=0)
    got = bootstrap_mean(samples, seed=0, nan_policy="omit")
    expected = bootstrap_mean(np.delete(samples, [3, 8], 0), seed=0)
    assert (got.n, got.n_omitted, expected.n, expected.n_omitted) == (16, 2, 16, 0)
    assert limits(got) == limits(expected)
    samples[5, 1] = np.inf
    with pytest.raises(InputError, match="infinite values in 1"):
        bootstrap_mean(samples, seed=0, nan_policy="omit")
    for nothing in (np.zeros((0, 3)), np.full((2, 3), np.nan)):
        with pytest.raises(InputError, match="expected at least one without"):
            bootstrap_mean(nothing, seed=0, nan_policy="omit")


def test_one_unit_has_no_interval() -> None:
    for samples, clusters in (([2.0], None), ([1.0, 3.0], ["same", "same"])):
        for band in ("pointwise", "simultaneous"):
            got = bootstrap_mean(np.array(samples), seed=0, clusters=clusters, band=band)  # type: ignore[arg-type]
            assert float(got.mean) == 2.0
            assert np.isnan([got.low, got.high]).all()


def test_bad_options() -> None:
    samples = curves()
    with pytest.raises(InputError, match="got 2 clusters for 18 samples"):
        bootstrap_mean(samples, seed=0, clusters=["a", "b"])
    with pytest.raises(InputError, match="got n_resamples=0, expected 1000"):
        bootstrap_mean(samples, seed=0, n_resamples=0)
    with pytest.raises(InputError, match=r"confidence 95.*between 0 and 1"):
        bootstrap_mean(samples, seed=0, confidence=95.0)
    with pytest.raises(TypeCheckError):
        bootstrap_mean(samples, seed=0, band="joint")  # type: ignore[arg-type]


def test_strata_constant() -> None:
    groups, difference = stratified_bootstrap(
        np.array([1.0, 3.0] * 6), ["A", "B"] * 6, seed=0, difference=("A", "B")
    )
    assert difference is not None
    assert (float(difference.mean), *limits(difference), difference.n) == (-2, -2, -2, 12)
    assert {name: (*limits(got), got.n) for name, got in groups.items()} == {
        "A": (1, 1, 6),
        "B": (3, 3, 6),
    }


def test_strata_are_resampled_within_and_apart() -> None:
    samples, strata = curves(36), ["a"] * 18 + ["b"] * 18
    groups, difference = stratified_bootstrap(samples, strata, seed=0, difference=("b", "a"))
    assert difference is not None
    # The first stratum starts the stream of draws, as a bootstrap of its own would.
    assert limits(groups["a"]) == limits(bootstrap_mean(samples[:18], seed=0))
    np.testing.assert_array_equal(difference.mean, groups["b"].mean - groups["a"].mean)
    # Independent draws: the variances add up, to the error of 2000 draws.
    widths = {name: got.high - got.low for name, got in {**groups, "d": difference}.items()}
    np.testing.assert_allclose(widths["d"], np.hypot(widths["a"], widths["b"]), rtol=0.1)


def test_strata_of_clusters() -> None:
    """What belongs together is drawn together; alone in its cluster, it is as without."""
    samples, strata = curves(30), ["a"] * 12 + ["b"] * 18
    alone, _ = stratified_bootstrap(samples, strata, seed=0, clusters=range(30))
    plain, _ = stratified_bootstrap(samples, strata, seed=0)
    assert limits(alone["b"]) == limits(plain["b"])
    pairs = [i // 2 for i in range(30)]
    together, _ = stratified_bootstrap(samples, strata, seed=0, clusters=pairs)
    assert limits(together["a"]) == limits(
        bootstrap_mean(samples[:12], seed=0, clusters=pairs[:12])
    )
    assert limits(together["b"]) != limits(plain["b"])
    with pytest.raises(InputError, match="got 2 clusters for 30 samples"):
        stratified_bootstrap(samples, strata, seed=0, clusters=["x", "y"])


def test_strata_errors() -> None:
    values = np.array([1.0, np.nan, 2.0])
    for pair in (("a", "z"), ("a", "a")):
        with pytest.raises(InputError, match=r"expected two different ones of \['a', 'b'\]"):
            stratified_bootstrap(values, ["a", "a", "b"], seed=0, difference=pair)
    with pytest.raises(InputError, match="got 1 strata for 3 samples"):
        stratified_bootstrap(values, ["a"], seed=0)
    with pytest.raises(InputError, match="got NaN in 1"):
        stratified_bootstrap(values, ["a", "a", "b"], seed=0)
    groups, difference = stratified_bootstrap(
        values, ["a", "a", "b"], seed=0, nan_policy="omit", difference=("a", "b")
    )
    assert (groups["a"].n, groups["a"].n_omitted) == (1, 1)
    assert difference is not None
    assert (difference.n, difference.n_omitted) == (2, 1)


def test_moments_by_hand() -> None:
    moments = Moments()
    for value in (1.0, 2.0, 4.0):
        moments.update(np.array([value]))
    assert moments.n == 3
    assert float(moments.mean) == pytest.approx(7 / 3, rel=1e-15)
    assert float(moments.std(ddof=0)) == pytest.approx(1.2472, abs=5e-5)
    assert float(moments.std(ddof=1)) == pytest.approx(1.5275, abs=5e-5)


@pytest.mark.parametrize("cuts", [[], [1], [7, 8], list(range(1, 50)), [0, 25, 25, 50]])
def test_moments_equal_numpy_for_any_batching(cuts: list[int]) -> None:
    # A large offset is what defeats the textbook formula E[x²] − E[x]².
    data = np.random.default_rng(0).normal(size=(50, 2, 3)).astype(np.float32) + np.float32(1e3)
    batches = np.split(data, cuts)
    running, parts = Moments(), []
    for batch in batches:
        running.update(batch)
        parts.append(Moments())
        parts[-1].update(batch)
    merged = Moments()
    for part in reversed(parts):
        merged = merged.merge(part)
    expected = data.astype(np.float64)
    for got in (running, merged):
        assert got.n == 50
        for ddof in (0, 1):
            np.testing.assert_allclose(got.std(ddof=ddof), expected.std(0, ddof=ddof), rtol=1e-9)
        np.testing.assert_allclose(got.mean, expected.mean(0), rtol=1e-12)


def test_moments_edges() -> None:
    one = Moments()
    one.update(np.array([[3.0, 4.0]]))
    assert one.std(ddof=0).tolist() == [0, 0]
    assert np.isnan(one.std(ddof=1)).all()
    merged = one.merge(Moments())
    merged.update(np.array([[5.0, 6.0]]))
    assert (one.n, merged.n) == (1, 2), "merging with nothing is still a new object"
    assert one.mean.tolist() == [3, 4]
    with pytest.raises(InputError, match=r"shape \(3,\), expected \(2,\)"):
        one.update(np.ones((1, 3)))
    with pytest.raises(InputError, match="got 1 NaN or infinite"):
        one.update(np.array([[np.nan, 1.0]]))
    assert one.n == 1


def test_wilson() -> None:
    got = wilson(2, 3)
    assert float(got.mean) == 2 / 3
    np.testing.assert_allclose([got.low, got.high], [0.208, 0.939], atol=5e-4)
    assert got.n == 3
    for k, n in ((0, 5), (5, 5)):
        edge = wilson(k, n)
        assert 0 <= edge.low <= edge.mean <= edge.high <= 1
        assert edge.low < edge.high
    assert np.isnan([wilson(0, 0).mean, wilson(0, 0).low, wilson(0, 0).high]).all()
    with pytest.raises(InputError, match="a rate of 4 in 3"):
        wilson(4, 3)


def test_recovery() -> None:
    assert float(recovery(0.5, -2.0, 3.0)) == 0.5
    base, donor = np.array([0.0, 1.0, 1.0]), np.array([2.0, 1.0, 1.00005])
    got = recovery(np.array([[0.0, 1.0, 1.0], [2.0, 5.0, 1.0]]), base, donor)
    np.testing.assert_array_equal(got, [[0, np.nan, np.nan], [1, np.nan, np.nan]])
    assert float(recovery(1.0, 0.0, 1e-3, eps=1e-4)) == 1000
    assert np.isnan(recovery(1.0, 0.0, 1e-3, eps=1e-2))


def test_sign_test() -> None:
    got = sign_test(np.array([1.0, 2.0, 3.0, 4.0, 0.0]))
    assert (got.p, got.statistic, got.n) == (2 / 16, 4, 4)
    assert sign_test(np.array([1.0, 2.0, 3.0, 4.0]), "greater").p == 1 / 16
    assert sign_test(np.array([1.0, 2.0, 3.0, 4.0]), "less").p == 1
    assert sign_test(np.zeros(3)).p == 1
    with pytest.raises(InputError, match="got NaN in 1"):
        sign_test(np.array([1.0, np.nan]))


def test_sign_flip_test_is_exact_for_few() -> None:
    values = np.array([1.0, 2.0, -0.5, 3.0])
    means = [np.mean(values * signs) for signs in itertools.product([1, -1], repeat=4)]
    greater = np.mean([mean >= values.mean() for mean in means])
    assert sign_flip_test(values, seed=0, alternative="greater").p == greater == 2 / 16
    got = sign_flip_test(values, seed=0)
    assert (got.p, got.statistic, got.n) == (4 / 16, values.mean(), 4)
    assert got.method.endswith("exact")


def test_sign_flip_test_draws_for_many() -> None:
    values = np.random.default_rng(0).normal(0.9, 1, 30)
    got = sign_flip_test(values, seed=0, n_resamples=999)
    assert got.p == 2 / 1000
    assert got == sign_flip_test(values, seed=0, n_resamples=999)
    assert got.method.endswith("999 draws")
    assert sign_flip_test(values - values.mean(), seed=0, n_resamples=999).p > 0.9
    assert np.isnan(sign_flip_test(np.array([2.0]), seed=0).p)
