"""Heads screened by one gradient: against small steps of each gate, and norms by hand."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_alm import ALMInput, HookedALM
from hooked_alm.methods.attribution.head_gates import head_point, screen_heads
from tiny import TinyModels, hf_inputs
from whisper_toy import Whispers, noise

STEP = 1e-2


def log_p_of(x: ALMInput, logits: Tensor) -> Tensor:
    """Mean log-probability of the last four tokens of every prompt."""
    scores = logits[:, :-1].log_softmax(-1).gather(-1, x.tokens[:, 1:, None])[..., 0]
    return scores[:, -4:].mean(-1)


@pytest.fixture(params=["whisper", "language model"])
def asked(
    request: pytest.FixtureRequest, whispers: Whispers, tiny_models: TinyModels
) -> tuple[HookedALM, ALMInput]:
    if request.param == "whisper":
        model = whispers.hooked()
        x = model.prepare([noise(0.5), noise(0.8, seed=1)], language="en", answer_prefix=" a b c d")
        return model, x
    model = tiny_models.hooked()
    return model, model.encode(**hf_inputs([[63, 40], [23]], [9, 14]))


def test_effects_are_slopes_of_gates(asked: tuple[HookedALM, ALMInput]) -> None:
    """A gate opened and closed by a hundredth, each head by itself: central differences."""
    model, x = asked
    objective = partial(log_p_of, x)
    found = screen_heads(model, x, objective)
    assert {*found} == ({"self", "cross"} if model.cfg.cross_attention else {"self"})
    for kind, screen in found.items():
        assert screen.effect.shape == (len(model.blocks), model.cfg.n_heads, 2)
        for layer in range(len(model.blocks)):
            for head in range(model.cfg.n_heads):

                def scaled(
                    by: float, layer: int = layer, head: int = head, kind: Any = kind
                ) -> Tensor:
                    def edit(z: Tensor, hook: Any) -> Tensor:
                        z = z.clone()
                        z[:, :, head] *= by
                        return z

                    point = head_point(model, kind, layer)
                    with torch.no_grad():
                        return objective(model.run_with_hooks(x, fwd_hooks=[(point, edit)]))

                slope = (scaled(1 + STEP) - scaled(1 - STEP)) / (2 * STEP)
                torch.testing.assert_close(screen.effect[layer, head], -slope, atol=2e-3, rtol=2e-2)


def test_norms_are_of_real_positions(asked: tuple[HookedALM, ALMInput]) -> None:
    model, x = asked
    found = screen_heads(model, x, partial(log_p_of, x))
    names = [head_point(model, kind, 0) for kind in found]
    with torch.no_grad():
        _, cache = model.run_with_cache(x, names_filter=names)
    for kind, screen in found.items():
        z = cache[head_point(model, kind, 0)]
        for row in range(2):
            real = z[row, x.attention_mask[row].bool()]
            torch.testing.assert_close(
                screen.norm[0, :, row], real.norm(dim=-1).square().mean(0).sqrt()
            )


def test_nothing_is_left_behind(whispers: Whispers) -> None:
    """Weights have no gradients, and no hook stays."""
    model = whispers.hooked()
    x = model.prepare(noise(0.5), language="en", answer_prefix=" a b c d")
    screen_heads(model, x, partial(log_p_of, x))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(point._forward_hooks for point in model.modules())
