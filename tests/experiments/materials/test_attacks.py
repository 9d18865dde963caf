"""Attacks on clips: the trigger, noise as a defence, and greedy answers that begin with a label."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_alm.experiments.materials.answers import OTHER, greedy_answers
from hooked_alm.experiments.materials.attacks import AttackConfig, perturbed
from hooked_alm.experiments.materials.triggers import with_trigger
from hooked_alm.methods.reading.labels import LabelSet
from robust_cases import prompts
from tiny import TinyModels


def test_the_trigger_is_added_and_its_loss_read_before_and_after() -> None:
    rng = np.random.default_rng(0)
    waves = [rng.normal(0, 0.1, n).astype(np.float32) for n in (800, 900)]

    def loss(some: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([number + wave.abs().max() for number, wave in some.items()])

    deltas, losses = perturbed(AttackConfig(attack="trigger"), loss, waves, 16_000)
    for n, (wave, delta) in enumerate(zip(waves, deltas, strict=True)):
        attacked = with_trigger(wave, 16_000)
        np.testing.assert_allclose(wave + delta, attacked, rtol=0, atol=1e-8)
        expected = [n + float(np.abs(one).max()) for one in (wave, attacked)]
        assert losses[n] == pytest.approx(expected)


@pytest.mark.parametrize("is_whole", [True, False])
def test_an_answer_is_a_label_where_it_begins_with_all_of_its_word(
    tiny_models: TinyModels, is_whole: bool
) -> None:
    """A word of two tokens; the scores are those of the first step, before anything is said."""
    model = tiny_models.hooked("gqa")
    x = prompts(model)[1][0]
    said = model.generate(x, 2, return_type="tokens", do_sample=False)
    assert isinstance(said, Tensor)
    first, second = said[0].tolist()
    word = first, second if is_whole else second + 1
    labels = LabelSet(names=("a", "b"), spellings=((word,), ((first + 1,),)))
    (row,) = greedy_answers(model, labels, x)
    assert row["answer"] == ("a" if is_whole else OTHER)
    with torch.no_grad():
        logits = model(x)[0, -1]
    assert row["z_a"] == pytest.approx(float(logits[first]), abs=1e-4)
    assert row["best_label_rank"] == 1
