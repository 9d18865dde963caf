"""Draws in bounded memory: the same numbers, whatever fits at once."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from hooked_alm.methods.statistics import draws
from hooked_alm.methods.statistics.bootstrap import (
    bootstrap_mean,
    resampled_means,
    stratified_bootstrap,
)
from hooked_alm.methods.statistics.significance import Alternative, sign_flip_test

N_UNITS, N_RESAMPLES = 301, 1000
SAMPLES = np.random.default_rng(2).normal(size=(N_UNITS, 7))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """No test meets the counts of another."""
    kept = (draws._kept, draws._kept_tosses)
    for one in kept:
        one.cache_clear()
    yield
    for one in kept:
        one.cache_clear()


def all_at_once(clusters: list[int] | None) -> np.ndarray:
    """The replicates by the definition, from one array of draws."""
    unit_of = np.arange(N_UNITS) if clusters is None else np.array(clusters)
    n = int(unit_of.max()) + 1
    drawn = np.random.default_rng(3).integers(0, n, (N_RESAMPLES, n))
    sums, sizes = np.zeros((n, 7)), np.bincount(unit_of)
    np.add.at(sums, unit_of, SAMPLES)
    return np.stack([sums[row].sum(axis=0) / sizes[row].sum() for row in drawn])


@pytest.mark.parametrize("most_bytes", [2**27, 2**18, 1])
@pytest.mark.parametrize("clusters", [None, [i % 100 for i in range(N_UNITS)]])
def test_chunks_change_no_draw(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int, clusters: list[int] | None
) -> None:
    expected = resampled_means(SAMPLES, seed=3, n_resamples=N_RESAMPLES, clusters=clusters)
    np.testing.assert_allclose(expected.means, all_at_once(clusters), rtol=0, atol=1e-13)
    draws._kept.cache_clear()
    monkeypatch.setattr(draws, "MOST_BYTES", most_bytes)
    found = resampled_means(SAMPLES, seed=3, n_resamples=N_RESAMPLES, clusters=clusters)
    assert np.array_equal(found.means, expected.means), "to the last bit"


def test_strata_draw_on_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    strata = ["abb"[i % 3] for i in range(N_UNITS)]

    def ends() -> list[np.ndarray]:
        groups, difference = stratified_bootstrap(SAMPLES, strata, seed=0, difference=("a", "b"))
        assert difference is not None
        return [end for one in (*groups.values(), difference) for end in (one.low, one.high)]

    expected = ends()
    monkeypatch.setattr(draws, "MOST_BYTES", 10_000)
    assert np.array_equal(ends(), expected)


def test_memory_does_not_grow_with_the_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """All draws at once would be 80 MB for each of four arrays."""
    monkeypatch.setattr(draws, "MOST_BYTES", 2**21)
    samples = np.random.default_rng(0).normal(size=10_000)
    tracemalloc.start()
    try:
        bootstrap_mean(samples, seed=0, n_resamples=1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**21 + 20 * samples.nbytes


def test_counts_are_kept_for_the_next_curve_and_no_other() -> None:
    first = bootstrap_mean(SAMPLES, seed=0)
    assert np.array_equal(bootstrap_mean(SAMPLES, seed=0).low, first.low)
    assert draws._kept.cache_info().hits == 1
    for options in ({"seed": 1}, {"seed": 0, "n_resamples": 1500}):
        other = bootstrap_mean(SAMPLES, **options)  # type: ignore[arg-type]
        assert not np.array_equal(other.low, first.low)
    assert not np.array_equal(bootstrap_mean(SAMPLES[1:], seed=0).low, first.low)
    assert draws._kept.cache_info().hits == 1


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("most_bytes", [2**27, 5000])
def test_sign_flips_are_those_of_scipy(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int, alternative: Alternative
) -> None:
    monkeypatch.setattr(draws, "MOST_BYTES", most_bytes)
    rng = np.random.default_rng(0)
    # Whole numbers have many ties, and small ones sum to the same in any order.
    for values in (rng.normal(0.3, 1, 23), rng.integers(-2, 4, 16).astype(float), np.full(20, 0.1)):
        theirs = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", vectorized=True, n_resamples=1000,
            alternative=alternative, rng=np.random.default_rng(7),
        )  # fmt: skip
        ours = sign_flip_test(values, seed=7, n_resamples=1000, alternative=alternative)
        assert ours.p == theirs.pvalue
        assert ours.statistic == pytest.approx(float(theirs.statistic), rel=1e-12)


def test_memory_of_sign_flips_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once would be 160 MB for each of several arrays."""
    monkeypatch.setattr(draws, "MOST_BYTES", 2**21)
    values = np.random.default_rng(0).normal(size=10_000)
    tracemalloc.start()
    try:
        sign_flip_test(values, seed=0, n_resamples=1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**21 + 20 * values.nbytes


def test_a_row_wider_than_the_memory_is_a_chunk() -> None:
    assert list(draws.chunks(3, draws.MOST_BYTES + 1)) == [slice(i, i + 1) for i in range(3)]
    assert list(draws.chunks(5, draws.MOST_BYTES // 3)) == [slice(0, 3), slice(3, 5)]
    assert not list(draws.chunks(0, 8))
