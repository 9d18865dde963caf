"""Pairs of clips of one length, and what neurons of the published model do when they are heard."""

from typing import Any

import torch
from torch import Tensor

from hf_reference import with_positions
from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from tiny import TinyModels, hf_inputs

PAIRS = ((31, 6), (45, 9))
"""Frames and text tokens of each."""


def inputs_of(pair: tuple[int, int], seed: int) -> dict[str, Any]:
    """What the published forward takes; the seed decides how the clip sounds."""
    found = hf_inputs([[pair[0]]], [pair[1]])
    sound = torch.randn(
        found["input_features"].shape, generator=torch.Generator().manual_seed(seed)
    )
    return found | {"input_features": sound}


def prompts(model: HookedALM) -> tuple[ALMInput, ALMInput]:
    """Clean and attacked, each as one batch."""
    clean, attacked = (
        ALMInput.joined([model.encode(**inputs_of(pair, seed)) for pair in PAIRS])
        for seed in (3, 4)
    )
    return clean, attacked


def n_rows(pair: tuple[int, int], place: str) -> int | None:
    """Rows of a point that are read: of the encoder those of the clip's frames, one for two."""
    return None if place == "lm" else (pair[0] + 1) // 2


def neurons_of(hf: Any, place: str) -> list[Any]:
    """Modules whose output is what neurons do, block by block."""
    if place == "lm":
        return [layer.mlp.act_fn for layer in hf.model.language_model.layers]
    return [layer.activation_fn for layer in hf.model.audio_tower.layers]


@torch.no_grad()
def published(models: TinyModels, place: str) -> list[tuple[Tensor, Tensor]]:
    """Of every pair, clean and attacked: [row, block, neuron]."""
    hf = models.hf("gqa")
    found = []
    for pair in PAIRS:
        sides = []
        for seed in (3, 4):
            kept: list[Tensor] = []
            handles = [
                module.register_forward_hook(
                    lambda _, given, out, kept=kept: kept.append(out.flatten(0, -2))
                )
                for module in neurons_of(hf, place)
            ]
            hf(**with_positions(inputs_of(pair, seed)))
            for handle in handles:
                handle.remove()
            sides.append(torch.stack(kept, dim=1)[: n_rows(pair, place)])
        found.append((sides[0], sides[1]))
    return found
