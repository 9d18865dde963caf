"""Models and pairs of batches, for us and for Hugging Face, that paths are patched on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import path_reference as reference
from hf_reference import with_positions
from hooked_alm import ALMInput, HookedALM
from hooked_alm.methods.patching.metrics import Logits, OnLogits
from path_reference import Node, receiver_name
from tiny import PLACEHOLDER, TinyModels, hf_inputs
from tiny_text import TextModels, text_batch
from tolerances import PATHS

IDS = list(range(0, 320, 9))
TEXT_IDS = list(range(0, 97, 3))
READOUT = Logits(IDS)
"""A metric that lets the fast engine leave out all rows but the readout's in the last block."""
ENGINES = ("fast", "hooks")
BASE = hf_inputs([[10], [14]], [4, 6])
DONOR = hf_inputs([[10], [14]], [4, 6], seed=2)
LONGER = hf_inputs([[10], [14]], [7, 6], seed=2)
"""The same clips' lengths behind more text: places are elsewhere."""


@dataclass
class Case:
    """A model, two batches, and both once more for Hugging Face."""

    model: HookedALM
    hf: Any
    hf_base: dict[str, Tensor]
    hf_donor: dict[str, Tensor]

    @cached_property
    def base(self) -> ALMInput:
        return self._encode(self.hf_base)

    @cached_property
    def donor(self) -> ALMInput:
        return self._encode(self.hf_donor)

    def _encode(self, inputs: dict[str, Tensor]) -> ALMInput:
        given = {k: v for k, v in inputs.items() if k != "position_ids"}
        return self.model.encode(**given)

    def where(self, place: Any) -> reference.Where:
        """Positions of a place in base and donor, from the ids and masks."""
        n_rows, width = self.hf_base["input_ids"].shape
        pair = self.hf_base, self.hf_donor
        if place == "readout":
            return [([width - 1], [self.hf_donor["input_ids"].shape[1] - 1])] * n_rows
        found = []
        for row in range(n_rows):
            if place == "audio":
                ours, theirs = ((x["input_ids"][row] == PLACEHOLDER).nonzero() for x in pair)
            elif place == "all":
                ours, theirs = (x["attention_mask"][row].nonzero() for x in pair)
            else:
                ours = theirs = torch.tensor([place])
            found.append((ours.flatten().tolist(), theirs.flatten().tolist()))
        return found

    @property
    def ids(self) -> list[int]:
        """A sample of the vocabulary."""
        return IDS if "input_features" in self.hf_base else TEXT_IDS

    @property
    def at_readout(self) -> Logits:
        """Its logits at the readout."""
        return Logits(self.ids)

    @property
    def every_logit(self) -> OnLogits:
        """Its logits at every position that no row pads."""
        first = int(self.hf_base["attention_mask"].argmax(dim=1).max())
        return OnLogits(lambda logits: logits[:, first:, self.ids].flatten(1))

    def measured(self, logits: Tensor, of: Any) -> Tensor:
        """A metric of whole logits."""
        return of.function(logits) if isinstance(of, OnLogits) else logits[:, -1, self.ids]


def audio_case(tiny_models: TinyModels, variant: str, donor: dict[str, Tensor] = DONOR) -> Case:
    hf = tiny_models.hf(variant)
    return Case(tiny_models.hooked(variant), hf, with_positions(BASE), with_positions(donor))


def qwen3_case(root: Path) -> Case:
    """Qwen3, whose queries and keys are normalised; three rows, two of them padded."""
    models = TextModels(root)
    base = text_batch()
    donor = {**base, "input_ids": base["input_ids"].flip(1).clamp(min=1)}
    return Case(models.hooked("qwen3"), models.hf("qwen3"), base, donor)


def name_of(case: Case, receiver: Node) -> str:
    is_last = receiver == ("resid_post", case.model.cfg.n_layers - 1, None)
    return "logits" if is_last else receiver_name(receiver)


def assert_close(found: Any, expected: Tensor, what: Any = "") -> None:
    worst = np.abs(found - expected.double().numpy()).max()
    assert worst <= PATHS[torch.float32], (what, worst)
