"""Selectivity: what a probe memorises, and what it cannot."""

import numpy as np
import pytest

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.selectivity import (
    SelectiveHits,
    control_labels,
    selective_hits,
    type_folds,
)

TYPES = [f"speaker {i % 6}, text {i // 6 % 5}" for i in range(120)]
"""30 types with four items each."""


def test_selectivity_is_a_difference_of_accuracies() -> None:
    """M-BT-6: 0.95 − 0.62 = 0.33."""
    label, control = (np.arange(100) < n for n in (95, 62))
    assert SelectiveHits(label, control).selectivity == pytest.approx(0.33)


def test_control_labels_are_of_types() -> None:
    labels = np.arange(120) % 3
    found = control_labels(labels, TYPES, seed=0)
    of_type = {*zip(TYPES, found.tolist(), strict=True)}
    assert len(of_type) == 30
    assert {*found} == {0, 1, 2}
    assert (found == control_labels(labels, TYPES, seed=0)).all()
    assert (found != control_labels(labels, TYPES, seed=1)).any()
    with pytest.raises(InputError, match="a type of its own for each"):
        control_labels(labels, [*range(120)], seed=0)


def test_every_type_is_on_both_sides_of_every_fold() -> None:
    folds = type_folds(TYPES, 3, seed=0)
    for fold in range(3):
        assert {TYPES[i] for i in np.flatnonzero(folds != fold)} == {*TYPES}
        assert (folds == fold).sum() == 40
    # In an order that is drawn: not by place, along which labels may change.
    places = [[folds[i] for i in range(120) if TYPES[i] == one] for one in {*TYPES}]
    assert len({tuple(one) for one in places}) > 3
    assert {*type_folds(["a", "a", "b"], 5, seed=0)} == {0, 1}


def test_a_probe_that_tells_types_apart_is_not_selective() -> None:
    rng = np.random.default_rng(0)
    number = {one: i for i, one in enumerate(dict.fromkeys(TYPES))}
    of_type = 3 * rng.normal(size=(30, 40))[[number[one] for one in TYPES]]
    x, labels = of_type + rng.normal(size=(120, 40)), rng.permutation(np.arange(120) % 3)

    def found(features: np.ndarray, labels: np.ndarray) -> SelectiveHits:
        return selective_hits(features, labels, TYPES, n_folds=4, strength=1, seed=0)

    memorised = found(x, control_labels(labels, TYPES, seed=7))
    assert memorised.label.mean() > 0.9
    assert memorised.control.mean() > 0.9
    heard = found(rng.normal(size=(120, 40)) + 4 * np.eye(40)[labels], labels)
    assert heard.selectivity > 0.4
