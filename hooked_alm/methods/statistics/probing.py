"""Held-out probes: what a linear reader of some states says of items that it was not trained on.

A probe is a multinomial logistic regression on standardised features (M-MP, M-BT-6). Of two ways to
hold items out, `held_out_probabilities` has one strength and asks what further fits would say;
`grouped_probe` finds the strength of every fold by folds within its training items.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from ...errors import InputError

MOST_FOLDS = 5
MIN_DRAWN = 5
"""Groups; of fewer, no draw says how others would have come out."""
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
INNER_FOLDS = 3
ROUGH = 1e-2
"""Precision that is enough to choose a strength."""
Fitted = tuple[Float[np.ndarray, "feature label"], Float[np.ndarray, " label"]]
"""Weights and biases of a probe."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What probes say of items that they were not trained on."""

    probabilities: Float[np.ndarray, "item label"]
    folds: Int[np.ndarray, " item"]
    """Items of a fold were read by one probe, trained on all others."""
    strengths: tuple[float, ...]
    """Of the probe of each fold."""


def fit_probe(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    n_labels: int,
    *,
    strength: int | float = 1,
    start: Fitted | None = None,
    precision: float = 1e-6,
) -> Fitted:
    """Weights and biases that minimise the summed cross-entropy and ``|W|² / (2 strength)``.

    The objective is scikit-learn's, whose C is ``strength``; biases are not penalised.

    Args:
        features: best standardised, since the penalty is one for all.
        labels: from 0.
        n_labels: number of labels, of which some may have no item.
        strength: how closely the items are followed.
        start: weights and biases to begin with; None is zeros.
        precision: of the gradient, at which the search ends.
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

    begin = np.zeros((x.shape[1], n_labels)) if start is None else np.vstack(start)
    found = minimize(
        loss, begin.ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": 3000, "ftol": 0.1 * precision**2, "gtol": precision},
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
            train, read = standardised(features[items], asked[there])
            w, b = fit_probe(train, labels[items], n_labels, strength=strength)
            found[fit, there] = softmax(read @ w + b, axis=1)
    return found


def standardised(
    train: Float[np.ndarray, "item feature"], asked: Float[np.ndarray, "asked feature"]
) -> tuple[Float[np.ndarray, "item feature"], Float[np.ndarray, "asked feature"]]:
    """Both by the means and spreads of the first alone."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    std[std < 1e-12 * max(float(std.max()), 1e-300)] = 1.0
    return (train - mean) / std, (asked - mean) / std


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


# --- Folds within folds


def grouped_probe(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    groups: Sequence[Hashable],
    folds: Int[np.ndarray, " item"],
    *,
    strengths: Sequence[int | float] | None = None,
) -> HeldOut:
    """Reads every item by a probe of the other folds' items.

    Args:
        features: of the items.
        labels: of these, from 0.
        groups: of these; the folds within a probe's items keep them together, as ``folds`` should.
        folds: of the items, from 0; see `spread_folds`.
        strengths: of the probe of each fold, such as those of an earlier call; None chooses each
            from `STRENGTHS` by folds within its training items (`best_strength`).

    Raises:
        InputError: one label, or a fold without whose items a label is not there.
    """
    n_labels, found = int(labels.max()) + 1, np.empty((len(labels), int(labels.max()) + 1))
    check_folds(labels, folds)
    chosen = []
    for fold in range(int(folds.max()) + 1):
        train, there = np.flatnonzero(folds != fold), folds == fold
        if strengths is None:
            own = [groups[i] for i in train.tolist()]
            strength = best_strength(features[train], labels[train], own, n_labels)
        else:
            strength = float(strengths[fold])
        found[there] = read_by_probe(
            features[train], labels[train], features[there], n_labels, strength
        )
        chosen.append(strength)
    return HeldOut(found, folds, tuple(chosen))


