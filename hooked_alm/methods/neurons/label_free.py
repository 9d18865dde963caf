"""Neurons made stronger without being told an item's class: the model's own answer says of which.

Source: arXiv 2601.03115, whose code is not published: the three forms as they are read; M-ESN-5.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Unpack, get_args

import numpy as np
import torch
from jaxtyping import Float

from ...inputs import ALMInput
from ...model import HookedALM
from ..patching.metrics import LabelScores
from ..patching.results import PatchResult
from ..reading.labels import LabelSet
from ..statistics.class_neurons import Neuron
from .gain import GainOptions, gain_neurons

LabelFree = Literal["two_pass", "mix", "union"]
FORMS: tuple[LabelFree, ...] = get_args(LabelFree)


class Injection(NamedTuple):
    """Neurons of several classes, and the share of a strength that each gets in each prompt."""

    neurons: list[Neuron]
    weights: Float[np.ndarray, "example neuron"]


def injection(
    form: LabelFree,
    probabilities: Float[np.ndarray, "example cls"],
    neurons: Sequence[Sequence[Neuron]],
) -> Injection:
    """Which neurons are made stronger, and how much in each prompt.

    * ``two_pass``: those of the class that is most probable, as it is answered first.
    * ``mix``: those of every class, by its probability; of several classes, by their sum.
    * ``union``: those of every class alike.

    Args:
        form: see above.
        probabilities: of the classes in a first pass; they add up to 1.
        neurons: of every class.
    """
    every = sorted({at for some in neurons for at in some})
    belongs = np.array([[at in {*some} for at in every] for some in neurons], np.float64)
    if form == "union":
        return Injection(every, np.ones((len(probabilities), len(every))))
    if form == "two_pass":
        probabilities = np.eye(len(neurons))[probabilities.argmax(axis=1)]
    return Injection(every, probabilities @ belongs)


@torch.no_grad()
def label_free_gain(
    model: HookedALM,
    x: ALMInput,
    labels: LabelSet,
    neurons: Sequence[Sequence[Neuron]],
    alphas: Sequence[float],
    **options: Unpack[GainOptions],
) -> PatchResult:
    """Scores of the labels with the neurons of what the model answers made stronger, in all forms.

    Args:
        model: to run.
        x: prompts.
        labels: that are answered.
        neurons: of every label, in their order; some may have none.
        alphas: strengths; at 0 the second pass is the first.
        options: of ``gain_neurons``.

    Returns:
        Axes ``set``, which is one of `FORMS`, ``alpha``, ``example`` and ``label``; ``base`` is the
        first pass.

    Raises:
        InputError: see ``gain_neurons``.
    """
    scores = labels.scores(model(x)[:, -1].float()[:, labels.tokens])
    probabilities = scores.double().softmax(dim=-1).cpu().numpy()
    made = [injection(form, probabilities, neurons) for form in FORMS]
    return gain_neurons(
        model, x, LabelScores(labels), [one.neurons for one in made], alphas,
        [one.weights for one in made], **options,
    )  # fmt: skip


class Answers(NamedTuple):
    """What a change does to answers: shares of items."""

    right: float
    """Right with it."""
    lost: float
    """Of those that were right, wrong with it; NaN if there are none."""
    won: float
    """Of those that were wrong, right with it; NaN if there are none."""


def changed_answers(
    before: Float[np.ndarray, "item label"],
    after: Float[np.ndarray, "item label"],
    right: Sequence[int],
) -> Answers:
    """What becomes of right and wrong answers.

    Args:
        before: scores of the labels without the change.
        after: with it.
        right: label of every item.
    """
    was, now = (one.argmax(axis=1) == np.asarray(right) for one in (before, after))
    lost, won = (float(some.mean()) if len(some) else np.nan for some in (~now[was], now[~was]))
    return Answers(float(now.mean()), lost, won)
