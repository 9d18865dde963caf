"""Information of a label in the residual stream, depth by depth, as a lens reads it.

Source: AudioLens; M-AL-2, M-AL-3.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError

ItemScores = Float[Tensor, "depth item"]


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
    scores: Float[Tensor, "depth item label"],
    labels: Int[Tensor, " item"],
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


def weighted_depths(
    information: Float[np.ndarray, " curve depth"], n_labels: int, *, margin: float = 0.2
) -> Float[np.ndarray, " curve"]:
    """The mean depth of each curve, weighted by what it has above chance; NaN if nowhere any.

    The weight of depth k is ``max(0, I[k] - (1 + margin) / n_labels)``. This is what AudioLens
    calls the critical layer: no event happens there, and a plateau at the end moves it on.

    Raises:
        InputError: fewer than two labels.
    """
    if n_labels < 2:
        raise InputError(f"weighting depths: got {n_labels} labels, expected two at least.")
    weights = np.maximum(0.0, information - (1 + margin) / n_labels)
    total = weights.sum(axis=1)
    depths = np.arange(information.shape[1])
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, (weights * depths).sum(axis=1) / total, np.nan)
