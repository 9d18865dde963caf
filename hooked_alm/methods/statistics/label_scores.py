"""What label scores say: wins and margins, flips and shifts under a patch, where a span lets go.

Label scores are logits at the readout; labels are columns, given by index.

Source: seed 001; M-001-2, 3, 6, 7, 8; C7, C31.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from ...errors import InputError
from .bootstrap import handoff_index, recovery

Ties = Literal["split", "first"]
Delta = Literal["logit_diff", "logprob", "logit"]
Labels = Int[np.ndarray, " item"]
MarginScores = Float[np.ndarray, " item *place label"]
WINNERS = ("semantic", "prosody", "other")


def wins(
    scores: Float[np.ndarray, " item *depth label"],
    semantic: Labels,
    prosody: Labels,
    *,
    ties: Ties = "split",
) -> Float[np.ndarray, " item *depth winner"]:
    """Whose label has the highest score: the words', the voice's, or another (M-001-2).

    The three sum to 1. ``split`` shares a tie equally among the labels that are level; ``first``
    gives it to the lowest index, as argmax does.

    Raises:
        InputError: an item whose two labels are one.
    """
    if (semantic == prosody).any():
        raise InputError(
            f"counting wins: item {int((semantic == prosody).argmax())} has the same label for "
            "words and voice, expected conflict items. Leave it out."
        )
    best = scores == scores.max(axis=-1, keepdims=True)
    if ties == "first":
        best &= best.cumsum(axis=-1) == 1
    shares = best / best.sum(axis=-1, keepdims=True)
    sides = [of_label(shares, labels) for labels in (semantic, prosody)]
    return np.stack([*sides, 1.0 - sides[0] - sides[1]], axis=-1)


def margin(
    scores: Float[np.ndarray, " item *depth label"], semantic: Labels, prosody: Labels
) -> Float[np.ndarray, " item *depth"]:
    """z[prosody] - z[semantic] (M-001-3); above 0 the voice leads."""
    return of_label(scores, prosody) - of_label(scores, semantic)


def lead(
    scores: Float[np.ndarray, "*cell item label"], own: Labels
) -> Float[np.ndarray, "*cell item"]:
    """Score of each item's own label minus the largest of the others."""
    is_own = np.eye(scores.shape[-1], dtype=bool)[own]
    others = np.where(is_own, -np.inf, scores).max(axis=-1)
    return np.where(is_own, scores, 0.0).sum(axis=-1) - others


def dealt_hits(said: Iterable[str], own: Iterable[str]) -> float:
    """Expected share of items whose answer is right, if their labels were dealt out at random."""
    answers, labels = np.array([*said]), np.array([*own])
    names = np.unique([answers, labels])
    shares = [(some[:, None] == names).mean(axis=0) for some in (answers, labels)]
    return float((shares[0] * shares[1]).sum())


