"""How few latents a label can be read off, and how many have to go until it cannot."""

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ...errors import InputError
from ..statistics.probing import best_strength, check_folds, fit_probe, read_by_probe

RankedBy = Literal["mean_difference", "coefficient", "random"]
"""How latents are ranked on the items that a probe learns from: by the difference between the
labels' means, by the length of their weights in a probe of all, or not at all, which is the null.
"""
Deletion = Literal["refit", "frozen"]
"""Whether a probe learns again once latents are gone, or the one that knew them reads on."""
ReadItems = Bool[np.ndarray, "k item"]
"""Whether the label of an item, which the probe was not trained on, is read."""


class _Fold(NamedTuple):
    """Items that a probe learns from, and those that it reads."""

    train: Int[np.ndarray, " learnt"]
    asked: Int[np.ndarray, " read"]
    strength: float
    order: Int[np.ndarray, " feature"]
    """Features, the most telling first."""


def k_sparse_probe(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    groups: Sequence[Hashable],
    folds: Int[np.ndarray, " item"],
    ks: Sequence[int],
    *,
    by: RankedBy = "mean_difference",
    seed: int = 0,
) -> ReadItems:
    """What probes of the first k features read of each item.

    Source: Gurnee et al. 2023 (arXiv 2305.01610), section 3; M-SAE-4.

    Args:
        features: of the items: means or largest values over a clip.
        labels: of these, from 0.
        groups: what folds within a probe's items keep together.
        folds: of the items, from 0; see ``spread_folds``.
        ks: numbers of features.
        by: how these are ranked, on the items that the probe learns from alone.
        seed: of the ranking that is none.

    Raises:
        InputError: numbers of features that there are not, or folds that cannot be learnt.
    """
    _check(features, labels, folds, ks, lowest=1)
    hits = np.zeros((len(ks), len(labels)), bool)
    for fold in _folds(features, labels, groups, folds, by, seed):
        for row, k in enumerate(ks):
            kept = fold.order[:k]
            p = read_by_probe(
                features[np.ix_(fold.train, kept)], labels[fold.train],
                features[np.ix_(fold.asked, kept)], int(labels.max()) + 1, fold.strength,
            )  # fmt: skip
            hits[row, fold.asked] = p.argmax(axis=1) == labels[fold.asked]
    return hits


def unlearn(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    groups: Sequence[Hashable],
    folds: Int[np.ndarray, " item"],
    ks: Sequence[int],
    *,
    how: Deletion,
    by: RankedBy = "mean_difference",
    seed: int = 0,
) -> ReadItems:
    """What is read of each item once the first k features are zero.

    A frozen probe stumbles over what it knew; one that learns again shows what is left.

    Args:
        features: as in ``k_sparse_probe``.
        labels: likewise.
        groups: likewise.
        folds: likewise.
        ks: numbers of features that go; 0 is the whole probe.
        how: see ``Deletion``.
        by: how features are ranked.
        seed: of the ranking that is none.

    Raises:
        InputError: as ``k_sparse_probe``.
    """
    _check(features, labels, folds, ks, lowest=0)
    n_labels, hits = int(labels.max()) + 1, np.zeros((len(ks), len(labels)), bool)
    for fold in _folds(features, labels, groups, folds, by, seed):
        for row, k in enumerate(ks):
            left = features.copy()
            left[:, fold.order[:k]] = 0.0
            learnt = left if how == "refit" else features
            p = read_by_probe(
                learnt[fold.train], labels[fold.train], left[fold.asked], n_labels, fold.strength
            )
            hits[row, fold.asked] = p.argmax(axis=1) == labels[fold.asked]
    return hits


def _check(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    folds: Int[np.ndarray, " item"],
    ks: Sequence[int],
    lowest: int,
) -> None:
    check_folds(labels, folds)
    if wrong := [k for k in ks if not lowest <= k <= features.shape[1]]:
        raise InputError(
            f"probing with some of the features: got k={wrong}, expected {lowest} to "
            f"{features.shape[1]}."
        )


def _folds(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    groups: Sequence[Hashable],
    folds: Int[np.ndarray, " item"],
    by: RankedBy,
    seed: int,
) -> list[_Fold]:
    n_labels, found = int(labels.max()) + 1, []
    for number in range(int(folds.max()) + 1):
        train, asked = np.flatnonzero(folds != number), np.flatnonzero(folds == number)
        x, y = features[train], labels[train]
        strength = best_strength(x, y, [groups[i] for i in train.tolist()], n_labels)
        scale = x.std(axis=0)
        x = (x - x.mean(axis=0)) / np.where(scale > 0, scale, 1.0)
        if by == "random":
            order = np.random.default_rng([seed, number]).permutation(x.shape[1])
        elif by == "coefficient":
            weights, _ = fit_probe(x, y, n_labels, strength=strength)
            order = np.argsort(-np.linalg.norm(weights, axis=1), kind="stable")
        else:
            means = np.stack([x[y == label].mean(axis=0) for label in np.unique(y)])
            order = np.argsort(-np.ptp(means, axis=0), kind="stable")
        found.append(_Fold(train, asked, strength, order))
    return found
