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
    probabilities: Float[np.ndarray, "item label"], labels: Int[np.ndarray, " item"]
) -> ProbeScores:
    """Scores of what probes say of some items.

    F1 and the area are means over the labels that items have, each against all others; a label that
    is never said has an F1 of 0.
    """
    said, present = probabilities.argmax(axis=1), np.unique(labels)
    f1, areas = [], []
    for label in present:
        is_it, is_said = labels == label, said == label
        f1.append(2 * (is_it & is_said).sum() / (is_it.sum() + is_said.sum()))
        areas.append(area_under_curve(probabilities[:, label], is_it))
    return ProbeScores(float((said == labels).mean()), float(np.mean(f1)), float(np.mean(areas)))


def area_under_curve(scores: Float[np.ndarray, " item"], is_it: Bool[np.ndarray, " item"]) -> float:
    """Share of pairs of one that is it and one that is not in which the former scores higher.

    Equal scores count as half; NaN if all are, or none is.
    """
    n_it, n_not = int(is_it.sum()), int((~is_it).sum())
    if not n_it * n_not:
        return float("nan")
    ranks = rankdata(scores)[is_it].sum()
    return float((ranks - n_it * (n_it + 1) / 2) / (n_it * n_not))
