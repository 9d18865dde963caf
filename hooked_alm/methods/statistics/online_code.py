"""Minimum description length of labels given features, by the online code.

Whoever receives the labels trains the same probe on those that came before. What is easily read is
coded shortly, and early.

Source: Voita and Titov 2020 (arXiv 2003.12298); M-BT-6.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from math import ceil, log2
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .probing import code_bits, read_by_probe

PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


class CodeLength(NamedTuple):
    """Bits of some labels."""

    bits: float
    uniform_bits: float
    """Of the same labels without features: n log₂ C."""

    @property
    def compression(self) -> float:
        """How many times shorter the code is than without features."""
        return self.uniform_bits / self.bits


def code_length(n_first: int, n_labels: int, later_bits: Float[np.ndarray, " item"]) -> CodeLength:
    """Length of a code whose first labels come without features: t₁ log₂ C − Σ log₂ p.

    Args:
        n_first: items of the first portion.
        n_labels: C.
        later_bits: −log₂ p of every later label.
    """
    bits = n_first * log2(n_labels) + float(later_bits.sum())
    return CodeLength(bits, (n_first + len(later_bits)) * log2(n_labels))


def portion_ends(
    groups: Sequence[Hashable], least: int, *, seed: int
) -> tuple[Int[np.ndarray, " item"], list[int]]:
    """Items group by group in an order that is drawn, and where each portion of them ends.

    A portion ends with a whole group, so that no probe meets a group that it was trained on; one of
    fewer than ``least`` items is left out.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    drawn = np.random.default_rng(seed).permutation(len(members)).tolist()
    parts = [[*members.values()][number] for number in drawn]
    order, whole = np.array([i for part in parts for i in part]), np.cumsum([*map(len, parts)])
    wanted = [ceil(round(share * len(order), 6)) for share in PORTIONS]
    ends = [int(whole[np.searchsorted(whole, n)]) for n in wanted if n >= min(least, len(order))]
    return order, [*dict.fromkeys(ends)]


def online_code(
    features: Float[np.ndarray, "item feature"],
    labels: Int[np.ndarray, " item"],
    groups: Sequence[Hashable],
    *,
    strength: int | float,
    seed: int,
) -> CodeLength:
    """Bits of the labels, each portion coded by a probe of those before it.

    Args:
        features: of the items.
        labels: of these, from 0.
        groups: of these; all of a group are in one portion.
        strength: of the probes.
        seed: of the order of groups.
    """
    n_labels = int(labels.max()) + 1
    order, ends = portion_ends(groups, max(2, n_labels), seed=seed)
    later = []
    for first, last in pairwise(ends):
        seen, coded = order[:first], order[first:last]
        p = read_by_probe(features[seen], labels[seen], features[coded], n_labels, float(strength))
        later.append(code_bits(p, labels[coded], first))
    return code_length(ends[0], n_labels, np.concatenate(later or [np.zeros(0)]))
