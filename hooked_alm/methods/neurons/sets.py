"""The neurons of every class, by every selector, and random ones that stand beside them.

Source: arXiv 2601.03115; M-ESN-2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ..statistics.class_neurons import ClassActivity, Neuron, Selector, select
from ..statistics.neuron_sets import NeuronControl, neurons_like
from .activity import ActivityLog

SELECTORS: tuple[Selector, ...] = get_args(Selector)
NEURON_CONTROLS: tuple[NeuronControl, ...] = get_args(NeuronControl)


class ClassSet(NamedTuple):
    """Neurons that are changed together."""

    chosen_by: str
    """A selector, or what random neurons share with those of the run's selector."""
    draw: int
    cls: str
    neurons: list[Neuron]


@dataclass(frozen=True, eq=False)
class NeuronSets:
    """Neurons by selector and class, and random ones."""

    classes: list[str]
    """Those that the log has items of."""
    activity: ClassActivity
    block_activity: Float[np.ndarray, " block"]
    """Mean square of every block's values."""
    sets: list[ClassSet]

    @classmethod
    def of(
        cls,
        log: ActivityLog,
        labels: Sequence[str],
        *,
        rate: float,
        selector: Selector,
        n_draws: int,
        seed: int,
        filter: float = 0.95,
    ) -> "NeuronSets":
        """Selects and draws.

        Args:
            log: of some items.
            labels: its classes.
            rate: share of all neurons that every class gets.
            selector: whose neurons random ones stand beside.
            n_draws: of random ones, of each kind and class.
            seed: of these.
            filter: of ``lape``; see ``class_scores``.

        Raises:
            InputError: fewer than two classes with an item, or neurons too few to choose from.
        """
        there = [n for n, items in enumerate(log.items.tolist()) if items]
        if len(there) < 2:
            counts = dict(zip(labels, log.items.tolist(), strict=True))
            raise InputError(
                f"selecting neurons: got items of the classes {counts}, expected two classes at "
                "least with items. Where items with the right answer alone are logged, ask the "
                "model what it knows, by the rule that it follows, or log all items."
            )
        part = ActivityLog(*(one[there] for one in log.arrays.values()))
        classes, activity = [labels[n] for n in there], part.activity
        magnitude = part.magnitude.numpy()
        sets = list[ClassSet]()
        for one in SELECTORS:
            found = select(one, activity, rate, filter=filter)
            sets += [ClassSet(one, 0, classes[n], some) for n, some in found.items()]
        ours = {one.cls: one.neurons for one in sets if one.chosen_by == selector}
        every = {at for some in ours.values() for at in some}
        rng = np.random.default_rng(seed)
        for kind in NEURON_CONTROLS:
            for draw in range(n_draws):
                for name, some in ours.items():
                    drawn = neurons_like(kind, some, every, magnitude, rng)
                    sets.append(ClassSet(kind, draw, name, drawn))
        return cls(classes, activity, np.square(magnitude).mean(axis=1), sets)

    def mean_of(
        self, chosen_by: str, cls: str, values: Float[Tensor, "item block neuron"]
    ) -> Float[Tensor, " item"]:
        """Mean of ``[item, block, neuron]`` over a class's neurons; NaN where there are none."""
        one = next(s for s in self.sets if (s.chosen_by, s.draw, s.cls) == (chosen_by, 0, cls))
        if not one.neurons:
            return values.new_full((len(values),), float("nan"))
        blocks, neurons = np.array(one.neurons).T
        return values[:, blocks, neurons].double().mean(dim=1)
