"""Whether several measures turn at the same depth, and how often chance alone has them do so.

Source: the triple convergence of seed 003; M-TC.
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from ...errors import InputError

Step = Literal["ratio", "difference"]
Depths2D = Float[np.ndarray, "measure item"]


def steepest_block(
    curves: Float[np.ndarray, "curve depth"], step: Step
) -> Float[np.ndarray, " curve"]:
    """The block, from 0, across which each curve grows most; NaN where a value is not finite.

    Args:
        curves: over depths 0..L.
        step: "ratio" of norms, which have no natural zero; "difference" of similarities.

    Raises:
        InputError: fewer than two depths.
    """
    if curves.shape[1] < 2:
        raise InputError(f"finding the largest step: got {curves.shape[1]} depths, expected two.")
    before, after = curves[:, :-1], curves[:, 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = after / before if step == "ratio" else after - before
    is_known = np.isfinite(steps).all(axis=1)
    return np.where(is_known, np.nan_to_num(steps).argmax(axis=1), np.nan)


def chance_agreement(n_depths: int, tolerance: int, n_measures: int = 3) -> float:
    """Probability that so many depths, each any of 1..L, lie within a tolerance of each other.

    For three and a tolerance of 1 it is (7 L - 6) / L³ (C17).

    Raises:
        InputError: no depths, no measures, or a negative tolerance.
    """
    if n_depths < 1 or n_measures < 1 or tolerance < 0:
        raise InputError(
            f"chance agreement of {n_measures} measures over {n_depths} depths within "
            f"{tolerance}: expected one at least of the first two, and no negative number."
        )
    # With m the least of them: all in [m, m + tolerance], not all above m.
    room = [min(tolerance + 1, n_depths - m) for m in range(n_depths)]
    return sum(w**n_measures - (w - 1) ** n_measures for w in room) / n_depths**n_measures


def agrees(depths: Depths2D, tolerance: int) -> Bool[np.ndarray, " item"]:
    """Whether an item's depths lie within a tolerance of each other."""
    found: Bool[np.ndarray, " item"] = depths.max(axis=0) - depths.min(axis=0) <= tolerance
    return found


def permuted_agreement(
    depths: Depths2D, tolerance: int, *, n: int, seed: int
) -> Float[np.ndarray, " draw"]:
    """Shares of items that agree if every measure's depths are dealt out to the items anew.

    Each measure keeps how often it gives a depth; what goes with what is left to chance.
    """
    rng = np.random.default_rng(seed)
    order: Int[np.ndarray, "draw measure item"] = rng.permuted(
        np.broadcast_to(np.arange(depths.shape[1]), (n, *depths.shape)), axis=-1
    )
    dealt = np.take_along_axis(depths[None], order, axis=-1)
    share: Float[np.ndarray, " draw"] = ((dealt.max(axis=1) - dealt.min(axis=1)) <= tolerance).mean(
        axis=-1
    )
    return share
