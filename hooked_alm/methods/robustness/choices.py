"""What a defence holds: the neurons that an attack moves most, or others drawn beside them.

Source: M-SP-2, M-SP-3.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ..statistics.class_neurons import Neuron
from ..statistics.neuron_sets import neurons_like
from .sensitivity import SensitivityLog, SensitivityScore, top_percent

DefendedBy = Literal["sensitive", "random", "layer"]
"""The neurons that an attack moves most; as many drawn of all others; or of the same blocks."""
DEFENDED_BY: tuple[DefendedBy, ...] = get_args(DefendedBy)


@dataclass(frozen=True, eq=False)
class NeuronChoices:
    """Neurons of several places, and features, by how far an attack moves them."""

    logs: Mapping[str, SensitivityLog]
    score: SensitivityScore
    normalised: bool
    seed: int
    """Of what is drawn."""

    def scores(self, place: str) -> Float[np.ndarray, "block neuron"]:
        """Of a place's neurons."""
        return self.logs[place].scores(self.score, normalised=self.normalised)

    def neurons(
        self, place: str, percent: int | float, chosen_by: DefendedBy = "sensitive", draw: int = 0
    ) -> list[Neuron]:
        """Some percent of a place's neurons, the most sensitive first.

        Args:
            place: one of ``logs``.
            percent: of its neurons.
            chosen_by: drawn ones are as many, and none of the most sensitive.
            draw: of several.

        Raises:
            InputError: too few neurons are left to draw from.
        """
        chosen = top_percent(self.scores(place), percent)
        if chosen_by == "sensitive" or not chosen:
            return chosen
        number = sorted(self.logs).index(place), DEFENDED_BY.index(chosen_by), draw
        rng = np.random.default_rng([self.seed, *number])
        return neurons_like(chosen_by, chosen, chosen, self.logs[place].magnitude, rng)


def add_logs(into: dict[str, SensitivityLog], more: Mapping[str, SensitivityLog]) -> None:
    """Merge the logs of places into others; see ``SensitivityLog.merge``."""
    for place, log in more.items():
        if place in into:
            into[place].merge(log)
        else:
            into[place] = log


def packed(logs: Mapping[str, SensitivityLog]) -> dict[str, Tensor]:
    """Logs of places as one mapping of tensors, called ``place/name``."""
    return {f"{place}/{name}": value for place, log in logs.items()
            for name, value in log.arrays.items()}  # fmt: skip


def unpacked(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, SensitivityLog]:
    """The logs that several mappings of ``packed`` make together."""
    logs: dict[str, SensitivityLog] = {}
    for part in parts:
        places: dict[str, dict[str, Tensor]] = {}
        for name, value in part.items():
            place, _, what = name.partition("/")
            places.setdefault(place, {})[what] = value
        add_logs(logs, {place: SensitivityLog(**arrays) for place, arrays in places.items()})
    return logs
