"""Gains of sets of neurons against plain transformers under PyTorch hooks, by both engines."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_reference import with_positions
from hooked_alm.errors import InputError
from hooked_alm.methods.neurons.gain import gain_neurons
from hooked_alm.methods.patching.metrics import LabelsAndRest, Logits
from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.statistics.class_neurons import Neuron
from tiny import TinyModels, hf_inputs
from tolerances import FAST_ENGINE

TOKENS = [5, 9, 40]
SETS: list[list[Neuron]] = [[], [(2, 7), (0, 3), (2, 8)], [(1, n) for n in range(34)]]
ALPHAS = [-1.0, 0.0, 0.5, 4.0]
BATCH = with_positions(hf_inputs([[31], [60]], [6, 4]))


def plain(
    models: TinyModels,
    neurons: Sequence[Neuron],
    alpha: float,
    at: Sequence[Sequence[int]],
    tokens: Sequence[int] = TOKENS,
    weights: np.ndarray | None = None,
) -> Tensor:
    """Logits [row, token] of the published model, whose gates hooks change.

    ``weights`` [row, neuron] are shares of alpha.
    """
    shares = np.ones((len(at), len(neurons))) if weights is None else weights
    hf, handles = models.hf("gqa"), []

    def hook(block: int) -> object:
        mine = [neuron for b, neuron in neurons if b == block]
        share = torch.from_numpy(shares[:, [b == block for b, _ in neurons]]).float()

        def change(_: object, given: object, out: Tensor) -> Tensor:
            out = out.clone()
            for row, positions in enumerate(at):
                for position in positions:
                    out[row, position, mine] *= 1 + alpha * share[row]
            return out

        return change

    for block, layer in enumerate(hf.model.language_model.layers):
        handles.append(layer.mlp.act_fn.register_forward_hook(hook(block)))
    with torch.no_grad():
        logits = hf(**BATCH).logits[:, -1, [*tokens]]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("engine", ["fast", "hooks"])
@pytest.mark.parametrize("place", ["all", "audio", "readout"])
def test_every_cell_is_what_hooks_on_the_published_model_give(
    tiny_models: TinyModels, engine: Engine, place: str
) -> None:
    model = tiny_models.hooked("gqa")
    x = model.encode(**BATCH)
    spans = [x.spans.positions(place, row) for row in (0, 1)] if place != "all" else [
        np.flatnonzero(one).tolist() for one in x.is_real
    ]  # fmt: skip
    found = gain_neurons(model, x, Logits(TOKENS), SETS, ALPHAS, place=place, engine=engine)
    assert found.values.shape == (3, 4, 2, 3)
    for k, neurons in enumerate(SETS):
        for a, alpha in enumerate(ALPHAS):
            expected = plain(tiny_models, neurons, alpha, spans)
            np.testing.assert_allclose(
                found.values[k, a], expected, rtol=0, atol=FAST_ENGINE[torch.float32]
            )
    np.testing.assert_array_equal(found.values[0], np.broadcast_to(found.base, (4, 2, 3)))
    assert np.abs(found.values[1, 0] - found.base).max() > 0.01


def test_minus_1_takes_out_at_either_site_alike(tiny_models: TinyModels) -> None:
    """-1 writes zeros; so does a run whose gates, or products, are set to 0 by one hook."""
    model = tiny_models.hooked("gqa")
    x = model.encode(**BATCH)
    at_gate, at_post = (
        gain_neurons(model, x, Logits(TOKENS), SETS[2:], [-1.0], site=site, engine="hooks")
        for site in ("gate", "post")
    )
    np.testing.assert_array_equal(at_gate.values, at_post.values)
    with torch.no_grad():
        logits = model.run_with_hooks(
            x, fwd_hooks=[("blocks.1.mlp.hook_post", lambda value, hook: value * 0)]
        )
    np.testing.assert_allclose(
        at_gate.values[0, 0], logits[:, -1, TOKENS], rtol=0, atol=1e-5
    )  # fmt: skip


def test_a_strength_is_shared_out_by_prompt(tiny_models: TinyModels) -> None:
    """Each neuron of a set its own share in each prompt, at two strengths."""
    model = tiny_models.hooked("gqa")
    x = model.encode(**BATCH)
    spans = [np.flatnonzero(one).tolist() for one in x.is_real]
    weights = [np.random.default_rng(k).random((2, len(one))) for k, one in enumerate(SETS)]
    found = gain_neurons(model, x, Logits(TOKENS), SETS, [-1.0, 2.0], weights)
    for k, neurons in enumerate(SETS):
        for a, alpha in enumerate((-1.0, 2.0)):
            expected = plain(tiny_models, neurons, alpha, spans, weights=weights[k])
            np.testing.assert_allclose(
                found.values[k, a], expected, rtol=0, atol=FAST_ENGINE[torch.float32]
            )
    with pytest.raises(InputError, match=r"got weights of shapes \[\(1, 0\)"):
        gain_neurons(model, x, Logits(TOKENS), SETS, [1.0], [one[:1] for one in weights])


def test_errors(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    x = model.encode(**BATCH)
    for sets, alphas, message in (
        ([[(0, 34)]], [1.0], r"neurons \[\(0, 34\)\]: expected blocks 0 to 3, neurons 0 to 33"),
        ([[(4, 0)]], [1.0], "expected blocks 0 to 3"),
        ([[(0, 1), (0, 1)]], [1.0], r"the sets \[0\] name one of them twice"),
        ([], [1.0], "expected a set at least"),
        ([[(0, 1)]], [np.nan], "some finite numbers"),
    ):
        with pytest.raises(InputError, match=message):
            gain_neurons(model, x, Logits(TOKENS), sets, alphas)


def test_what_it_costs_beside_the_labels(tiny_models: TinyModels) -> None:
    """Scores of the labels, and a divergence without their tokens, from the published logits."""
    model = tiny_models.hooked("gqa")
    labels = LabelSet(names=("a", "b"), spellings=(((5,),), ((9,),)))
    x = model.encode(**BATCH)
    found = gain_neurons(model, x, LabelsAndRest(labels), SETS[1:2], [2.0], engine="hooks")
    assert found.axes["label"] == ("a", "b", "rest")
    spans = [np.flatnonzero(one).tolist() for one in x.is_real]
    every = list(range(tiny_models.hf("gqa").config.text_config.vocab_size))
    rest = [token for token in every if token not in (5, 9)]
    clean, changed = (
        plain(tiny_models, SETS[1], alpha, spans, every).double() for alpha in (0.0, 2.0)
    )
    p, q = (one[:, rest].softmax(-1) for one in (clean, changed))
    kl = (p * (p / q).log()).sum(-1)
    assert float(kl.min()) > 1e-4
    np.testing.assert_allclose(found.values[0, 0, :, 2], kl, rtol=1e-3)
    np.testing.assert_allclose(found.values[0, 0, :, :2], changed[:, [5, 9]], rtol=0, atol=1e-4)
