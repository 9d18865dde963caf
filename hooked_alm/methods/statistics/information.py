"""Information of a label in the residual stream, depth by depth, as a lens reads it.

Source: AudioLens; M-AL-2, M-AL-3.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError
from .critical_layer import Curves, Depths, resolve_depths

ItemScores = Float[Tensor, "depth *item"]
InformationDepth = Literal["weighted", "first_above", "resolve"]


@dataclass(frozen=True, kw_only=True)
class Information:
    """How far a lens reads each item's own label, at every depth."""

    hit: ItemScores
    """1 where its label has the highest score of all labels, else 0; a tie is shared."""
    soft: ItemScores
    """Probability of its label among the labels."""
    mass: ItemScores
    """Probability of all labels together among all tokens: a hit in a mass of 1e-4 is none."""


def information_scores(
    scores: Float[Tensor, "depth *item label"],
    labels: Int[Tensor, "*item"],
    normaliser: ItemScores,
) -> Information:
    """The information of every item's label; the mean of ``hit`` is AudioLens' score I.

    Args:
        scores: of the labels, as ``LabelSet.scores`` makes them of lens logits.
        labels: the right one of each item.
        normaliser: log-sum-exp of the lens' logits over the vocabulary, as in ``LensFidelity``.

    Raises:
        InputError: fewer than two labels.
    """
    if scores.shape[-1] < 2:
        raise InputError("scoring information: got one label, expected two at least.")
    own = labels.expand(scores.shape[:-1]).unsqueeze(-1)
    is_best = scores == scores.amax(dim=-1, keepdim=True)
    hit = is_best.gather(-1, own) / is_best.sum(dim=-1, keepdim=True)
    return Information(
        hit=hit.squeeze(-1).float(),
        soft=scores.softmax(dim=-1).gather(-1, own).squeeze(-1),
        mass=(scores.logsumexp(dim=-1) - normaliser).exp(),
    )


def bar_above(n_labels: int, margin: float) -> float:
    """The information above which a depth counts: chance, and so much of it."""
    return (1 + margin) / n_labels


def information_depths(
    information: Curves, definition: InformationDepth, n_labels: int, *, margin: float = 0.2
) -> Depths:
    """The depth at which each curve is informative, or NaN where it has no such depth.

    * ``weighted``: see `weighted_depths`.
    * ``first_above``: the first depth with more than ``(1 + margin) / n_labels``.
    * ``resolve``: the first depth from which there is more than that for good.
    """
    if definition == "weighted":
        return weighted_depths(information, n_labels, margin=margin)
    above = information - bar_above(n_labels, margin)
    is_above = above > 0
    if definition == "first_above":
        return np.where(is_above.any(axis=1), is_above.argmax(axis=1), np.nan)
    return np.where(is_above[:, -1], resolve_depths(above), np.nan)


def weighted_depths(information: Curves, n_labels: int, *, margin: float = 0.2) -> Depths:
    """The mean depth of each curve, weighted by what it has above chance; NaN if nowhere any.

    The weight of depth k is ``max(0, I[k] - (1 + margin) / n_labels)``. This is what AudioLens
    calls the critical layer: no event happens there, and a plateau at the end moves it on.

    Raises:
        InputError: fewer than two labels.
    """
    if n_labels < 2:
        raise InputError(f"weighting depths: got {n_labels} labels, expected two at least.")
    weights = np.maximum(0.0, information - bar_above(n_labels, margin))
    total = weights.sum(axis=1)
    depths = np.arange(information.shape[1])
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, (weights * depths).sum(axis=1) / total, np.nan)


def drops_from_peak(
    hits: Float[np.ndarray, "item depth"],
) -> Float[np.ndarray, " item"]:
    """How much more each item has at its peak below the last depth than at the last.

    The peak is chosen on the mean of the other items, so that it is no peak of noise.
    """
    peaks = (hits.sum(axis=0) - hits)[:, :-1].argmax(axis=1)
    return hits[np.arange(len(hits)), peaks] - hits[:, -1]
