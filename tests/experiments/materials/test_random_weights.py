"""Random weights: of the same spread, the same every time, and other than the model's."""

import torch

from hooked_alm import HookedALM
from hooked_alm.experiments.materials.random_weights import FIXED, forget_training
from tiny import TinyModels


def test_weights_are_drawn_with_the_spread_of_the_models_own(tiny_models: TinyModels) -> None:
    one, other = (HookedALM.from_pretrained(tiny_models.folder()) for _ in range(2))
    before = {name: weight.clone() for name, weight in one.named_parameters()}
    forget_training(one, seed=0)
    forget_training(other, seed=0)
    again = dict(other.named_parameters())
    n_fixed = 0
    for name, weight in one.named_parameters():
        assert torch.equal(weight, again[name])
        if name.endswith(FIXED):
            n_fixed += 1
            assert torch.equal(weight, before[name])
        elif weight.ndim < 2:
            assert torch.equal(weight.sort().values, before[name].sort().values)
        else:
            assert not torch.equal(weight, before[name])
            assert 0.8 < float((weight.std() / before[name].std()).detach()) < 1.25
    assert n_fixed == 1
    forget_training(other, seed=1)
    assert not torch.equal(one.blocks[0].attn.q_proj.weight, other.blocks[0].attn.q_proj.weight)
