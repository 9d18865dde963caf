"""Label-free gains: by hand, and against plain transformers through ``gain_neurons``."""

import numpy as np
import torch

from hf_reference import with_positions
from hooked_alm.methods.neurons.gain import gain_neurons
from hooked_alm.methods.neurons.label_free import (
    FORMS,
    changed_answers,
    injection,
    label_free_gain,
)
from hooked_alm.methods.patching.metrics import LabelScores
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.statistics.class_neurons import Neuron
from tiny import TinyModels, hf_inputs
from tolerances import FAST_ENGINE

LISTS: list[list[Neuron]] = [[(0, 3), (2, 7)], [(1, 4), (2, 7)], []]
LABELS = LabelSet(names=("a", "b", "c"), spellings=(((5,),), ((9,),), ((40,),)))


def test_injections_by_hand() -> None:
    """A neuron of two classes gets both their probabilities; a class without one gives nothing."""
    probabilities = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    every = [(0, 3), (1, 4), (2, 7)]
    found = {form: injection(form, probabilities, LISTS) for form in FORMS}
    assert all(one.neurons == every for one in found.values())
    assert found["two_pass"].weights.tolist() == [[1, 0, 1], [0, 0, 0]]
    np.testing.assert_allclose(found["mix"].weights, [[0.6, 0.3, 0.9], [0.1, 0.2, 0.3]])
    assert found["union"].weights.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_the_second_pass(tiny_models: TinyModels) -> None:
    """At 0 it is the first; two_pass is the gain of what the first answers; union of all."""
    model = tiny_models.hooked("gqa")
    x = model.encode(**with_positions(hf_inputs([[31], [60]], [6, 4])))
    found = label_free_gain(model, x, LABELS, LISTS, [0.0, 3.0])
    near = {"rtol": 0, "atol": 2 * FAST_ENGINE[torch.float32]}
    first = model(x)[:, -1, [5, 9, 40]].detach().numpy()
    np.testing.assert_allclose(found.base, first, **near)
    np.testing.assert_allclose(found.values[:, 0], np.broadcast_to(first, (3, 2, 3)), **near)
    union = [*{*LISTS[0], *LISTS[1]}]
    alone = gain_neurons(model, x, LabelScores(LABELS), [*LISTS, union], [3.0]).values[:, 0]
    for row, said in enumerate(first.argmax(axis=1)):
        np.testing.assert_allclose(found.values[0, 1, row], alone[said, row], **near)
    np.testing.assert_allclose(found.values[2, 1], alone[3], **near)
    assert np.abs(found.values[1, 1] - alone[3]).max() > 1e-4


def test_what_becomes_of_answers() -> None:
    """Two of four were right; one of them is lost, and one of the others won."""
    before = np.array([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    after = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    assert changed_answers(before, after, [0, 0, 1, 1]) == (0.5, 0.5, 0.5)
    assert np.isnan(changed_answers(before, before, [1, 1, 1, 1]).lost)
    assert changed_answers(before, before, [0, 0, 1, 1]) == (0.5, 0.0, 0.0)
