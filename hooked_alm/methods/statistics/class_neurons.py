"""Neurons that belong to a class: by how often they fire for it, or by how strongly.

A neuron's value is that of ``mlp.hook_gate``; it fires where that is above 0, as it is where the
gate projection is.

Source: LAPE, RUCAIBox/Language-Specific-Neurons; MAD and CAS, arXiv 2601.03115; M-ESN-2.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from ...errors import InputError

Selector = Literal["lap", "lape", "mad", "cas"]
ByClass = Float[np.ndarray, "cls block neuron"]
Neuron = tuple[int, int]
"""Block and index of a neuron."""


@dataclass(frozen=True, kw_only=True)
class ClassActivity:
    """How often and how strongly every neuron is active for each class."""

    lap: ByClass
    """Share of the class's rows at which it fires."""
    mean: ByClass
    """Mean of its values over the class's rows."""


def class_activity(
    gates: Float[np.ndarray, "row block neuron"],
    classes: Int[np.ndarray, " row"],
    n_classes: int,
    *,
    above: int | float = 0.0,
) -> ClassActivity:
    """The activity of every neuron by class.

    Args:
        gates: values of ``mlp.hook_gate``; a row is an item's position.
        classes: of each row, from 0 on.
        n_classes: how many there are.
        above: a neuron fires where its value is above it. A GELU is not off below 0: what is
            selected there should be looked at above other values too.

    Raises:
        InputError: fewer than two classes, or one of them without a row.
    """
    counts = np.bincount(classes, minlength=n_classes)
    if n_classes < 2 or len(counts) != n_classes or not counts.all():
        raise InputError(
            f"activity by class: got {counts.tolist()} rows of {n_classes} classes, expected two "
            "classes at least, and rows of each. Leave out classes that no item has."
        )
    rows = [gates[classes == one] for one in range(n_classes)]
    return ClassActivity(
        lap=np.stack([(one > above).mean(axis=0) for one in rows]),
        mean=np.stack([one.mean(axis=0, dtype=np.float64) for one in rows]),
    )


def entropies(lap: ByClass) -> Float[np.ndarray, "block neuron"]:
    """LAPE: entropy of how a neuron's firing is shared out over classes, in nats; NaN for none."""
    total = lap.sum(axis=0)
    shares = np.divide(lap, total, out=np.full(lap.shape, np.nan), where=total > 0)
    return -(shares * np.log(shares, out=np.zeros(lap.shape), where=shares > 0)).sum(axis=0)


def class_scores(selector: Selector, activity: ClassActivity, *, filter: float = 0.95) -> ByClass:
    """How much a neuron belongs to each class; minus infinity where a selector leaves it out.

    * ``lap``: how often it fires for the class.
    * ``lape``: minus its `entropies`, where it fires for the class more often than the bar.
    * ``mad``: its mean for the class minus that of the other classes' means. (Minus that of all
      classes' means, as the paper has it later, is this times 1 - 1/classes: the same order.)
    * ``cas``: its mean for the class minus the highest of the other classes' means.

    Args:
        selector: name of the score.
        activity: of all neurons.
        filter: the bar is the smallest LAP that this share of all (class, neuron) reaches at most;
            what fires as often as the bar, and no oftener, is left out. Of ``lape`` alone.

    Raises:
        InputError: a filter that is no share.
    """
    lap, mean = activity.lap, activity.mean
    if selector == "lap":
        return lap
    if selector == "lape":
        at = round(filter * lap.size) - 1
        if not 0 <= at < lap.size:
            raise InputError(
                f"selecting neurons: got filter={filter}, expected a share above 0, up to 1."
            )
        bar = np.partition(lap.ravel(), at)[at]
        return np.where(lap > bar, -entropies(lap), -np.inf)
    others = np.stack([np.delete(mean, one, axis=0) for one in range(len(mean))])
    return mean - (others.mean(axis=1) if selector == "mad" else others.max(axis=1))


