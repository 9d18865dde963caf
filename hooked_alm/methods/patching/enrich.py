"""Enrichment: states of one depth are added to, or averaged with, those after a later block.

Source: AudioLens, section on improving without training; M-AL-5.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...engine.cells import Edits, Indices
from ...engine.record import on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ..reading.lens import Rows, readout_positions, residual_rows
from .measurement import Measurement
from .metrics import Metric, OnLogits
from .options import Engine
from .results import PatchResult

EnrichMode = Literal["add", "average", "average_input"]
EnrichControl = Literal["other_depth", "other_clip", "noise"]


class Enrichment(NamedTuple):
    """Which state enriches which, and how."""

    mode: EnrichMode
    source: int
    """Depth of the state that enriches."""
    layer: int
    """Block whose output is enriched."""


@dataclass(frozen=True, eq=False)
class Enriched:
    """New states after a block, from its own and from those that enrich them."""

    mode: EnrichMode
    coefficient: float
    states: Float[Tensor, "of d_model"]
    entering: Float[Tensor, "batch d_model"] | None
    """What enters the block in the base run, where that is averaged with."""
    of: Indices
    """Row of ``states`` for every entry."""
    rows: Indices
    """Row of the batch of every entry."""

    def __call__(self, own: Float[Tensor, "entry d_model"], entries: Indices) -> Tensor:
        """New states of some entries."""
        d = self.states[on_device(self.of[entries], self.states)].to(own)
        if self.mode == "add":
            return own + self.coefficient * d
        if self.entering is not None:
            own = self.entering[on_device(self.rows[entries], self.entering)].to(own)
        return (own + d) / 2


def check_blocks(n_blocks: int, **given: Sequence[int] | None) -> None:
    """Refuses blocks that are enriched, or depths that enrich them, that a model lacks.

    Args:
        n_blocks: of the model.
        given: by the name of what was given; None is all.

    Raises:
        InputError: there are some.
    """
    for name, numbers in given.items():
        if wrong := [one for one in numbers or () if not 0 <= one < n_blocks]:
            raise InputError(
                f"enriching: got {wrong} in {name}, expected 0 to {n_blocks - 1}: the model has "
                f"{n_blocks} blocks, and enriches with what enters one."
            )


@torch.no_grad()
def enrich(
    model: HookedALM,
    x: ALMInput,
    states: Float[Tensor, "source batch d_model"],
    metric: Metric | OnLogits,
    *,
    layers: Sequence[int] | None = None,
    mode: EnrichMode = "add",
    coefficient: float = 1.0,
    positions: Int[Tensor, "batch 1"] | None = None,
    engine: Engine = "fast",
    max_bytes: int | None = None,
) -> PatchResult:
    """The metric where a state after a block is enriched, for every block and every source.

    ``add`` writes ``r + c d``, ``average`` ``(r + d) / 2``. ``average_input`` writes
    ``(what enters the block + d) / 2`` in place of what leaves it, as the code of AudioLens does:
    the block itself is skipped.

    Args:
        model: to run.
        x: prompts.
        states: what enriches them, such as depths of ``residual_rows(model, x)[:, :, 0]``: as they
            leave a block, before any final norm.
        metric: what is read off each run; see ``metrics``.
        layers: blocks whose output is enriched; None is each.
        mode: how.
        coefficient: c, for ``add``.
        positions: of each row; None is the readout.
        engine: "fast", or "hooks" for the plain loop.
        max_bytes: memory budget of the fast engine; see ``patch``.

    Returns:
        Axes ``source``, ``layer``, ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: blocks or a mode that do not exist, or states of other shape.
    """
    n_layers = len(model.path)
    blocks = [*range(n_layers)] if layers is None else [*layers]
    if mode not in get_args(EnrichMode):
        raise InputError(
            f"enriching in mode {mode!r}: expected one of {', '.join(get_args(EnrichMode))}."
        )
    check_blocks(n_layers, layers=blocks)
    n_sources, n_rows = states.shape[:2]
    if (n_rows, states.shape[2]) != (len(x), model.cfg.d_model):
        raise InputError(
            f"enriching {len(x)} rows of width {model.cfg.d_model}: got states of "
            f"{tuple(states.shape)}, expected [source, batch, d_model]."
        )
    where = readout_positions(x) if positions is None else positions
    base: Rows | None = residual_rows(model, x, where) if mode == "average_input" else None
    measured = Measurement(model, x, None, metric, engine=engine, max_bytes=max_bytes)
    source, row = (one.ravel() for one in np.indices((n_sources, n_rows)))
    edits = [
        Edits(
            site="resid_post", layer=block,
            cells=(source * len(blocks) + place) * n_rows + row,
            positions=where.cpu().numpy()[row, 0],
            write=Enriched(
                mode, coefficient, states.flatten(0, 1),
                entering=None if base is None else base[block, :, 0],
                of=source * n_rows + row, rows=row,
            ),
        )
        for place, block in enumerate(blocks)
    ]  # fmt: skip
    found, noise = measured.swept(n_sources * len(blocks), edits)
    axes = {"source": tuple(range(n_sources)), "layer": tuple(blocks)}
    return measured.result(axes, found, noise, site="resid_post", mode=mode)


def enriching_states(
    rows: Float[Tensor, "depth batch d_model"],
    source: int,
    controls: Collection[EnrichControl],
    draws: Sequence[np.random.Generator],
    other: Float[Tensor, "depth batch d_model"] | None = None,
) -> dict[str, Float[Tensor, "batch d_model"]]:
    """The states of a depth, as ``self``, and by name what should not help as they do.

    Args:
        rows: of every depth 0..L, such as ``residual_rows(model, x)[:, :, 0]``.
        source: the depth.
        controls: ``other_depth`` is another one below L, drawn for each row; ``other_clip`` the
            same depth of other prompts; ``noise`` random directions of the same length.
        draws: of each row.
        other: rows of the other prompts; without them there is no such control.
    """
    states = {"self": rows[source]}
    depths = [depth for depth in range(len(rows) - 1) if depth != source]
    if "other_depth" in controls and depths:
        at = torch.tensor([depths[rng.integers(len(depths))] for rng in draws], device=rows.device)
        states["other_depth"] = rows[at, torch.arange(len(at), device=rows.device)]
    if "other_clip" in controls and other is not None:
        states["other_clip"] = other[source]
    if "noise" in controls:
        noise = np.stack([rng.standard_normal(rows.shape[-1]) for rng in draws])
        direction = F.normalize(torch.from_numpy(noise), dim=-1)
        length = states["self"].double().norm(dim=-1, keepdim=True).cpu()
        states["noise"] = (length * direction).to(rows)
    return states
