"""Projected gradient descent: steps by hand, gradients of the published model, and controls."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.log_mel import log_mel
from hooked_alm.methods.robustness.pgd import answer_loss, pgd, sign_noise, snr_db
from tiny import TinyModels

STEP: dict[str, Any] = {"eps": 0.1, "alpha": 0.04, "steps": 3}
TEXT, ANSWER = "Sound?", [7, 19]


def rising(waves: Mapping[int, Tensor]) -> Tensor:
    """A loss that every sample raises, so that each step goes down."""
    return torch.stack([wave.sum() for wave in waves.values()])


def steps(x: float, **options: Any) -> list[float]:
    """The perturbation of one sample after 1, 2 and 3 steps."""
    return [
        float(pgd(rising, [torch.tensor([x])], **{**STEP, **options, "steps": n}).delta[0])
        for n in (1, 2, 3)
    ]


def test_the_card_by_hand() -> None:
    """Also C20: from the range [0, 1] a negative sample is moved beyond eps, and silenced."""
    np.testing.assert_allclose(steps(0.5), [-0.04, -0.08, -0.10], atol=1e-7)
    np.testing.assert_allclose(steps(-0.98), [-0.02] * 3, atol=1e-7)
    np.testing.assert_allclose(steps(-0.5, clamp=(0, 1)), [0.5] * 3, atol=1e-7)


def test_momentum_is_of_the_normalised_gradient() -> None:
    """g2 = ∇2 / mean|∇2| + .2 g1: the first direction decides where the second has no gradient."""
    calls = []

    def once(waves: Mapping[int, Tensor]) -> Tensor:
        calls.append(1)
        (wave,) = waves.values()
        weights = torch.tensor([[3.0, 1.0], [0.0, -4.0], [0.0, 0.0]])[len(calls) - 1]
        return (wave @ weights)[None]

    found = pgd(once, [torch.zeros(2)], eps=1, alpha=0.25, steps=2)
    # g1 = (1.5, .5); g2 = (0, -2) + .2 g1 = (.3, -1.9).
    assert found.delta[0].tolist() == [-0.5, 0.0]


def test_clips_stop_one_by_one() -> None:
    def loss(waves: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([wave[0] + number for number, wave in waves.items()])

    clips = [torch.tensor([0.5]), torch.tensor([0.5])]
    found = pgd(loss, clips, eps=0.5, alpha=0.125, steps=3, stop=0.4)
    assert found.losses == [[0.5, 0.375], [1.5, 1.375, 1.25, 1.125]]
    assert [one.item() for one in found.delta] == [-0.125, -0.375]


def test_no_gradient_moves_nothing() -> None:
    found = pgd(lambda waves: rising(waves) * 0, [torch.ones(3)], **STEP)
    assert not found.delta[0].any()


def speech_like(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.2, n).astype(np.float32))


@pytest.fixture(scope="module")
def gqa(tiny_models: TinyModels) -> HookedALM:
    return tiny_models.hooked("gqa")


def losses_of(model: HookedALM, waves: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([
        answer_loss(model, model.prepare(wave, TEXT), ANSWER) for wave in waves.values()
    ])  # fmt: skip


def test_loss_and_gradient_are_the_published_models(
    gqa: HookedALM, tiny_models: TinyModels
) -> None:
    """Of an answer of two tokens, teacher-forced, at the waveform: autograd through both."""
    wave, hf = speech_like(9000), tiny_models.hf("gqa")
    ours, theirs = (wave.clone().requires_grad_() for _ in range(2))
    loss = losses_of(gqa, {0: ours})
    x = gqa.prepare(ours.detach(), TEXT).extend(torch.tensor([ANSWER]))
    extractor: Any = gqa.prompts.feature_extractor  # type: ignore[union-attr]
    padded = torch.nn.functional.pad(theirs, (0, extractor.n_samples - len(wave)))
    arguments = gqa.hf_arguments(x) | {"input_features": log_mel(padded[None], extractor)}
    logits = hf(**arguments).logits[0, -3:-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ANSWER))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    (mine,), (its,) = (
        torch.autograd.grad(one.sum(), wave) for one, wave in ((loss, ours), (expected, theirs))
    )
    assert its.abs().max() > 0
    assert (mine - its).abs().max() <= 1e-5 * its.abs().max()


def test_an_attack_on_a_model_at_its_own_rate(gqa: HookedALM) -> None:
    """The loss moves (C46: at 16 kHz a mask of zeros kept it), within eps, in a batch too."""
    clips = [speech_like(9000), speech_like(6000, 1)]

    def loss(waves: Mapping[int, Tensor]) -> Tensor:
        return losses_of(gqa, waves)

    found = pgd(loss, clips, eps=0.02, alpha=0.01, steps=4)
    for losses, delta, clip in zip(found.losses, found.delta, clips, strict=True):
        assert len(losses) == 5
        assert losses[-1] < losses[0]
        assert float(delta.abs().max()) == pytest.approx(0.02, rel=1e-4)
        assert losses[-1] == pytest.approx(loss({0: clip + delta}).item(), abs=1e-5)
    alone = pgd(loss, clips[:1], eps=0.02, alpha=0.01, steps=4)
    assert torch.equal(alone.delta[0], found.delta[0])


def test_sizes() -> None:
    clip, delta = np.array([0.3, 0.4]), np.array([0.03, -0.04])
    assert snr_db(clip, delta) == pytest.approx(20)
    assert math.isinf(snr_db(clip, delta * 0))
    loud = np.linspace(-1, 1, 101, dtype=np.float32)
    found = sign_noise(np.full(101, 0.3, np.float32), loud, np.random.default_rng(0))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.abs(found), np.full(101, 0.3, np.float32))
    assert np.abs(loud + found).max() <= 1
    assert 0.2 < (found > 0).mean() < 0.8


@pytest.mark.parametrize(
    "wrong", [{"eps": 0}, {"alpha": -1}, {"steps": 0}, {"clamp": (1, -1)}]
)  # fmt: skip
def test_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="attacking with"):
        pgd(rising, [torch.zeros(2)], **{**STEP, **wrong})


def test_what_is_not_finite_or_no_answer(gqa: HookedALM) -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        pgd(lambda waves: rising(waves).log(), [torch.zeros(2)], **STEP)
    with pytest.raises(InputError, match="got no token"):
        answer_loss(gqa, gqa.prepare(speech_like(4000), TEXT), [])
