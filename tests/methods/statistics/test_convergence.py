"""Turning points and chance by hand, and chance against counting."""

from itertools import product

import numpy as np
import pytest

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.convergence import (
    agrees,
    chance_agreement,
    permuted_agreement,
    steepest_block,
)


@pytest.mark.parametrize("n_depths", [1, 2, 6, 12])
@pytest.mark.parametrize("tolerance", [0, 1, 2, 20])
def test_chance_is_counted(n_depths: int, tolerance: int) -> None:
    for n in (2, 3):
        every = [*product(range(n_depths), repeat=n)]
        hits = sum(max(one) - min(one) <= tolerance for one in every)
        assert chance_agreement(n_depths, tolerance, n) == pytest.approx(hits / len(every))


def test_chance_of_the_card() -> None:
    """(7 L - 6) / L³ within one: a sixth of encoders of six blocks, 4.5 % of twelve (C17)."""
    assert chance_agreement(6, 1) == pytest.approx(0.1667, abs=5e-5)
    assert chance_agreement(12, 1) == pytest.approx(0.0451, abs=5e-5)
    with pytest.raises(InputError, match="0 depths"):
        chance_agreement(0, 1)


def test_the_recorded_norms_jump_across_block_3() -> None:
    """Whisper-base, blocks 1 to 6, as seed 003 recorded them: 4.208 between depths 3 and 4."""
    norms = np.array([[741.56, 517.94, 510.16, 565.27, 2378.74, 2681.85, 3232.99]])
    assert norms[0, 4] / norms[0, 3] == pytest.approx(4.208, abs=5e-4)
    assert steepest_block(norms, "ratio").tolist() == [3]
    # Differences single out the same block here, and need not.
    curves = np.array([[1.0, 3.0, 6.0], [0.1, 0.2, 0.9], [np.nan, 1.0, 2.0]])
    assert steepest_block(curves, "ratio")[:2].tolist() == [0, 1]
    assert steepest_block(curves, "difference")[:2].tolist() == [1, 1]
    assert np.isnan(steepest_block(curves, "ratio")[2])
    with pytest.raises(InputError, match="got 1 depths"):
        steepest_block(curves[:, :1], "ratio")


def test_permuted_depths_keep_how_often_each_is_given() -> None:
    """Two measures that always go together agree by chance as often as their depths are alike."""
    rng = np.random.default_rng(0)
    one = rng.choice([2.0, 8.0], size=400)
    depths = np.stack([one, one])
    assert agrees(depths, 0).all()
    null = permuted_agreement(depths, 0, n=500, seed=1)
    p = (one == 2).mean()
    assert null.mean() == pytest.approx(p**2 + (1 - p) ** 2, abs=0.01)
    # What never changes cannot be dealt out otherwise.
    still = np.full((3, 50), 4.0)
    assert (permuted_agreement(still, 0, n=20, seed=1) == 1).all()
    assert not (permuted_agreement(np.stack([still[0], still[0] + 2]), 1, n=20, seed=1)).any()
