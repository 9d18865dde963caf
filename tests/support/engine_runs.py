"""What the tests of the patch engine share: models of every kind, inputs, and the comparison."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hooked_alm import ALMInput, HookedALM
from hooked_alm.engine.cells import Edits, called
from hooked_alm.engine.record import Record
from hooked_alm.methods.patching.metrics import OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.results import PatchResult
from hooked_alm.points import SITES, Site
from tiny import TinyModels, hf_inputs
from tiny_text import TextModels, text_batch
from tolerances import ENGINE

PLAIN_SITES = tuple(site for site in SITES if "cross" not in site)
"""Sites of blocks without cross-attention."""
N_TAIL = 9
"""Real positions at the end of every row below: pads carry nothing, and are not compared."""
TAIL = OnLogits(lambda logits: logits[:, -N_TAIL:].flatten(1))
"""A metric that loses nothing: all logits of the last positions."""

BASE = hf_inputs([[31], [23]], [6, 4])  # 16 positions; 0 and 4 pads, 8 and 6 of audio
OTHER = hf_inputs([[31], [23]], [6, 4], seed=2)
MODELS = ("gqa", "mha", "mqa, sliding", "llama", "qwen2", "qwen3")
"""Three that hear, three of text alone; ``qwen3`` has q/k norm, ``qwen2`` a window."""


class Case(NamedTuple):
    """A model and a pair of batches of equal shape."""

    model: HookedALM
    base: ALMInput
    donor: ALMInput
    alone: ALMInput
    """A row of the base without pads."""
    alike: ALMInput
    """Two rows that align with it position by position."""


class Cases:
    """Every model with its pair, each loaded once."""

    def __init__(self, audio: TinyModels, text: TextModels) -> None:
        self.audio, self.text = audio, text
        self.made: dict[Any, Case] = {}

    def __call__(
        self, name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32
    ) -> Case:
        key = name, attention, dtype
        if key not in self.made:
            if name in ("llama", "qwen2", "qwen3"):
                model = self.text.hooked(name, dtype, attention)
                base = text_batch()
                donor = {**base, "input_ids": base["input_ids"].flip(0)}
                ids = base["input_ids"][:2].flip(1)
                alike = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            else:
                model = self.audio.hooked(name, dtype, attention)
                base, donor = BASE, OTHER
                alike = hf_inputs([[31], [31]], [6, 6], seed=4)
            x, other, both = (model.encode(**one) for one in (base, donor, alike))
            alone = x[[int(x.attention_mask.all(1).nonzero()[0])]]
            self.made[key] = Case(model, x, other, alone, both)
        return self.made[key]


def both(
    model: HookedALM, base: ALMInput, donor: Any, metric: Any = TAIL, **options: Any
) -> tuple[PatchResult, PatchResult]:
    """The fast engine's result and the plain loop's, which must agree."""
    fast, plain = (
        patch(model, base, donor, metric, engine=engine, **options)  # type: ignore[arg-type]
        for engine in ("fast", "hooks")
    )
    assert fast.axes == plain.axes
    assert (fast.engine, plain.engine) == ("fast", "hooks")
    limit = rounding(model, base)
    for ours, theirs in zip(_parts(fast), _parts(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)
    return fast, plain


@torch.no_grad()
def rounding(model: HookedALM, x: ALMInput) -> float:
    """How far the engines may differ: the stated share of the largest logit."""
    return ENGINE[model.cfg.dtype] * float(model(x).abs().max())


def _parts(result: PatchResult) -> tuple[np.ndarray, ...]:
    return result.values, result.base, result.donor


def moved(result: PatchResult) -> float:
    """The largest effect: a sweep that changes nothing compares nothing."""
    return float(np.abs(result.effect).max())


def close(found: Tensor, expected: Tensor) -> None:
    """Streams of the fast engine against a hooked run's, to the stated rounding."""
    limit = ENGINE[torch.float32] * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=limit, rtol=0)


class Edit(NamedTuple):
    """A change by a function of a cell's own values; ``donor`` is a run and positions in it."""

    site: Site
    layer: int
    positions: Sequence[int]
    write: Callable[[Tensor], Tensor]
    donor: tuple[Record, Sequence[int]] | None = None


class Cell(NamedTuple):
    """A row of the batch under some edits."""

    row: int
    edits: Sequence[Edit]


def marks_of(cells: Sequence[Cell], n_rows: int) -> list[Edits]:
    """The edits of cells as the engine takes them; cell ``i`` is ``i * n_rows + its row``."""
    found = []
    for i, cell in enumerate(cells):
        for one in cell.edits:
            number = i * n_rows + cell.row
            edits = called(one.site, one.layer, number, one.positions, one.write)
            if one.donor is not None:
                record, positions = one.donor
                donors, sources = [record] * n_rows, np.array(positions)
                edits = replace(edits, donors=donors, sources=sources)
            found.append(edits)
    return found
