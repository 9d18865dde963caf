"""Held-out probes: what a linear reader of some states says of items that it was not trained on.

A probe is a multinomial logistic regression on standardised features (M-MP).
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from ...errors import InputError

MOST_FOLDS = 5
MIN_DRAWN = 5
"""Groups; of fewer, no draw says how others would have come out."""


def fit_probe(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    n_labels: int,
    *,
    strength: int | float = 1,
) -> tuple[Float[np.ndarray, "feature label"], Float[np.ndarray, " label"]]:
    """Weights and biases that minimise the summed cross-entropy and ``|W|² / (2 strength)``.

    The objective is scikit-learn's, whose C is ``strength``; biases are not penalised.

    Args:
        features: best standardised, since the penalty is one for all.
        labels: from 0.
        n_labels: number of labels, of which some may have no item.
        strength: how closely the items are followed.
    """
    x = np.column_stack([features, np.ones(len(features))])
    one_hot = np.eye(n_labels)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(x.shape[1], n_labels)
        log_p = log_softmax(x @ w, axis=1)
        slope = x.T @ (np.exp(log_p) - one_hot)
        slope[:-1] += w[:-1] / strength
        penalty = float((w[:-1] ** 2).sum()) / (2 * strength)
        return penalty - float((one_hot * log_p).sum()), slope.ravel()

    found = minimize(
        loss, np.zeros(x.shape[1] * n_labels), jac=True, method="L-BFGS-B",
        options={"maxiter": 1000, "ftol": 1e-10, "gtol": 1e-5},
    )  # fmt: skip
    w = found.x.reshape(x.shape[1], n_labels)
    return w[:-1], w[-1]


def folds_of(groups: Sequence[Hashable]) -> Int[np.ndarray, " item"]:
    """The fold of every item: groups stay together, and take turns in their order."""
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return np.array([number[group] % MOST_FOLDS for group in groups])


def held_out_probabilities(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    groups: Sequence[Hashable],
    asked: Float[np.ndarray, "asked feature"],
    asked_groups: Sequence[Hashable],
    *,
    seed: int,
    n_refits: int = 0,
    strength: int | float = 1,
) -> Float[np.ndarray, "fit asked label"]:
    """What probes say of states whose group they were not trained on.

    The first fit is on all other groups; each further one on as many, drawn from them with
    replacement, so that what fits disagree on, the items do not settle.

    Args:
        features: of the items that probes are trained on.
        labels: of these, from 0.
        groups: of these; items of a group are never on both sides.
        asked: states that are read.
        asked_groups: of these, each among ``groups``.
        seed: of the draws.
        n_refits: number of further fits.
        strength: see `fit_probe`.

    Raises:
        InputError: fewer than two groups, or a group that no item has.
    """
    n_labels, known = int(labels.max()) + 1, {*groups}
    if len(known) < 2 or {*asked_groups} - known:
        raise InputError(
            f"probing with {len(known)} groups: expected at least two, and states of these groups "
            "alone. Name another column for the groups."
        )
    folds = folds_of(groups)
    fold_of = dict(zip(groups, folds.tolist(), strict=True))
    asked_folds = np.array([fold_of[group] for group in asked_groups])
    found = np.empty((1 + n_refits, len(asked), n_labels))
    for fold in np.unique(folds):
        others, there = np.flatnonzero(folds != fold), asked_folds == fold
        for fit, items in enumerate(_draws(others, groups, [seed, int(fold)], n_refits)):
            train = features[items]
            mean, std = train.mean(axis=0), train.std(axis=0)
            std[std < 1e-12 * max(float(std.max()), 1e-300)] = 1.0
            w, b = fit_probe((train - mean) / std, labels[items], n_labels, strength=strength)
            found[fit, there] = softmax((asked[there] - mean) / std @ w + b, axis=1)
    return found


def _draws(
    items: Int[np.ndarray, " item"], groups: Sequence[Hashable], seed: list[int], n: int
) -> Iterator[Int[np.ndarray, " drawn"]]:
    """The items; then those of groups, or of too few groups single ones, drawn with replacement."""
    yield items
    by_group: dict[Hashable, list[int]] = {}
    for item in items.tolist():
        by_group.setdefault(groups[item], []).append(item)
    is_few = len(by_group) < MIN_DRAWN
    every = [[item] for item in items.tolist()] if is_few else [*by_group.values()]
    rng = np.random.default_rng(seed)
    for _ in range(n):
        drawn = rng.integers(0, len(every), len(every))
        yield np.concatenate([every[i] for i in drawn])
