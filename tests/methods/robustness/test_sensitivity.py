"""Sensitive neurons: scores by hand, and logs against hooks on the published model."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_alm.errors import InputError
from hooked_alm.methods.robustness.places import PLACES, NeuronPlace, NeuronRows, n_neurons
from hooked_alm.methods.robustness.sensitivity import (
    SensitivityLog,
    sensitivity,
    sensitivity_log,
    top_percent,
)
from robust_cases import PAIRS, prompts, published
from tiny import TinyModels
from tolerances import PADDED_ROW


def test_the_card_by_hand() -> None:
    clean, attacked = torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]])
    assert sensitivity(clean, attacked, "abs_sum").tolist() == [0]
    assert sensitivity(clean, attacked, "mean_abs").tolist() == [1]
    scores = np.arange(1000.0).reshape(4, 250)
    assert top_percent(scores, 0.5) == [(3, n) for n in (249, 248, 247, 246, 245)]
    assert top_percent(scores, 0.05) == []
    assert top_percent(np.ones((2, 2)), 75) == [(0, 0), (0, 1), (1, 0)]
    for wrong, percent in ((scores, 101), (scores * np.nan, 1)):
        with pytest.raises(InputError, match="selecting"):
            top_percent(wrong, percent)


@pytest.mark.parametrize("place", PLACES)
def test_it_is_what_hooks_on_the_published_model_see(
    tiny_models: TinyModels, place: NeuronPlace
) -> None:
    """Both scores and the clean moments of two pairs, each in a run by itself and together."""
    model = tiny_models.hooked("gqa")
    clean, attacked = prompts(model)
    log = sensitivity_log(model, clean, attacked, place)
    values = published(tiny_models, place)
    assert int(log.items) == len(PAIRS)
    assert int(log.rows) == sum(len(one) for one, _ in values)
    expected = {
        "abs_sum": sum((b - a).sum(0).abs() for a, b in values),
        "mean_abs": sum((b - a).abs().mean(0) for a, b in values),
    }
    atol = 300 * PADDED_ROW[torch.float32]
    for name, sums in expected.items():
        assert isinstance(sums, Tensor)
        assert sums.abs().max() > 0
        np.testing.assert_allclose(getattr(log, name), sums, rtol=0, atol=atol)
        np.testing.assert_allclose(log.scores(name), sums / len(PAIRS), rtol=0, atol=atol)  # type: ignore[arg-type]
    every = torch.cat([one for one, _ in values]).double()
    np.testing.assert_allclose(log.total, every.sum(0), rtol=0, atol=atol)
    np.testing.assert_allclose(log.magnitude, every.square().mean(0).sqrt(), rtol=0, atol=1e-5)
    z = log.scores("mean_abs", normalised=True)
    std = every.std(0, unbiased=False).numpy()
    np.testing.assert_allclose(z, log.scores("mean_abs") / std, rtol=1e-3)
    halves = SensitivityLog.empty(*n_neurons(model, place))
    for row in range(len(PAIRS)):
        halves.merge(sensitivity_log(model, clean[row], attacked[row], place))
    np.testing.assert_allclose(halves.abs_sum, log.abs_sum, rtol=0, atol=atol)


def test_rows_of_a_span_and_the_last(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    clean, attacked = prompts(model)
    for place in PLACES:
        every, heard = (
            int(sensitivity_log(model, clean, attacked, place, span=span).rows)
            for span in ("all", "audio")
        )
        assert 0 < heard <= every
        assert (heard < every) == (place == "lm")
        rows = NeuronRows.of(model, clean, place)
        last = rows.mask("all", 2)
        assert last.sum(1).tolist() == [2] * len(clean)
        assert not (last & ~rows.mask("all")).any()
        for mask, one in zip(rows.mask("all"), last, strict=True):
            assert one.nonzero().max() == mask.nonzero().max()


def test_neurons_that_never_move_are_far_away() -> None:
    log = SensitivityLog.empty(1, 3)
    log.items += 1
    log.rows += 2
    log.mean_abs += torch.tensor([[1.0, 0.0, 1.0]])
    log.total += torch.tensor([[4.0, 4.0, 4.0]])
    log.squares += torch.tensor([[8.0, 8.0, 10.0]])
    assert log.scores("mean_abs", normalised=True).tolist() == [[np.inf, 0.0, 1.0]]


def test_refused(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    clean, attacked = prompts(model)
    with pytest.raises(InputError, match="comparing clean and attacked"):
        sensitivity_log(model, clean, attacked[0], "lm")
    with pytest.raises(InputError, match="got no pair"):
        SensitivityLog.empty(2, 3).scores("abs_sum")
    with pytest.raises(InputError, match="Merge logs of one model"):
        SensitivityLog.empty(2, 3).merge(SensitivityLog.empty(2, 4))
