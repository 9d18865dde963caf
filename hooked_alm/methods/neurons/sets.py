"""The neurons of every class, by every selector, and random ones that stand beside them.

Source: arXiv 2601.03115; M-ESN-2, M-ESN-8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ..statistics.class_neurons import ClassActivity, Neuron, Selector, class_scores, select
from ..statistics.grounding import grounding_coefficient
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


class Drive(NamedTuple):
    """What moves the neurons of a named class against those of the voice's (M-ESN-8)."""

    toward: float
    """Mean of the named class's neurons minus that of the voice's, as asked."""
    effect_audio: float
    """What an audio of the named class adds to it."""
    effect_text: float
    """What an instruction that names the voice's class takes from it."""
    share: float
    """Of the audio in both; see ``grounding_coefficient``."""


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

    def rows(self, *, filter: float = 0.95) -> Iterator[dict[str, Any]]:
        """What is known of every neuron of every set, best first, as columns of a table.

        ``score`` is that of the selector, NaN of random neurons; ``lap_rest`` and ``mean_rest`` are
        means over the other classes.

        Args:
            filter: of ``lape``; see ``class_scores``.
        """
        scores = {one: class_scores(one, self.activity, filter=filter) for one in SELECTORS}
        lap, mean = self.activity.lap, self.activity.mean
        for one in self.sets:
            own = self.classes.index(one.cls)
            others = [n for n in range(len(self.classes)) if n != own]
            score = scores.get(one.chosen_by)  # type: ignore[call-overload]
            for rank, at in enumerate(one.neurons):
                yield {
                    "chosen_by": one.chosen_by, "draw": one.draw, "cls": one.cls, "rank": rank,
                    "block": at[0], "neuron": at[1],
                    "score": float("nan") if score is None else float(score[own][at]),
                    "lap": float(lap[own][at]), "lap_rest": float(lap[others][(..., *at)].mean()),
                    "mean": float(mean[own][at]),
                    "mean_rest": float(mean[others][(..., *at)].mean()),
                }  # fmt: skip

    def blocks(self) -> Iterator[dict[str, Any]]:
        """How active every block is, as columns of a table."""
        for block, activity in enumerate(self.block_activity.tolist()):
            yield {"block": block, "activity": activity}

    def drive(
        self,
        chosen_by: str,
        classes: tuple[str, str],
        values: Float[Tensor, "3 block neuron"],
        *,
        min_effect: float,
    ) -> Drive:
        """Which input drives the neurons of two classes, in a conflict of these.

        Args:
            chosen_by: whose neurons.
            classes: what the instruction names, and what the voice carries.
            values: at the readout: as asked; with a voice of the first class; with an instruction
                that names the second.
            min_effect: below this sum of both effects a share is undefined.
        """
        named, voice = (self.mean_of(chosen_by, one, values) for one in classes)
        asked, other_audio, other_text = (named - voice).tolist()
        # Another audio calls for what the instruction names, another text takes it away.
        audio, text = np.array([other_audio - asked]), np.array([asked - other_text])
        share = grounding_coefficient(audio, text, min_effect=min_effect)
        return Drive(asked, float(audio[0]), float(text[0]), float(share[0]))

    def mean_of(
        self, chosen_by: str, cls: str, values: Float[Tensor, "item block neuron"]
    ) -> Float[Tensor, " item"]:
        """Mean of ``[item, block, neuron]`` over a class's neurons; NaN where there are none."""
        one = next(s for s in self.sets if (s.chosen_by, s.draw, s.cls) == (chosen_by, 0, cls))
        if not one.neurons:
            return values.new_full((len(values),), float("nan"))
        blocks, neurons = np.array(one.neurons).T
        return values[:, blocks, neurons].double().mean(dim=1)
