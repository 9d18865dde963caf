"""Items put together, one of each label, that are alike in a value."""

from itertools import combinations

import numpy as np

from hooked_alm.methods.statistics.matching import matched


def most_pairs(values: np.ndarray, labels: np.ndarray, width: float) -> int:
    """By trying every way."""
    first, other = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)

    def most(left: tuple[int, ...], right: frozenset[int]) -> int:
        if not left:
            return 0
        found = most(left[1:], right)
        for j in right:
            if abs(values[left[0]] - values[j]) <= width:
                found = max(found, 1 + most(left[1:], right - {j}))
        return found

    return most(tuple(first), frozenset(other.tolist()))


def test_as_many_as_can_be_are_put_together() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values, labels = rng.uniform(size=10), rng.integers(0, 2, 10)
        kept = matched(values, labels, 0.15)
        assert np.bincount(labels[kept], minlength=2).tolist() == [len(kept) / 2] * 2
        assert len(kept) == 2 * most_pairs(values, labels, 0.15)
        low, high = (np.sort(values[kept][labels[kept] == one]) for one in (0, 1))
        assert (np.abs(low - high) <= 0.15).all()
        assert kept.tolist() == sorted(kept)


def test_three_labels_are_matched_at_once() -> None:
    values = np.array([1.0, 1.1, 1.2, 5.0, 5.0, 9.0, 9.1, 9.2])
    labels = np.array([0, 1, 2, 0, 1, 0, 1, 2])
    assert matched(values, labels, 0.2).tolist() == [0, 1, 2, 5, 6, 7]
    assert matched(values, labels, 0.1).tolist() == []
    # No two are of one label.
    kept = matched(values, labels, 100.0)
    assert not any(labels[i] == labels[j] for i, j in combinations(kept[:3], 2))
    assert matched(np.zeros(0), np.zeros(0, np.int64), 1.0).tolist() == []
