"""Few latents that a label is read off, and latents without which it is not."""

import numpy as np
import pytest

from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary.k_sparse import RankedBy, k_sparse_probe, unlearn
from hooked_alm.methods.statistics.probing import grouped_probe, spread_folds

N, F = 80, 12


def items(
    informative: int = 1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[int], np.ndarray]:
    """Two labels that some features tell, each by itself; a group to every two items."""
    rng = np.random.default_rng(seed)
    labels = np.tile([0, 1], N // 2)
    x = rng.normal(size=(N, F))
    x[:, 5 : 5 + informative] = 8 * labels[:, None] + 0.1 * rng.normal(size=(N, informative))
    groups = np.repeat(np.arange(N // 2), 2).tolist()
    return x, labels, groups, spread_folds(labels, groups, 4)


def test_all_features_are_the_whole_probe() -> None:
    x, labels, groups, folds = items()
    found = k_sparse_probe(x, labels, groups, folds, [F])[0]
    p = grouped_probe(x, labels, groups, folds).probabilities
    assert np.array_equal(found, p.argmax(axis=1) == labels)


@pytest.mark.parametrize("by", ["mean_difference", "coefficient"])
def test_one_telling_feature_is_found(by: RankedBy) -> None:
    x, labels, groups, folds = items()
    found = k_sparse_probe(x, labels, groups, folds, [1, 4], by=by).mean(axis=1)
    assert found[0] == 1.0
    at_random = k_sparse_probe(x, labels, groups, folds, [1], by="random", seed=3).mean()
    assert at_random < 0.85


def test_unlearning_one_telling_feature() -> None:
    """From 1 to chance at k = 1; what is deleted at random is hardly ever that one."""
    x, labels, groups, folds = items()
    refit = unlearn(x, labels, groups, folds, [0, 1], how="refit").mean(axis=1)
    assert refit[0] == 1.0
    assert 0.3 < refit[1] < 0.7
    draws = [
        unlearn(x, labels, groups, folds, [1], how="refit", by="random", seed=s).mean()
        for s in range(6)
    ]
    assert np.mean(draws) > 0.85


def test_a_probe_that_learns_again_beats_a_frozen_one() -> None:
    """Where several features tell the label, and only the first are deleted."""
    x, labels, groups, folds = items(informative=4)
    kept = {how: unlearn(x, labels, groups, folds, [3], how=how).mean()  # type: ignore[arg-type]
            for how in ("refit", "frozen")}  # fmt: skip
    assert kept["refit"] == 1.0
    assert kept["frozen"] < 0.8


def test_ranks_are_those_of_the_training_items() -> None:
    """A feature that tells the label of one fold alone is not chosen to read that fold."""
    x, labels, groups, folds = items(informative=0)
    mine = folds == 0
    x[mine, 2] = 100.0 * labels[mine]
    found = k_sparse_probe(x, labels, groups, folds, [1])[0]
    assert found[mine].mean() < 0.8


def test_refused() -> None:
    x, labels, groups, folds = items()
    with pytest.raises(InputError, match=r"k=\[0, 13\], expected 1 to 12"):
        k_sparse_probe(x, labels, groups, folds, [0, 5, 13])
    with pytest.raises(InputError, match="got one label"):
        unlearn(x, 0 * labels, groups, folds, [1], how="refit")
