"""Sets of neurons: how they overlap, in which blocks they are, and others that are like them.

Source: M-ESN-2 (controls), M-ESN-3 (specificity), M-ESN-6, M-ESN-7.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from ...errors import InputError
from .class_neurons import Neuron

NeuronControl = Literal["random", "layer", "magnitude"]
"""What random neurons share with those that they stand for: nothing, the block, or the strength."""
NEAREST = 10
"""Neurons among which one of the same magnitude is drawn."""


class Specificity(NamedTuple):
    """What taking neurons out costs their own class, and the others."""

    own: float
    """Mean change where class and neurons are the same."""
    other: float
    """Mean change where they are not."""

    @property
    def difference(self) -> float:
        """Own minus other: below 0 where the neurons are their class's."""
        return self.own - self.other


def specificity(matrix: Float[np.ndarray, "neurons_of cls"]) -> Specificity:
    """The means of a matrix's diagonal and of the rest; NaN for what there is not."""
    is_own = np.eye(len(matrix), dtype=bool)
    own, other = (matrix[part] for part in (is_own, ~is_own))
    return Specificity(*(float(one.mean()) if one.size else np.nan for one in (own, other)))


def jaccard(a: Collection[Neuron], b: Collection[Neuron]) -> float:
    """Shared neurons, as a share of those of either; NaN for two empty sets."""
    union = {*a} | {*b}
    return len({*a} & {*b}) / len(union) if union else np.nan


def jaccard_by_chance(rate: float) -> float:
    """The same of two sets that are drawn at random, each that share of all neurons."""
    return rate / (2 - rate)


class Overlap(NamedTuple):
    """How many neurons two sets share."""

    shared: int
    expected: float
    """Of sets of these sizes, drawn at random."""
    p: float
    """Share of such draws that share as many or more: hypergeometric."""
    jaccard: float
    """Shared ones, as a share of those of either."""


def overlap(a: Collection[Neuron], b: Collection[Neuron], n_neurons: int) -> Overlap:
    """What two sets share, beside what two random sets of these sizes would."""
    shared = len({*a} & {*b})
    p = float(stats.hypergeom.sf(shared - 1, n_neurons, len(a), len(b)))
    return Overlap(shared, len(a) * len(b) / n_neurons, p, jaccard(a, b))


class LayerTest(NamedTuple):
    """Whether neurons are spread over the blocks as a null has it."""

    statistic: float
    """Pearson's chi-squared."""
    p: float
    """Share of draws from the null that are as far from it, or further, this one among them."""


def spread_over_blocks(
    counts: Int[np.ndarray, " block"],
    weights: Float[np.ndarray, " block"],
    *,
    n_draws: int = 2000,
    seed: int = 0,
) -> LayerTest:
    """How far the blocks' counts are from a null, against multinomial draws from it.

    Draws, not the chi-squared distribution: a few neurons over many blocks leave cells of less than
    five.

    Args:
        counts: selected neurons of each block.
        weights: that the null gives each; equal ones are the uniform null.
        n_draws: draws from the null.
        seed: of these.
    """
    shares = weights / weights.sum()
    n, kept = int(counts.sum()), shares > 0
    if not n:
        return LayerTest(np.nan, np.nan)

    def distance(some: Int[np.ndarray, "*draw block"]) -> Float[np.ndarray, " *draw"]:
        expected = n * shares[kept]
        return np.asarray(((some[..., kept] - expected) ** 2 / expected).sum(axis=-1))

    found = float(distance(counts)) if not counts[~kept].any() else np.inf
    draws = distance(np.random.default_rng(seed).multinomial(n, shares, size=n_draws))
    return LayerTest(found, float((1 + (draws >= found - 1e-9).sum()) / (1 + n_draws)))


