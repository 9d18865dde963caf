"""The grounding coefficient, by hand; M-GC and C13."""

import numpy as np
import pytest

from hooked_alm.methods.statistics.grounding import grounding_coefficient


def gc(audio: list[float], text: list[float], **options: object) -> np.ndarray:
    effects = np.array(audio), np.array(text)
    return grounding_coefficient(*effects, **{"min_effect": 0.1, **options})  # type: ignore[arg-type]


def test_the_cards_numbers() -> None:
    assert gc([0.3], [0.1]).tolist() == pytest.approx([0.75])
    assert gc([0.3], [0.1], form="ratio").tolist() == pytest.approx([3.0])


def test_the_shares_of_both_inputs_add_up_to_1() -> None:
    draw = np.random.default_rng(0)
    audio, text = draw.normal(0.5, 1, 200).tolist(), draw.normal(0.5, 1, 200).tolist()
    of_audio, of_text = gc(audio, text), gc(text, audio)
    assert 0 < np.isnan(of_audio).sum() < 100
    np.testing.assert_allclose((of_audio + of_text)[~np.isnan(of_audio)], 1, atol=1e-15)
    np.testing.assert_array_equal(np.isnan(of_audio), np.isnan(of_text))


def test_an_effect_against_its_exchange_counts_as_none() -> None:
    assert gc([-2.0, 1.0], [1.0, -2.0]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("form", ["share", "ratio"])
def test_what_moves_nothing_has_no_coefficient(form: str) -> None:
    nothing = gc([0.04, -3.0, np.nan, 1.0], [0.05, 0.05, 1.0, np.nan], form=form)
    assert np.isnan(nothing).all()
    assert gc([0.06], [0.05], form=form).tolist() == pytest.approx(
        [[6 / 11], [1.2]][form == "ratio"]
    )


def test_a_ratio_to_nothing_is_undefined() -> None:
    assert gc([1.0], [0.0]).tolist() == [1.0]
    assert np.isnan(gc([1.0], [0.0], form="ratio")).all()