def check_folds(labels: Int[np.ndarray, " item"], folds: Int[np.ndarray, " item"]) -> None:
    """Refuse what cannot be learnt from some folds and judged on another.

    Raises:
        InputError: one label, or a label that a probe would never have seen.
    """
    if len({*labels.tolist()}) < 2:
        raise InputError(
            f"probing {len(labels)} items: got one label, expected two or more. There is nothing "
            "to tell apart."
        )
    for fold in range(int(folds.max()) + 1):
        if unseen := sorted({*labels.tolist()} - {*labels[folds != fold].tolist()}):
            raise InputError(
                f"probing {len(labels)} items: all of the labels {', '.join(map(str, unseen))} are "
                f"in fold {fold}, expected each in two groups or more. Leave these labels out, or "
                "group by another column."
            )


def spread_folds(
    labels: Int[np.ndarray, " item"], groups: Sequence[Hashable], n_folds: int
) -> Int[np.ndarray, " item"]:
    """The fold of every item: groups stay together, and those that share labels take turns.

    Of fewer groups than folds, each is a fold. Groups of the label that fewest of them have go
    first, so that it is in as many folds as can be.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    has = {group: {*labels[items].tolist()} for group, items in members.items()}
    spread = Counter(label for some in has.values() for label in some)
    rarest = sorted(spread, key=lambda label: (spread[label], label))
    order = sorted(members, key=lambda group: [label not in has[group] for label in rarest])
    rank = {group: i % min(n_folds, len(members)) for i, group in enumerate(order)}
    return np.array([rank[group] for group in groups], np.int64)


def best_strength(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    groups: Sequence[Hashable],
    n_labels: int,
) -> float:
    """The strength under which probes of some groups need fewest bits for the labels of others.

    One group leaves nothing to judge by, and has 1.
    """
    folds = spread_folds(labels, groups, INNER_FOLDS)
    if not folds.max():
        return 1.0
    bits = np.zeros(len(STRENGTHS))
    for fold in range(int(folds.max()) + 1):
        is_train = folds != fold
        train, asked = _fewer_features(*standardised(features[is_train], features[~is_train]))
        fitted: Fitted | None = None
        for i, strength in enumerate(STRENGTHS):
            w, b = fitted = fit_probe(
                train, labels[is_train], n_labels, strength=strength, start=fitted,
                precision=ROUGH,
            )  # fmt: skip
            p = softmax(asked @ w + b, axis=1)
            bits[i] += code_bits(p, labels[~is_train], len(train)).sum()
    return STRENGTHS[int(bits.argmin())]


def read_by_probe(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    asked: Float[np.ndarray, "asked feature"],
    n_labels: int,
    strength: float,
) -> Float[np.ndarray, "asked label"]:
    """What a probe of some items says of others."""
    train, read = _fewer_features(*standardised(features, asked))
    w, b = fit_probe(train, labels, n_labels, strength=strength)
    return np.asarray(softmax(read @ w + b, axis=1))


def code_bits(
    probabilities: Float[np.ndarray, "item label"], labels: Int[np.ndarray, " item"], n_seen: int
) -> Float[np.ndarray, " item"]:
    """Bits of every label, coded by a probe that was trained on ``n_seen`` items.

    As if one more had been seen whose label was any: (n p + 1/C) / (n + 1). A label that no item
    had, to which a probe gives nothing, can then be coded, too.
    """
    n_labels = probabilities.shape[1]
    p = probabilities[np.arange(len(labels)), labels]
    return np.asarray(-np.log2((n_seen * p + 1 / n_labels) / (n_seen + 1)))


def _fewer_features(
    train: Float[np.ndarray, "item feature"], asked: Float[np.ndarray, "asked feature"]
) -> tuple[Float[np.ndarray, "item direction"], Float[np.ndarray, "asked direction"]]:
    """Both along as many directions as there are items to train on, where features are more.

    The penalty is the same along all, so that the optimum has no part outside of them.
    """
    if train.shape[1] <= len(train):
        return train, asked
    directions, along = np.linalg.qr(train.T)
    return along.T, asked @ directions