def block_counts(
    neurons: Collection[Neuron],
    nulls: Mapping[str, Float[np.ndarray, " block"]],
    *,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """The neurons of every block, beside what some nulls have, as columns of a table.

    Args:
        neurons: each of them once, or as often as it counts.
        nulls: by name, the weight that each gives to a block; ``p_{name}`` is its p.
        seed: of the draws; see `spread_over_blocks`.
    """
    counts = blocks_of([*neurons], len(next(iter(nulls.values()))))
    tests = {
        f"p_{name}": spread_over_blocks(counts, weights, seed=seed).p
        for name, weights in nulls.items()
    }
    for block, n in enumerate(counts.tolist()):
        expected = {
            name: len(neurons) * float(weights[block]) / float(weights.sum())
            for name, weights in nulls.items()
        }
        yield {"block": block, "neurons": n, **expected, **tests}


def neurons_like(
    kind: NeuronControl,
    chosen: Sequence[Neuron],
    without: Collection[Neuron],
    magnitude: Float[np.ndarray, "block neuron"],
    rng: np.random.Generator,
) -> list[Neuron]:
    """As many other neurons as were chosen, each once.

    * ``random``: any.
    * ``layer``: of the same block, one for each.
    * ``magnitude``: one of the ten that come nearest in magnitude.

    Args:
        kind: what they share.
        chosen: neurons that they stand for.
        without: neurons that they must not be, beside those that were chosen.
        magnitude: of every neuron, such as the root mean square of its values.
        rng: of the draws.

    Raises:
        InputError: too few neurons are left, or no such kind.
    """
    if kind not in get_args(NeuronControl):
        known = ", ".join(get_args(NeuronControl))
        raise InputError(f"drawing neurons alike in {kind!r}: expected one of {known}.")
    is_free = np.ones(magnitude.shape, bool)
    for at in {*without, *chosen}:
        is_free[at] = False
    if kind == "magnitude":
        return _as_strong(chosen, is_free, magnitude, rng)
    groups = {block: [at for at in chosen if at[0] == block] for block, _ in chosen}
    found = list[Neuron]()
    for block, some in groups.items() if kind == "layer" else [(None, chosen)]:
        there = is_free if block is None else is_free & (np.arange(len(is_free)) == block)[:, None]
        free = np.argwhere(there)
        if len(free) < len(some):
            raise _too_few(kind, len(free), len(some))
        found += [(int(b), int(n)) for b, n in rng.permutation(free)[: len(some)]]
    return found


def _as_strong(
    chosen: Sequence[Neuron],
    is_free: Bool[np.ndarray, "block neuron"],
    magnitude: Float[np.ndarray, "block neuron"],
    rng: np.random.Generator,
) -> list[Neuron]:
    free = np.argwhere(is_free)
    if len(free) < len(chosen):
        raise _too_few("magnitude", len(free), len(chosen))
    strengths = magnitude[is_free]
    order = np.argsort(strengths, kind="stable")
    free, strengths, is_left = free[order], strengths[order], np.ones(len(free), bool)
    found = list[Neuron]()
    for at in chosen:
        middle, reach = int(np.searchsorted(strengths, magnitude[at])), NEAREST
        near = np.zeros(0, int)
        while len(near) < min(NEAREST, int(is_left.sum())):
            first = max(middle - reach, 0)
            near = first + np.flatnonzero(is_left[first : middle + reach])
            reach *= 2
        near = near[np.argsort(np.abs(strengths[near] - magnitude[at]), kind="stable")[:NEAREST]]
        one = int(near[rng.integers(len(near))])
        is_left[one] = False
        found.append((int(free[one][0]), int(free[one][1])))
    return found


def _too_few(kind: NeuronControl, n_left: int, n: int) -> InputError:
    return InputError(
        f"drawing {n} neurons alike in {kind}: got {n_left} that are left. Choose fewer neurons."
    )


def blocks_of(neurons: Sequence[Neuron], n_blocks: int) -> Int[np.ndarray, " block"]:
    """How many of some neurons each block has."""
    return np.bincount([block for block, _ in neurons], minlength=n_blocks)
