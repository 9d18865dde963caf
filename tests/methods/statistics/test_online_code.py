"""Description length: the card's numbers, and portions that no group is cut by."""

from itertools import pairwise

import numpy as np
import pytest

from hooked_alm.methods.statistics.online_code import code_length, online_code, portion_ends
from hooked_alm.methods.statistics.probing import code_bits, fit_probe, read_by_probe


def test_length_by_hand() -> None:
    """M-BT-6: 8 labels of 2, the first 2 without features, then p = 0.75: 4.4902 bits, 1.7816."""
    _, ends = portion_ends(range(8), 2, seed=0)
    assert ends == [2, 4, 8]
    found = code_length(ends[0], 2, np.full(6, -np.log2(0.75)))
    assert found.bits == pytest.approx(4.4902, abs=5e-5)
    assert found.compression == pytest.approx(1.7816, abs=5e-5)
    assert code_length(2, 2, np.ones(6)).compression == 1


def test_portions_end_with_whole_groups() -> None:
    groups = [f"g{i % 20}" for i in range(1000)]
    order, ends = portion_ends(groups, 2, seed=0)
    assert sorted(order) == [*range(1000)]
    assert ends == [50, 100, 150, 250, 500, 1000]  # of 2, 4, ..., 62.5, 125, 250, 500, 1000
    for first, last in pairwise([0, *ends]):
        inside = {groups[i] for i in order[first:last]}
        assert not inside & {groups[i] for i in [*order[:first], *order[last:]]}
    assert (order != portion_ends(groups, 2, seed=1)[0]).any()
    assert portion_ends(["a"] * 5, 2, seed=0)[1] == [5]


def test_every_portion_is_coded_by_those_before_it() -> None:
    rng = np.random.default_rng(1)
    y, groups = rng.integers(0, 3, 64), [*range(16)] * 4
    x = rng.normal(size=(64, 5)) + 2 * np.eye(5)[y]
    found = online_code(x, y, groups, strength=1, seed=0)
    order, ends = portion_ends(groups, 3, seed=0)
    bits = ends[0] * np.log2(3)
    for first, last in pairwise(ends):
        seen, coded = order[:first], order[first:last]
        p = read_by_probe(x[seen], y[seen], x[coded], 3, 1.0)
        bits += code_bits(p, y[coded], first).sum()
    assert found.bits == pytest.approx(bits)
    assert found.uniform_bits == pytest.approx(64 * np.log2(3))
    assert found.compression > 1.2
    noise = online_code(rng.normal(size=(64, 5)), y, groups, strength=1, seed=0)
    assert noise.compression < 1.1
    assert online_code(x[:4], y[:4], ["a"] * 4, strength=1, seed=0).compression == 1


def test_a_portion_is_read_by_the_probe_of_the_module() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(20, 2)), rng.integers(0, 2, 20)
    w, b = fit_probe((x - x.mean(0)) / x.std(0), y, 2)
    scores = np.exp((x[:1] - x.mean(0)) / x.std(0) @ w + b)
    np.testing.assert_allclose(read_by_probe(x, y, x[:1], 2, 1.0), scores / scores.sum())
