"""Held-out probes against Newton's method, and against leaks that grouping has to stop."""

import numpy as np
import pytest

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.probing import fit_probe, folds_of, held_out_probabilities

STRENGTH = 0.7


def newton(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Two labels: the weights of the second against the first, where both are ± half of them."""
    x1 = np.column_stack([x, np.ones(len(x))])
    # |W|² of two opposite halves is half the square of their difference.
    penalty = np.diag([*[0.5 / STRENGTH] * x.shape[1], 0.0])
    w = np.zeros(x1.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x1 @ w))
        slope = x1.T @ (p - y) + penalty @ w
        w -= np.linalg.solve((x1.T * (p * (1 - p))) @ x1 + penalty, slope)
    return w[:-1], float(w[-1])


def test_a_probe_is_the_optimum() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.integers(0, 2, 40)
    w, b = fit_probe(x, y, 2, strength=STRENGTH)
    expected, bias = newton(x, y)
    np.testing.assert_allclose(w[:, 1] - w[:, 0], expected, atol=1e-5)
    assert b[1] - b[0] == pytest.approx(bias, abs=1e-5)


def test_without_features_a_probe_knows_how_often_labels_come() -> None:
    y = np.array([0, 0, 0, 1, 2, 2])
    found = held_out_probabilities(
        np.zeros((6, 2)), y, ["a"] * 3 + ["b"] * 3, np.zeros((1, 2)), ["b"], seed=0
    )[0]
    # Trained on group a alone, in which there is one label.
    assert found[0, 0] > 0.99
    w, b = fit_probe(np.zeros((6, 2)), y, 3)
    p = np.exp(b) / np.exp(b).sum()
    np.testing.assert_allclose(p, [3 / 6, 1 / 6, 2 / 6], atol=1e-5)
    assert (w == 0).all()


def test_groups_are_never_on_both_sides() -> None:
    """Labels that hang on the speaker alone: a probe of speakers it knows is right, else not."""
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(40), 5)
    x = 3 * rng.normal(size=(40, 30))[speakers] + rng.normal(size=(200, 30))
    y = rng.integers(0, 2, 40)[speakers]
    each = [*range(200)]
    rates = [
        (held_out_probabilities(x, y, groups, x, groups, seed=0)[0].argmax(1) == y).mean()
        for groups in (each, speakers.tolist())
    ]
    assert rates[0] > 0.9
    assert rates[1] < 0.7


def test_other_states_are_read_by_probes_that_do_not_know_their_group() -> None:
    rng = np.random.default_rng(1)
    x, y, groups = rng.normal(size=(24, 3)), rng.integers(0, 3, 24), [*"abcdefgh"] * 3
    asked = rng.normal(size=(2, 3))
    found = held_out_probabilities(x, y, groups, asked, ["c", "f"], seed=0)[0]
    for row, group in enumerate(["ch", "af"]):  # of eight groups, the folds that begin anew
        train = np.array([one not in group for one in groups])
        mean, std = x[train].mean(0), x[train].std(0)
        w, b = fit_probe((x[train] - mean) / std, y[train], 3)
        scores = np.exp((asked[row] - mean) / std @ w + b)
        np.testing.assert_allclose(found[row], scores / scores.sum(), atol=1e-12)


def test_folds_and_refusals() -> None:
    assert folds_of([*"abca"]).tolist() == [0, 1, 2, 0]
    assert folds_of(range(12)).tolist() == [*range(5), *range(5), 0, 1]
    with pytest.raises(InputError, match="probing with 1 groups: expected at least two"):
        held_out_probabilities(
            np.ones((2, 1)), np.array([0, 1]), [*"aa"], np.ones((1, 1)), ["a"], seed=0
        )


def test_further_fits_draw_groups_with_replacement() -> None:
    rng = np.random.default_rng(2)
    x, y, groups = rng.normal(size=(30, 3)), rng.integers(0, 2, 30), [*"abcdefghij"] * 3
    found = held_out_probabilities(x, y, groups, x[:1], ["a"], seed=5, n_refits=2)
    assert found.shape == (3, 1, 2)
    drawn = np.random.default_rng([5, 0])
    others = [[i for i in range(30) if groups[i] == group] for group in "bcdeghij"]
    for fit in (1, 2):
        items = np.concatenate([others[i] for i in drawn.integers(0, 8, 8)])
        mean, std = x[items].mean(0), x[items].std(0)
        w, b = fit_probe((x[items] - mean) / std, y[items], 2)
        scores = np.exp((x[0] - mean) / std @ w + b)
        np.testing.assert_allclose(found[fit, 0], scores / scores.sum(), atol=1e-12)


def test_of_few_groups_single_items_are_drawn() -> None:
    """Else every fit of two groups, of which one is held out, would be the same."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 3)), rng.integers(0, 2, 30)
    found = held_out_probabilities(x, y, [*"ab"] * 15, x[:1], ["a"], seed=0, n_refits=5)
    assert len(np.unique(found[:, 0, 0])) == 6
