"""Latents of a domain: the bounds, by hand, and what chance gives."""

import numpy as np
import pytest

from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary.specialisation import specialisation, specialised_by_chance


def clips(*on: tuple[int, int], n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A latent for each pair: in how many clips of either domain it is active."""
    active = np.zeros((2 * n, len(on)), bool)
    for latent, (first, second) in enumerate(on):
        active[:first, latent] = True
        active[n : n + second, latent] = True
    return active, np.repeat([0, 1], n)


def test_nine_of_ten_clips_are_enough_and_eight_are_not() -> None:
    found = specialisation(*clips((9, 1), (8, 2), (9, 0), (0, 10), (1, 20), (0, 0)))
    assert found.domain.tolist() == [0, -1, -1, 1, 1, -1]
    assert found.n_clips.tolist() == [10, 10, 9, 10, 21, 0]
    np.testing.assert_allclose(found.share[:2], [[0.9, 0.1], [0.8, 0.2]])
    assert np.isnan(found.share[5]).all()
    lax = specialisation(*clips((8, 2), (9, 0)), share=0.8, min_clips=9)
    assert lax.domain.tolist() == [0, 0]


def test_domains_of_other_sizes_are_no_excuse() -> None:
    """A latent that is always active is of the domain that has 90 % of the clips, and by chance."""
    active, domains = np.ones((20, 1), bool), np.repeat([0, 1], [18, 2])
    assert specialisation(active, domains).domain.tolist() == [0]
    assert specialised_by_chance(active, domains, n_draws=5, seed=0).tolist() == [[1, 0]] * 5


def test_chance() -> None:
    active, domains = clips(*[(15, 0)] * 6)
    assert (specialisation(active, domains).domain == 0).all()
    assert specialised_by_chance(active, domains, n_draws=50, seed=1).sum(1).mean() < 0.1


def test_refused() -> None:
    active, domains = clips((9, 1))
    with pytest.raises(InputError, match="clips of 1 domain, expected two or more"):
        specialisation(active, np.zeros(80, int))
    with pytest.raises(InputError, match=r"share=0\.5"):
        specialisation(active, domains, share=0.5)
