"""The delete-a-group jackknife, against what it is of a mean."""

import numpy as np
import pytest
from scipy import stats

from hooked_alm.methods.statistics.jackknife import delete_a_group


def test_of_a_mean_it_is_the_t_interval_of_the_groups() -> None:
    groups = np.random.default_rng(0).normal(size=(8, 5))
    without = np.array([np.delete(groups, g, axis=0).mean() for g in range(8)])
    found = delete_a_group(without, float(groups.mean()))
    means = groups.mean(axis=1)
    low, high = stats.t.interval(0.95, 7, means.mean(), stats.sem(means))
    assert (float(found.low), float(found.high)) == pytest.approx((low, high))
    assert (float(found.mean), found.n) == (groups.mean(), 8)
    narrow = delete_a_group(without, float(groups.mean()), confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_few_groups_or_one_without_an_estimate_have_no_interval() -> None:
    for without in (np.arange(5.0), np.array([1.0, 2.0, np.nan, 3.0, 4.0, 5.0, 6.0])):
        found = delete_a_group(without, 2.0)
        assert float(found.mean) == 2.0
        assert np.isnan([found.low, found.high]).all()
