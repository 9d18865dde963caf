"""Codes and factors one to one, or not: by hand, planted, and of noise."""

import numpy as np
import pytest

from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary.disentanglement import (
    code_shares,
    completeness,
    disentanglement,
    mean_disentanglement,
    read_factors,
    varying,
)

N, N_CODES = 240, 16
FOLDS = np.arange(N) % 6


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes of which the first three are the factors, with some noise on these."""
    rng = np.random.default_rng(seed)
    codes = rng.normal(size=(N, N_CODES))
    return codes, codes[:, :3] + 0.1 * rng.normal(size=(N, 3))


def rotation(seed: int = 1) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(N_CODES, N_CODES)))[0]


def test_one_to_one_by_hand() -> None:
    """The reference's mean over codes of rho D would be a half here (C40)."""
    weights = np.eye(2)
    assert disentanglement(weights).tolist() == [1, 1]
    assert code_shares(weights).tolist() == [0.5, 0.5]
    assert mean_disentanglement(weights) == 1
    assert np.mean(code_shares(weights) * disentanglement(weights)) == 0.5
    assert completeness(weights).tolist() == [1, 1]


def test_entropies_by_hand() -> None:
    weights = np.array([[3.0, 1.0], [0.0, 4.0], [0.0, 0.0]])
    h = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert disentanglement(weights)[:2] == pytest.approx([1 - h / np.log(2), 1])
    assert np.isnan(disentanglement(weights)[2])
    assert mean_disentanglement(weights) == pytest.approx(0.5 * (1 - h / np.log(2)) + 0.5)
    h = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    assert completeness(weights) == pytest.approx([1, 1 - h / np.log(3)])


def test_uniform_is_nothing_held_apart() -> None:
    weights = np.full((4, 3), 0.2)
    assert mean_disentanglement(weights) == pytest.approx(0)
    assert completeness(weights) == pytest.approx([0, 0, 0])


def test_what_is_not_defined() -> None:
    assert np.isnan(mean_disentanglement(np.zeros((3, 2))))
    assert np.isnan(completeness(np.zeros((3, 2)))).all()
    assert np.isnan(mean_disentanglement(np.ones((3, 1))))  # one factor
    assert np.isnan(completeness(np.ones((1, 2)))).all()  # one code


def test_planted_codes_are_complete_and_a_rotated_basis_is_not() -> None:
    """What is read does not change, in how many codes it is does."""
    codes, factors = planted()
    found = read_factors(codes, factors, FOLDS, alpha=0.05)
    assert completeness(found.weights) == pytest.approx([1, 1, 1])
    assert mean_disentanglement(found.weights) == pytest.approx(1)
    assert (found.r2 > 0.95).all()
    turned = read_factors(codes @ rotation(), factors, FOLDS, alpha=0.05)
    assert (completeness(turned.weights) < 0.4).all()
    assert mean_disentanglement(turned.weights) < 0.6
    assert (turned.r2 > 0.85).all()


def test_lassos_meet_their_conditions() -> None:
    """Subgradients of |y - Xw|² / 2n + alpha |w|, by hand, of all items and without a fold."""
    codes, factors = planted()
    found = read_factors(codes @ rotation(), factors, FOLDS)
    for weights, kept in ((found.weights, FOLDS >= 0), (found.weights_without[2], FOLDS != 2)):
        x, y = (codes @ rotation())[kept], factors[kept]
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean(0)) / y.std(0)
        for j in range(3):
            w = np.linalg.lstsq(x, y[:, j], rcond=None)[0]
            w = weights[:, j] * np.sign(w)
            slope = x.T @ (y[:, j] - x @ w) / len(x)
            is_on = weights[:, j] > 0
            np.testing.assert_allclose(slope[is_on], 0.1 * np.sign(w[is_on]), atol=2e-3)
            assert (np.abs(slope[~is_on]) <= 0.1 + 2e-3).all()


def test_errors_are_of_the_other_folds_lassos() -> None:
    from sklearn.linear_model import Lasso

    codes, factors = planted()
    factors[FOLDS == 3, 0] *= 2
    found = read_factors(codes, factors, FOLDS)
    train, asked = FOLDS != 4, FOLDS == 4
    mean, spread = codes[train].mean(0), codes[train].std(0)
    y = (factors[:, 1] - factors[train, 1].mean()) / factors[train, 1].std()
    lasso = Lasso(alpha=0.1, max_iter=10_000).fit((codes[train] - mean) / spread, y[train])
    said = lasso.predict((codes[asked] - mean) / spread)
    np.testing.assert_allclose(found.errors[asked, 1], (y[asked] - said) ** 2)
    np.testing.assert_allclose(found.null_errors[asked, 1], y[asked] ** 2)
    expected = 1 - found.errors[:, 1].sum() / found.null_errors[:, 1].sum()
    assert found.r2[1] == pytest.approx(expected)


def test_noise_is_read_where_it_is_learnt_and_nowhere_else() -> None:
    """200 items of 2048 codes (C44): seeds of methods_003 are not known, its sizes are."""
    rng = np.random.default_rng(0)
    codes, factor = rng.normal(size=(400, 2048)), rng.normal(size=(400, 1))
    halves = np.repeat([0, 1], 200)
    found = read_factors(codes, factor, halves)
    assert found.r2[0] < 0
    assert ((found.weights_without > 0).sum(axis=1) > 50).all()
    learnt = read_factors(codes[:200], factor[:200], halves[::2])
    assert learnt.r2_learnt[0] > 0.45
    assert not found.unfinished.any()


def test_items_without_a_factor_are_left_out() -> None:
    codes, factors = planted()
    factors[5, 0] = np.nan
    found = read_factors(codes, factors, FOLDS)
    assert np.isnan(found.errors[5]).tolist() == [True, False, False]
    without = read_factors(np.delete(codes, 5, 0), np.delete(factors, 5, 0), np.delete(FOLDS, 5))
    np.testing.assert_allclose(found.weights[:, 0], without.weights[:, 0])
    assert found.r2[0] == pytest.approx(without.r2[0])


def test_refused() -> None:
    codes, factors = planted()
    with pytest.raises(InputError, match="got one fold"):
        read_factors(codes, factors, np.zeros(N, np.int64))
    factors[FOLDS != 3, 1] = 7.0
    assert varying(factors, FOLDS).tolist() == [True, False, True]
    with pytest.raises(InputError, match=r"factors \[1\] are the same in all items"):
        read_factors(codes, factors, FOLDS)
