"""The pair of runs that TransformerLens' tools compare: the same words around two clips."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hooked_alm import ALMInput, HookedALM
from tiny import hf_inputs
from tolerances import OTHER_KERNEL

TOKEN = 5
CLOSE = {"atol": OTHER_KERNEL[torch.float32], "rtol": OTHER_KERNEL[torch.float32]}


class Pair(NamedTuple):
    """Two inputs, and the same for Hugging Face's ``forward``."""

    base: ALMInput
    donor: ALMInput
    hf_base: dict[str, Any]
    hf_donor: dict[str, Any]


def two_clips(
    model: HookedALM, frames: list[list[int]] | None = None, words: list[int] | None = None
) -> Pair:
    """By default one row of 8 positions; the clip fills 3 and 4."""
    base = hf_inputs(frames or [[10]], words or [4])
    donor = {**base, "input_features": base["input_features"].flip(-1)}
    return Pair(model.encode(**base), model.encode(**donor), base, donor)


def metric(logits: Tensor) -> Tensor:
    """The logit of one token at the readout of the first row."""
    return logits[0, -1, TOKEN]
