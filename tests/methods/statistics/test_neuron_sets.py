"""Sets of neurons: overlap, blocks and controls against numbers by hand."""

import numpy as np
import pytest
from scipy import stats

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.class_neurons import Neuron
from hooked_alm.methods.statistics.neuron_sets import (
    NeuronControl,
    blocks_of,
    jaccard,
    jaccard_by_chance,
    neurons_like,
    overlap,
    specificity,
    spread_over_blocks,
)


def test_specificity_by_hand() -> None:
    found = specificity(np.array([[-0.4, -0.1], [0.0, -0.3]]))
    assert found == pytest.approx((-0.35, -0.05))
    assert found.difference == pytest.approx(-0.30)
    assert specificity(np.zeros((3, 3))) == (0, 0)
    assert np.isnan(specificity(np.array([[-0.2]])).other)


def test_jaccard_of_random_sets() -> None:
    """M-ESN-6: rate .01 gives .00503; drawn sets agree."""
    assert jaccard_by_chance(0.01) == pytest.approx(0.00503, abs=5e-6)
    rng = np.random.default_rng(0)
    sets = [[(0, int(n)) for n in rng.permutation(2000)[:400]] for _ in range(60)]
    found = [jaccard(a, b) for a, b in zip(sets[::2], sets[1::2], strict=True)]
    assert np.mean(found) == pytest.approx(jaccard_by_chance(0.2), abs=0.005)
    assert jaccard([(0, 1), (0, 2)], [(0, 2), (0, 3)]) == pytest.approx(1 / 3)
    assert np.isnan(jaccard([], []))


def test_overlap_by_chance() -> None:
    """Two sets of 26 of 36,864 share .0183."""
    two = [(0, n) for n in range(26)], [(1, n) for n in range(26)]
    found = overlap(*two, 36_864)
    assert found.expected == pytest.approx(0.0183, abs=5e-5)
    assert (found.shared, found.p) == (0, pytest.approx(1.0))
    # Two of three balls of ten, drawn twice: C(3, 2) C(7, 1) / C(10, 3), and all three.
    a: list[Neuron] = [(0, 0), (0, 1), (0, 2)]
    assert overlap(a, [(0, 1), (0, 2), (0, 9)], 10).p == pytest.approx((3 * 7 + 1) / 120)


def test_blocks_against_nulls() -> None:
    counts = blocks_of([(0, 1), (0, 2), (0, 3), (2, 1)], 4)
    assert counts.tolist() == [3, 0, 1, 0]
    found = spread_over_blocks(counts, np.ones(4))
    assert found.statistic == pytest.approx((4 + 1 + 0 + 1) / 1)
    # With counts that are large, the draws agree with the chi-squared distribution.
    many = np.array([130, 90, 110, 70])
    drawn = spread_over_blocks(many, np.ones(4), n_draws=20_000)
    expected = stats.chisquare(many)
    assert drawn.statistic == pytest.approx(expected.statistic)
    assert drawn.p == pytest.approx(expected.pvalue, abs=2e-4)
    # A null that says where they are is no surprise; one that rules a block out is.
    assert spread_over_blocks(many, many.astype(float)).p == 1
    assert spread_over_blocks(many, np.array([1.0, 1, 1, 0])).p < 0.001
    assert np.isnan(spread_over_blocks(np.zeros(4, int), np.ones(4)).p)


@pytest.mark.parametrize("kind", ["random", "layer", "magnitude"])
def test_neurons_alike(kind: NeuronControl) -> None:
    rng = np.random.default_rng(0)
    magnitude = rng.lognormal(size=(4, 50))
    chosen = [(1, int(n)) for n in magnitude[1].argsort()[-6:]] + [(3, 0)]
    without = [(1, 2), (2, 2)]
    found = [neurons_like(kind, chosen, without, magnitude, np.random.default_rng(s))
             for s in range(40)]  # fmt: skip
    for one in found:
        assert len({*one}) == len(chosen)
        assert not {*one} & {*chosen, *without}
    blocks = np.array([blocks_of(one, 4) for one in found])
    strengths = np.array([[magnitude[at] for at in one] for one in found])
    strong = [magnitude[at] for at in chosen]
    if kind == "layer":
        assert (blocks == blocks_of(chosen, 4)).all()
    else:
        assert (blocks != blocks_of(chosen, 4)).any()
    is_near = np.mean(strengths[:, :6]) > 0.6 * np.mean(strong[:6])
    assert is_near == (kind == "magnitude")


def test_too_few_are_left() -> None:
    for kind in ("random", "layer", "magnitude"):
        with pytest.raises(InputError, match=f"drawing 2 neurons alike in {kind}: got 1"):
            neurons_like(
                kind, [(0, 0), (0, 1)], [], np.ones((1, 3)), np.random.default_rng(0)
            )  # fmt: skip
