"""Scores of probes, counted by hand."""

import numpy as np
import pytest

from hooked_alm.methods.statistics.probe_scores import area_under_curve, probe_scores


def test_scores_by_hand() -> None:
    """Labels 0 0 1 1 2, said 0 1 1 1 0: F1 of 0 is 2/4, of 1 4/5, of 2 nothing."""
    p = np.array([
        [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.3, 0.5, 0.2], [0.5, 0.1, 0.4],
    ])  # fmt: skip
    found = probe_scores(p, np.array([0, 0, 1, 1, 2]), np.zeros(5, np.int64))
    assert found.accuracy == 3 / 5
    assert found.macro_f1 == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    # Pairs in the right order: label 0 four of six; 1 five of six; 2 all four.
    assert found.auroc == pytest.approx((4 / 6 + 5 / 6 + 1) / 3)


def test_level_scores_are_half() -> None:
    one = np.zeros(4, np.int64)
    assert area_under_curve(np.ones(4), np.array([True, False, False, True]), one) == 0.5
    assert np.isnan(area_under_curve(np.ones(2), np.array([True, True]), one[:2]))
    assert area_under_curve(np.array([1.0, 2.0]), np.array([True, False]), one[:2]) == 0


def test_scores_of_two_probes_are_not_compared() -> None:
    """A probe that knows nothing says how common a label is where it was trained.

    Pooled, its scores, of 3 and 1 in 4, are in the wrong order in 9 of 16 pairs, right in one.
    """
    labels, folds = np.array([0, 0, 0, 1, 0, 1, 1, 1]), np.array([0] * 4 + [1] * 4)
    p = np.where(folds == 0, 0.75, 0.25)
    both = np.stack([1 - p, p], axis=1)
    assert area_under_curve(p, labels == 1, folds) == 0.5
    assert area_under_curve(p, labels == 1, 0 * folds) == pytest.approx((6 / 2 + 1) / 16)
    assert probe_scores(both, labels, folds).auroc == 0.5
    # Without a pair in any fold there is nothing to compare.
    assert np.isnan(probe_scores(both, labels, labels).auroc)