def of_label(
    scores: Float[np.ndarray, " item *place label"], labels: Labels
) -> Float[np.ndarray, " item *place"]:
    """Each item's score of its own label."""
    index = labels.reshape(-1, *[1] * (scores.ndim - 1))
    return np.take_along_axis(scores, index, axis=-1)[..., 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipRates:
    """How often a patch brings the target, beside what that has to be compared with (C7)."""

    to_target: float
    """P(patched = target), over all pairs."""
    base_rate: float
    """P(base = target): reached without any patch."""
    ceiling: float
    """P(donor = target): what copying the donor whole would reach."""
    conditional: float
    """P(patched = target) among pairs where the donor says the target and the base does not."""
    n_conditional: int
    to_donor: float
    """P(patched = donor's answer)."""
    from_base: float
    """P(patched ≠ base's answer), whatever it becomes."""


def flip_rates(
    base: Labels, donor: Labels, patched: Labels, target: Labels, *, donor_counts: bool = True
) -> FlipRates:
    """Flip rates of one cell over pairs, from predicted labels (M-001-6).

    Args:
        base: answers of the unpatched runs.
        donor: answers of the donors' own runs.
        patched: answers of the patched runs.
        target: the donors' labels of what was exchanged.
        donor_counts: whether the conditional rate asks that the donor says the target too, without
            which a patch cannot be expected to bring it.
    """
    open_ = base != target
    if donor_counts:
        open_ &= donor == target
    hit = patched == target
    return FlipRates(
        to_target=float(hit.mean()),
        base_rate=float((base == target).mean()),
        ceiling=float((donor == target).mean()),
        conditional=float(hit[open_].mean()) if open_.any() else float("nan"),
        n_conditional=int(open_.sum()),
        to_donor=float((patched == donor).mean()),
        from_base=float((patched != base).mean()),
    )


def target_shift(
    patched: Float[np.ndarray, " item *cell label"],
    base: Float[np.ndarray, " item label"],
    target: Labels,
    form: Delta = "logit_diff",
) -> Float[np.ndarray, " item *cell"]:
    """How far a patch moves the target (M-001-7).

    ``logit``: z[target] itself, the seed's form, which moves with any shift of all logits (C31).
    ``logit_diff``: z[target] - z[the base's answer]; NaN where that is the target. ``logprob``:
    log-probability of the target among the labels.
    """
    after, before = (
        _target_score(patched, base, target, form),
        _target_score(base, base, target, form),
    )
    return after - before.reshape(-1, *[1] * (after.ndim - 1))


def target_recovery(
    patched: Float[np.ndarray, " item *cell label"],
    base: Float[np.ndarray, " item label"],
    donor: Float[np.ndarray, " item label"],
    target: Labels,
    *,
    min_effect: float,
) -> Float[np.ndarray, " item *cell"]:
    """Share of the donor's effect on z[target] - z[the base's answer] that a patch brings.

    NaN where the donor moves it by less than ``min_effect``, or the base's answer is the target.
    """
    of_patched, of_base, of_donor = (
        _target_score(scores, base, target, "logit_diff") for scores in (patched, base, donor)
    )
    shape = (-1, *[1] * (of_patched.ndim - 1))
    return recovery(of_patched, of_base.reshape(shape), of_donor.reshape(shape), eps=min_effect)


def _target_score(
    scores: MarginScores, base: Float[np.ndarray, " item label"], target: Labels, form: Delta
) -> Float[np.ndarray, " item *place"]:
    own = of_label(scores, target)
    if form == "logit":
        return own
    if form == "logprob":
        top = scores.max(axis=-1, keepdims=True)
        return own - (top[..., 0] + np.log(np.exp(scores - top).sum(axis=-1)))
    answer = base.argmax(axis=-1)
    found = own - of_label(scores, answer)
    found[answer == target] = np.nan
    return found


def handoff_depth(
    recovered: Float[np.ndarray, "curve depth"], *, rising: bool = False
) -> Float[np.ndarray, " curve"]:
    """The first depth from which a curve stays below one half for good (S-11); NaN if none.

    Args:
        recovered: recovery of a span by depth.
        rising: find instead the depth from which the curve stays at one half or above, where
            information has arrived.
    """
    if rising:
        return _depth(handoff_index(1 - recovered, includes_half=True), recovered.shape[1])
    return _depth(handoff_index(recovered), recovered.shape[1])


def readable_depth(
    margin: Float[np.ndarray, "curve depth"],
    agrees: Float[np.ndarray, "curve depth"],
    commonest: Float[np.ndarray, " curve"],
) -> Float[np.ndarray, " curve"]:
    """The first depth from which a lens leans as the output does, and reads the output (C32).

    That is, for good: the mean margin has its final sign, and the top token is the output's in at
    least half of the items, and in more than a lens that reads the same of every item could reach.
    NaN if the margin ends at 0, or there is no such depth.

    Args:
        margin: mean over items.
        agrees: share of items whose top token is the output's.
        commonest: share of the items that have the commonest output.
    """
    final = np.sign(margin[:, -1:])
    there = (np.sign(margin) == final) & (final != 0) & (agrees >= 0.5)
    there &= agrees > commonest[:, None] + 1e-9  # sums of the same shares, in another order
    return _depth(handoff_index(1.0 - there), margin.shape[1])


def _depth(index: Int[np.ndarray, " curve"], n_depths: int) -> Float[np.ndarray, " curve"]:
    """An index that is not past the end; NaN if it is."""
    return np.where(index < n_depths, index, np.nan).astype(np.float64)
