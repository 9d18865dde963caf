"""The depth at which a curve turns, against the numbers given with M-000-7."""

from typing import Any

import numpy as np
import pytest

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.bootstrap import Located, located
from hooked_alm.methods.statistics.critical_layer import (
    CriticalMethod,
    critical_layers,
    settling_depths,
)

METHODS: list[CriticalMethod] = [
    "second_diff_abs",
    "second_diff_pos",
    "half_rise",
    "resolve",
    "changepoint",
]
CARD = np.array([0.0, 0, 0, 0, 1, 2, 3])


def critical_layer(curve: np.ndarray, method: CriticalMethod, **options: Any) -> float:
    return float(critical_layers(curve[None], method, **options)[0])


def turn(curves: np.ndarray, method: CriticalMethod, clusters: list[int] | None = None) -> Located:
    def find(means: np.ndarray) -> np.ndarray:
        return critical_layers(means, method)

    return located(curves, find, seed=0, clusters=clusters)


def layers(curve: list[float] | np.ndarray, **options: Any) -> list[float]:
    return [critical_layer(np.array(curve, float), m, **options) for m in METHODS]


def test_critical_layer_of_the_card() -> None:
    # half_rise: the midpoint of 0 and 3 is passed between depths 4 and 5.
    assert layers(CARD) == [3, 3, 5, 4, 3]
    assert layers([0, 0, 1, 2])[2] == 2, "at the midpoint counts as through it"
    assert layers(CARD * 1e-6) == [3, 3, 5, 4, 3]
    assert critical_layer(CARD.astype(np.float32), "changepoint") == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("smooth", [1, 3, 5])
def test_straight_line_does_not_turn(dtype: type, smooth: int) -> None:
    # Not exact in binary: a second difference of it is rounding noise.
    line = np.linspace(-0.1, 0.77, 29).astype(dtype)
    for method in ("second_diff_abs", "second_diff_pos", "changepoint"):
        assert np.isnan(critical_layer(line, method, smooth=smooth))
        assert np.isnan(critical_layer(0 * line, method, smooth=smooth))
    assert critical_layer(line, "resolve", smooth=smooth) == 4
    assert np.isnan(critical_layer(0 * line, "half_rise", smooth=smooth))
    assert np.isnan(critical_layer(0 * line, "resolve", smooth=smooth))


def test_where_the_methods_differ() -> None:
    # Falls to A at once, then turns sharply at 2; back over the middle (-1) at 4; positive from 5.
    assert layers([0, -2, -4, -2, -0.5, 1, 2]) == [2, 2, 4, 5, 2]
    # A fall: the largest turn is away from T, which the signed second difference does not take.
    np.testing.assert_array_equal(layers([0, 0, 0, -3, -6, -7]), [2, 4, np.nan, 3, 2])
    # Resolved from the start, and only at the very end.
    assert critical_layer(np.array([1.0, 2, 1]), "resolve") == 0
    assert critical_layer(np.array([1.0, 2, -1]), "resolve") == 2
    assert critical_layer(np.array([1.0, 0, 1]), "resolve") == 2


def test_resolve_of_a_final_tie_is_undefined() -> None:
    assert np.isnan(critical_layer(np.array([1.0, -1, 0]), "resolve"))


def test_changepoint_is_the_least_squares_kink() -> None:
    rng = np.random.default_rng(0)
    depth = np.arange(29.0)
    curve = 0.2 * depth + 1.5 * np.maximum(0, depth - 17) + rng.normal(0, 0.3, 29)
    assert critical_layer(curve, "changepoint") == 17
    errors = []
    for kink in range(1, 28):
        design = np.stack([np.ones(29), depth, np.maximum(0, depth - kink)], 1)
        errors.append(np.linalg.lstsq(design, curve)[1][0])
    assert 1 + int(np.argmin(errors)) == 17


def test_smoothing_and_the_last_depth() -> None:
    curve = np.array([0.0, 0, 3, 0, 0, 0, 1, 2, 3, 4, 40])
    assert critical_layer(curve, "second_diff_abs") == 9
    assert critical_layer(curve, "second_diff_abs", exclude_last=True) == 2
    by_hand = np.array([0, 1, 1, 1, 0, 1 / 3, 1, 2, 3, 4])
    expected = 1 + int(np.argmax(np.abs(np.diff(by_hand, n=2))))
    # |second differences|: 1 at depth 1, 0, 1 at 3, 4/3 at 4.
    assert expected == 4
    assert critical_layer(curve, "second_diff_abs", smooth=3, exclude_last=True) == expected
    assert critical_layer(np.array([-1.0, -1, -1, 1]), "resolve", exclude_last=True) == 0


def test_critical_layer_errors() -> None:
    for curve, options in (
        ([1.0, 2], {}),
        ([1.0, 2, 3], {"exclude_last": True}),
        ([1.0, np.nan, 3], {}),
        ([1.0, np.inf, 3], {}),
        ([1.0, 2, 3], {"smooth": 2}),
        ([1.0, 2, 3], {"smooth": 0}),
    ):
        for method in METHODS:
            with pytest.raises(InputError, match="expected at least 3 depths, finite values and"):
                critical_layer(np.array(curve), method, **options)


def test_interval_of_identical_curves_has_no_width() -> None:
    for method, depth in zip(METHODS, layers(CARD), strict=True):
        assert turn(np.tile(CARD, (6, 1)), method) == (depth, depth, depth, 0)


def test_interval_covers_the_samples_turns() -> None:
    late = np.array([0.0, 0, 0, 0, 0, 0, 9])
    curves = np.stack([CARD] * 9 + [late] * 9)
    got = turn(curves, "second_diff_abs")
    assert (got.at, got.low, got.high) == (5, 5, 5)
    got = turn(np.stack([CARD, late] * 3), "second_diff_abs")
    assert (got.at, got.low, got.high) == (5, 3, 5)
    clustered = turn(curves, "second_diff_abs", [i // 3 for i in range(18)])
    assert (clustered.low, clustered.high) == (3, 5)


def test_interval_counts_replicates_without_a_turn() -> None:
    curves = np.concatenate([CARD[None], np.zeros((5, 7))])
    got = turn(curves, "second_diff_abs")
    assert (got.at, got.low, got.high) == (3, 3, 3)
    assert got.undefined == pytest.approx((5 / 6) ** 6, abs=0.04)
    alone = turn(CARD[None], "resolve")
    assert alone.at == 4
    assert alone.undefined == 1
    assert np.isnan([alone.low, alone.high]).all()


def test_where_a_token_and_a_transcript_settle() -> None:
    """The cards' examples: the last token for good (M-BT-2), near the last for good (M-BT-3)."""
    tokens = np.array([[9, 7, 3, 5, 5, 5], [9, 9, 5, 3, 5, 5]])[:, 1:]
    assert settling_depths(tokens == tokens[:, -1:]).tolist() == [2, 3]
    assert settling_depths(np.array([[5, 3, 5, 5]]) == 5).tolist() == [2]
    distances = np.array([[1, 0.4, 0.05, 0.2, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0.2]])
    found = settling_depths(distances <= 0.1)
    assert found[:2].tolist() == [4, 0]
    assert np.isnan(found[2])