def select(
    selector: Selector, activity: ClassActivity, rate: float, *, filter: float = 0.95
) -> dict[int, list[Neuron]]:
    """The neurons of every class, best first: as many for each, ``rate`` of all there are.

    Fewer where no more pass the filter of ``lape``; of equals, the earlier ones.

    Raises:
        InputError: a rate that comes to no neuron or to more than all; a filter that is no share.
    """
    scores = class_scores(selector, activity, filter=filter)
    n = _count(round(rate * scores[0].size), scores[0].size)
    return {one: _best(values, n) for one, values in enumerate(scores)}


def best_neurons(
    selector: Selector, activity: ClassActivity, n: int, *, filter: float = 0.95
) -> list[Neuron]:
    """The ``n`` neurons that belong most to any class, best first; see `select`."""
    scores = class_scores(selector, activity, filter=filter)
    return _best(scores.max(axis=0), _count(n, scores[0].size))


def official_lape(
    activity: ClassActivity, rate: float = 0.01, *, filter: float = 0.95, keeps_empty: bool = True
) -> list[list[Neuron]]:
    """The neurons of every class as LAPE's own code selects them, in their order.

    Of the ``rate`` of all neurons with the lowest entropy, among those whose LAP is above the bar
    for some class, each belongs to every class for which it is. So classes have not as many each.

    Args:
        activity: of all neurons.
        rate: share of all neurons.
        filter: see `class_scores`.
        keeps_empty: without it, classes at the end that have no neuron are left out, so that lists
            and classes no longer go together, as in that code (C54).

    Raises:
        InputError: a rate that comes to no neuron or to more than all; a filter that is no share.
    """
    scores = class_scores("lape", activity, filter=filter)
    n = _count(round(rate * scores[0].size), scores[0].size)
    chosen = _best(scores.max(axis=0), n)
    found = [sorted(at for at in chosen if one[at] > -np.inf) for one in scores]
    while not keeps_empty and found and not found[-1]:
        found.pop()
    return found


def aape(
    activity: ClassActivity,
    *,
    least: int | float = 0.05,
    rate: int | float = 0.01,
    top: int | float = 0.05,
) -> list[list[Neuron]]:
    """The neurons of every class by AAPE, in their order; one may be several classes' (M-KAW).

    Neurons that fire least are dropped; of the others, those stay whose firing is shared out over
    classes with the lowest entropy; each belongs to every class for which it fires as often as few.

    Args:
        activity: of all neurons, such as those of an encoder's ``mlp.hook_post``.
        least: share of all neurons that is dropped, by their mean LAP over classes.
        rate: share of the others that stays, of equals the earlier ones; one at least.
        top: share of all LAP of the others, by class and neuron, that a neuron's has to be among.

    Raises:
        InputError: shares that are not between 0 and 1, or no neuron that fires.
    """
    shares = {"least": least, "rate": rate, "top": top}
    if wrong := [name for name, share in shares.items() if not 0 <= share <= 1]:
        raise InputError(f"selecting neurons: got {wrong} of {shares}, expected shares, 0 to 1.")
    lap, often = activity.lap, activity.lap.mean(axis=0)
    order = np.argsort(often.ravel(), kind="stable")
    is_kept = np.zeros(often.size, bool)
    is_kept[order[round(least * often.size) :]] = True
    is_kept &= often.ravel() > 0
    if not is_kept.any():
        raise InputError("selecting neurons: got none that fires, expected some. Lower the bar.")
    bar = np.quantile(lap.reshape(len(lap), -1)[:, is_kept], 1 - top)
    scores = np.where(is_kept.reshape(often.shape), -entropies(lap), -np.inf)
    chosen = _best(scores, max(1, round(rate * int(is_kept.sum()))))
    return [sorted(at for at in chosen if one[at] >= bar) for one in lap]


def _count(n: int, n_neurons: int) -> int:
    if not 1 <= n <= n_neurons:
        raise InputError(f"selecting neurons: got {n} of {n_neurons}, expected one to all of them.")
    return n


def _best(scores: Float[np.ndarray, "block neuron"], n: int) -> list[Neuron]:
    order = np.argsort(-scores.ravel(), kind="stable")[:n]
    width = scores.shape[1]
    return [(int(i) // width, int(i) % width) for i in order if scores.ravel()[i] > -np.inf]
