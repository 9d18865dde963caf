"""Projected gradient descent on waveforms: a small change of clips that brings an answer about.

Source: SPIRIT (EMNLP 2025), mbzuai-nlp/spirit-breaking@e3044bd; Madry et al. 2018
(arXiv 1706.06083); M-SP-1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM

WaveLoss = Callable[[Mapping[int, Tensor]], Float[Tensor, " clip"]]
"""Waveforms by the number of their clip -> the loss of each, in this order."""


@dataclass(frozen=True, eq=False)
class Perturbations:
    """What was found for some clips."""

    delta: list[Float[Tensor, " _sample"]]
    """Of each clip, to be added to its samples."""
    losses: list[list[float]]
    """Of each clip: before the first step, and after each."""


def pgd(
    loss: WaveLoss,
    clips: Sequence[Float[Tensor, " _sample"]],
    *,
    eps: int | float,
    alpha: int | float,
    steps: int,
    momentum: int | float = 0.2,
    clamp: tuple[int | float, int | float] = (-1.0, 1.0),
    stop: int | float | None = None,
) -> Perturbations:
    """Perturbations of clips that make a loss small, each by itself.

    A step makes g = ∇ / mean|∇| + momentum g, and δ = δ - alpha sign(g), cut to [-eps, eps], and
    then so that x + δ lies within ``clamp``. Limits that x itself exceeds cut δ beyond eps: those
    of [0, 1] silence the negative half of every wave (C20).

    Args:
        loss: of waveforms, by the number of their clip; it has their gradient.
        clips: samples, full scale 1.0.
        eps: most that a sample changes.
        alpha: size of a step.
        steps: at most.
        momentum: share of the last direction.
        clamp: least and largest sample of what is heard.
        stop: loss below which a clip takes no further step; None is none.

    Raises:
        InputError: sizes that are not above 0, or a loss or gradient that is not finite.
    """
    if not (eps > 0 and alpha > 0 and steps >= 1 and clamp[0] < clamp[1]):
        raise InputError(
            f"attacking with eps={eps}, alpha={alpha}, steps={steps}, clamp={clamp}: expected "
            "sizes above 0, a step at least, and a range."
        )
    delta = [torch.zeros_like(x) for x in clips]
    direction = [torch.zeros_like(x) for x in clips]
    losses: list[list[float]] = [[] for _ in clips]
    active = [*range(len(clips))]
    for step in range(steps + 1):
        is_last = step == steps
        waves = {i: (clips[i] + delta[i]).detach().requires_grad_(not is_last) for i in active}
        with torch.set_grad_enabled(not is_last):
            found = loss(waves)
        for i, value in zip(active, found.tolist(), strict=True):
            losses[i].append(value)
        if is_last:
            break
        gradients = torch.autograd.grad(found.sum(), [*waves.values()])
        _check(found, gradients)
        by_clip = dict(zip(active, gradients, strict=True))
        active = [i for i in active if stop is None or losses[i][-1] >= stop]
        if not active:
            break
        for i in active:
            size = by_clip[i].abs().mean().clamp(min=torch.finfo(by_clip[i].dtype).tiny)
            direction[i] = by_clip[i] / size + momentum * direction[i]
            moved = (delta[i] - alpha * direction[i].sign()).clamp(-eps, eps)
            delta[i] = (clips[i] + moved).clamp(*clamp) - clips[i]
    return Perturbations(delta, losses)


def _check(found: Tensor, gradients: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(one).all()) for one in (found, *gradients)):
        raise InputError(
            "attacking: got a loss or a gradient that is NaN or infinite, expected finite ones. "
            "Run the model in a wider dtype."
        )


def answer_loss(model: HookedALM, x: ALMInput, answer: Sequence[int]) -> Float[Tensor, " batch"]:
    """Cross-entropy of an answer to each prompt, in nats a token; one forward, with its gradient.

    The answer's tokens are read behind those before them (teacher forcing), in the mode of
    evaluation: the same loss however often it is asked for, which that of text that is sampled is
    not (C46).

    Args:
        model: to run.
        x: prompts, left-padded.
        answer: its tokens.

    Raises:
        InputError: an answer without a token.
    """
    if not answer:
        raise InputError("attacking towards an answer: got no token, expected one at least.")
    ids = torch.tensor([[*answer]] * len(x), device=x.device)
    logits = model(x.extend(ids[:, :-1]))[:, -ids.shape[1] :].float()
    of_answer = logits.log_softmax(-1).gather(-1, ids.to(logits.device).unsqueeze(-1))
    return -of_answer.squeeze(-1).mean(1)


def snr_db(clip: Float[np.ndarray, " sample"], delta: Float[np.ndarray, " sample"]) -> float:
    """Power of a clip over that of what is added, in dB; infinite where nothing is."""
    heard, power = (float(np.square(one, dtype=np.float64).sum()) for one in (clip, delta))
    return float(10 * np.log10(heard / power)) if heard and power else math.inf


def sign_noise(
    delta: Float[np.ndarray, " sample"],
    clip: Float[np.ndarray, " sample"],
    rng: np.random.Generator,
) -> Float[np.ndarray, " sample"]:
    """Noise as large as a perturbation in every sample, of random signs: a control of equal size.

    The sign is the other one where the clip with the noise would leave full scale.
    """
    signs = rng.choice(np.array([-1, 1], delta.dtype), delta.shape)
    noise = np.abs(delta) * signs
    return np.where(np.abs(clip + noise) <= 1, noise, -noise)
