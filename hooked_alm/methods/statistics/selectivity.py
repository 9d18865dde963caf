"""Selectivity: how much better a probe reads its labels than labels it could only memorise.

Control labels are a fixed random function of an item's type, such as its speaker and text. A probe
that reads them has told the types apart; what it reads of its own labels beyond that is not so
explained.

Source: Hewitt and Liang 2019 (arXiv 1909.03368); M-BT-6.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ...errors import InputError
from .probing import read_by_probe


class SelectiveHits(NamedTuple):
    """Which items probes read rightly, in folds that have every type on both sides."""

    label: Bool[np.ndarray, " item"]
    control: Bool[np.ndarray, " item"]

    @property
    def selectivity(self) -> float:
        """Accuracy of the labels minus that of the control labels."""
        return float(self.label.mean() - self.control.mean())


def control_labels(
    labels: Int[np.ndarray, " item"], types: Sequence[Hashable], *, seed: int
) -> Int[np.ndarray, " item"]:
    """A label for every type, each that of an item drawn at random.

    Raises:
        InputError: no type has two items; a probe cannot memorise what it never meets again.
    """
    if max(Counter(types).values()) < 2:
        raise InputError(
            f"drawing control labels of {len(labels)} items: got a type of its own for each, "
            "expected types that several share. Labels drawn item by item can never be read."
        )
    drawn = np.random.default_rng(seed).choice(labels, len({*types}))
    own = dict(zip(dict.fromkeys(types), drawn.tolist(), strict=True))
    return np.array([own[one] for one in types], np.int64)


def type_folds(types: Sequence[Hashable], n_folds: int, *, seed: int) -> Int[np.ndarray, " item"]:
    """Folds in which the items of a type take turns, in an order that is drawn."""
    folds, met = np.zeros(len(types), np.int64), Counter[Hashable]()
    first = {one: number for number, one in enumerate(dict.fromkeys(types))}
    for i in np.random.default_rng(seed).permutation(len(types)).tolist():
        folds[i] = (first[types[i]] + met[types[i]]) % n_folds
        met[types[i]] += 1
    return np.unique(folds, return_inverse=True)[1].astype(np.int64)


def selective_hits(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    types: Sequence[Hashable],
    *,
    n_folds: int,
    strength: int | float,
    seed: int,
) -> SelectiveHits:
    """What one kind of probe reads of labels, and of control labels, in the same folds.

    Args:
        features: of the items.
        labels: of these, from 0.
        types: of these.
        n_folds: see `type_folds`.
        strength: of all probes.
        seed: of the folds and of the control labels.

    Raises:
        InputError: see `control_labels`.
    """
    control, folds = control_labels(labels, types, seed=seed), type_folds(types, n_folds, seed=seed)
    n_labels, hits = int(labels.max()) + 1, []
    for codes in (labels, control):
        said = np.empty_like(codes)
        for fold in range(int(folds.max()) + 1):
            train, there = folds != fold, folds == fold
            p = read_by_probe(
                features[train], codes[train], features[there], n_labels, float(strength)
            )
            said[there] = p.argmax(axis=1)
        hits.append(said == codes)
    return SelectiveHits(*hits)
