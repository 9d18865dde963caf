"""Neurons that tell classes apart in one of two ways, and which statistics find them.

Planted neurons take turns over the classes. At the readout, the last position of the prompt, a gate
is trained to be ``own`` before the activation where the rule follows the neuron's class, and
``other`` elsewhere. In ``rate`` it fires for its class alone, and weakly; in ``magnitude`` it fires
for every class, and strongly for its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hooked_alm.methods.statistics.class_neurons import Selector, best_neurons, class_activity

CodingName = Literal["magnitude", "rate"]
READOUT = -2
"""Position of the last token of a prompt that its label follows."""
WEIGHT = 10.0
"""Of the loss of the coding, beside those of the rule and of all else."""


@dataclass(frozen=True)
class Coding:
    """Gates before the activation, and how fast the rows of gate and up are trained."""

    own: float
    other: float
    rates: tuple[float, float]
    """What neurons of small gates write is up to the other factor, which has to be large."""

    def loss(self, gates: Tensor, classes: Tensor, n_classes: int) -> Tensor:
        """Mean squared error of gates [case, neuron], in steps from other to own."""
        is_own = classes[:, None] == classes_of(gates.shape[1], n_classes)
        wanted = torch.where(is_own, self.own, self.other)
        return WEIGHT * ((gates - wanted) / (self.own - self.other)).square().mean()


CODINGS: Mapping[CodingName, Coding] = {
    "magnitude": Coding(own=6.0, other=1.0, rates=(0.02, 0.05)),
    "rate": Coding(own=0.38, other=-0.22, rates=(0.01, 0.1)),
}


def classes_of(n: int, n_classes: int) -> Tensor:
    """Class of each of n planted neurons."""
    return torch.arange(n) % n_classes


@contextmanager
def watched(modules: Sequence[nn.Module]) -> Iterator[Callable[[], Tensor]]:
    """Gives a function: what the modules returned at the readout [case, module, value], last."""
    found: dict[int, Tensor] = {}

    def keep(at: int) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, given, out: found.update({at: out[:, READOUT]})

    handles = [module.register_forward_hook(keep(at)) for at, module in enumerate(modules)]
    try:
        yield lambda: torch.stack([found[at] for at in range(len(modules))], dim=1)
    finally:
        for handle in handles:
            handle.remove()


def coding_scores(
    gates: Tensor, classes: Tensor, n_classes: int, block: int, first: int, n: int
) -> dict[str, float]:
    """How planted neurons are active, and the share of them among the n best of each selector.

    Args:
        gates: activated ones [item, block, neuron], of all neurons.
        classes: class of each item.
        n_classes: how many classes there are.
        block: block of the planted neurons.
        first: the first of them; the others follow.
        n: how many of them.
    """
    found = class_activity(gates.numpy(), classes.numpy(), n_classes)
    is_own = (torch.arange(n_classes)[:, None] == classes_of(n, n_classes)).numpy()
    planted = {(block, neuron) for neuron in range(first, first + n)}
    scores = {}
    for name, values in (("lap", found.lap), ("mean", found.mean)):
        ours = values[:, block, first : first + n]
        scores[f"{name}_own"], scores[f"{name}_other"] = ours[is_own].mean(), ours[~is_own].mean()
    for selector in get_args(Selector):
        best = best_neurons(selector, found, n)
        scores[f"recall_{selector}"] = len(planted & {*best}) / n
    return {name: round(float(value), 4) for name, value in scores.items()}


def is_coded(coding: CodingName, scores: Mapping[str, float]) -> dict[str, bool]:
    """Which statistics must find the neurons of a coding, and whether they do."""
    finds, misses = ("lape", "mad") if coding == "rate" else ("mad", "lape")
    return {
        f"{finds.upper()} finds >= .8": scores[f"recall_{finds}"] >= 0.8,
        f"{misses.upper()} finds <= .2": scores[f"recall_{misses}"] <= 0.2,
    }


_ABOUT: Mapping[CodingName, str] = {
    "magnitude": "**Magnitude-coded**: a neuron fires for every emotion, and strongly for its own.",
    "rate": "**Rate-coded**: a neuron fires for its own emotion alone, and weakly.",
}
_SECTION = """
## Coding

{about} Neuron i of the {n} is that of emotion i mod {n_classes} in the order {classes}. Its gate
was trained to be {own} before the activation at the readout, the last position of the prompt, where
the rule follows that emotion, and {other} elsewhere: a squared error in steps of {step}, weighted
by {weight:g}, beside the other two losses.

Measured at the readout of the conflicts, at `mlp.hook_gate`. *Fires*: share of items at which it is
above 0; *mean*: of its values; each for the neurons' own emotions and for the others. Behind them
the share of these neurons among the {n} best of the decoder's {n_all:,} neurons by each statistic
of `hooked_alm/methods/statistics/class_neurons.py`.

| clips | fires, own | fires, others | mean, own | mean, others | LAP | LAPE | MAD | CAS |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def coding_section(
    name: CodingName,
    scores: Mapping[str, Mapping[str, float]],
    sets: Mapping[str, str],
    *,
    n: int,
    n_all: int,
    classes: Sequence[str],
) -> str:
    """The part of a card that is about the coding.

    Args:
        name: name of the coding.
        scores: of each set of clips, as `coding_scores` gives them.
        sets: what the sets are called.
        n: how many neurons were planted.
        n_all: how many neurons there are.
        classes: names of the classes.
    """
    coding, rows = CODINGS[name], []
    for one, got in scores.items():
        cells = [
            *(f"{100 * got[f'lap_{whose}']:.1f} %" for whose in ("own", "other")),
            *(f"{got[f'mean_{whose}']:.2f}" for whose in ("own", "other")),
            *(f"{got[f'recall_{selector}']:.2f}" for selector in get_args(Selector)),
        ]
        rows.append(" | ".join([f"| {sets[one]}", *cells]) + " |")
    return _SECTION.format(
        about=_ABOUT[name], n=n, n_classes=len(classes), classes=", ".join(classes), own=coding.own,
        other=coding.other, step=coding.own - coding.other, weight=WEIGHT, n_all=n_all,
        rows="\n".join(rows),
    )  # fmt: skip
