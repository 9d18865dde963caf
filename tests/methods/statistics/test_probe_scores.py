"""Scores of probes, counted by hand."""

import numpy as np
import pytest

from hooked_alm.methods.statistics.probe_scores import area_under_curve, probe_scores


def test_scores_by_hand() -> None:
    """Labels 0 0 1 1 2, said 0 1 1 1 0: F1 of 0 is 2/4, of 1 4/5, of 2 nothing."""
    p = np.array([
        [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.3, 0.5, 0.2], [0.5, 0.1, 0.4],
    ])  # fmt: skip
    found = probe_scores(p, np.array([0, 0, 1, 1, 2]))
    assert found.accuracy == 3 / 5
    assert found.macro_f1 == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    # Pairs in the right order: label 0 four of six; 1 five of six; 2 all four.
    assert found.auroc == pytest.approx((4 / 6 + 5 / 6 + 1) / 3)


def test_level_scores_are_half() -> None:
    assert area_under_curve(np.ones(4), np.array([True, False, False, True])) == 0.5
    assert np.isnan(area_under_curve(np.ones(2), np.array([True, True])))
    assert area_under_curve(np.array([1.0, 2.0]), np.array([True, False])) == 0
