"""How well held-out probes tell labels apart: accuracy, macro-F1, and area under the curve."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata


class ProbeScores(NamedTuple):
    """Scores of some items; NaN where there is nothing to tell apart."""

    accuracy: float
    macro_f1: float
    auroc: float


def probe_scores(
    probabilities: Float[np.ndarray, "item label"],
    labels: Int[np.ndarray, " item"],
    folds: Int[np.ndarray, " item"],
) -> ProbeScores:
    """Scores of what probes say of some items.

    F1 and the area are means over the labels that items have, each against all others; a label that
    is never said has an F1 of 0, and one without a pair (`area_under_curve`) no area.

    Args:
        probabilities: of every label.
        labels: of the items.
        folds: of the items; those of one fold were read by one probe.
    """
    said, present = probabilities.argmax(axis=1), np.unique(labels)
    f1, areas = [], []
    for label in present:
        is_it, is_said = labels == label, said == label
        f1.append(2 * (is_it & is_said).sum() / (is_it.sum() + is_said.sum()))
        areas.append(area_under_curve(probabilities[:, label], is_it, folds))
    known = [area for area in areas if not np.isnan(area)]
    area = float(np.mean(known)) if known else float("nan")
    return ProbeScores(float((said == labels).mean()), float(np.mean(f1)), area)


def area_under_curve(
    scores: Float[np.ndarray, " item"],
    is_it: Bool[np.ndarray, " item"],
    folds: Int[np.ndarray, " item"],
) -> float:
    """Share of pairs of one that is it and one that is not in which the former scores higher.

    Both are of one fold: scores of different probes are on different scales, and one that knows
    nothing says less of what it has met less of, so that over folds it would seem to be wrong.
    Equal scores count as half; NaN without a pair.
    """
    right = n_pairs = 0.0
    for fold in np.unique(folds):
        there = folds == fold
        n_it, n_not = int(is_it[there].sum()), int((~is_it[there]).sum())
        ranks = rankdata(scores[there])[is_it[there]].sum()
        right += float(ranks) - n_it * (n_it + 1) / 2
        n_pairs += n_it * n_not
    return right / n_pairs if n_pairs else float("nan")
