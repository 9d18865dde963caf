"""Edits of rows as cells of a sweep: what ``splice_hooks`` puts into one run, many in one pass."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.cells import Edits, Given
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ..activations.collect import rows_of
from ..dictionary.splice import RowEdit
from .alignment import AlignPolicies, Place
from .features import place_of
from .measurement import Measurement
from .metrics import Metric, OnLogits
from .options import Engine
from .placement import Placement
from .results import PatchResult


@torch.no_grad()
def aligned_rows(
    model: HookedALM,
    base: ALMInput,
    other: ALMInput,
    point: str,
    place: str = "audio",
    policy: AlignPolicies = "error",
) -> list[Float[Tensor, "_row d_in"]]:
    """What other prompts hold at a point, prompt by prompt, a row for each of the base's.

    Args:
        model: to run.
        base: prompts that are to be edited; or the others themselves, for their own rows.
        other: as many prompts, which run.
        point: hook point of the decoder or the audio encoder.
        place: a span.
        policy: where spans are not as long as each other; see ``align``.

    Raises:
        InputError: spans that do not align, or that prompts lack.
    """
    ((kind, found),) = rows_of(model, other, point, place).items()
    part = model.towards("encoder") if kind == "encoder" else model
    spots = Placement(part, base, other, [place], policy).spots
    x = part.positions_of(other)
    is_there = x.spans.mask(place) & torch.from_numpy(x.is_real)
    rows = found.values[point]
    grid = rows.new_zeros(*is_there.shape, rows.shape[1])
    grid[is_there.to(rows.device)] = rows
    return [spots.of_donor(grid, np.flatnonzero(spots.rows == row)) for row in range(len(base))]


@torch.no_grad()
def patch_rows(
    model: HookedALM,
    base: ALMInput,
    metric: Metric | OnLogits,
    edits: Mapping[str, Sequence[RowEdit]],
    point: str,
    place: Place = "audio",
    *,
    engine: Engine = "fast",
    max_bytes: int | None = None,
) -> PatchResult:
    """Patch the rows of a place by every edit, one at a time.

    Args:
        model: to run.
        base: prompts to be patched.
        metric: what is read off each run; see ``metrics``.
        edits: name -> an edit for each prompt, which is given its rows of the place in their order,
            in fp32.
        point: hook point in a block, of the decoder or the audio encoder, that holds whole rows.
        place: spans or positions whose rows are edited together.
        engine: "fast", or "hooks" for a run of its own for every edit.
        max_bytes: memory budget of the fast engine; see ``patch``.

    Returns:
        Axes ``edit``, ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: no edits, or not one for each prompt; a point that is none of the stream or of
            what blocks add to it; a place that no prompt has.
    """
    sizes = {len(one) for one in edits.values()}
    if sizes != {len(base)}:
        raise InputError(
            f"patching rows of {len(base)} prompts: got {len(edits)} edits for {sorted(sizes)} "
            "prompts each, expected one or more, for each prompt."
        )
    model, site, layer = place_of(model, point)
    spots = Placement(model, base, None, [place]).spots
    measured = Measurement(
        model, base, None, metric, keep=[point], engine=engine, max_bytes=max_bytes
    )
    own = spots.of_base(measured.base_runs.kept[point], np.arange(len(spots.rows)))
    of_row = [np.flatnonzero(spots.rows == row) for row in range(len(base))]
    new = torch.cat([
        edit(own[mine].float()).to(own)
        for some in edits.values()
        for edit, mine in zip(some, of_row, strict=True)
    ])  # fmt: skip
    order = np.tile(np.concatenate(of_row), len(edits))
    copy = np.repeat(np.arange(len(edits)), len(spots.rows))
    marks = Edits(
        site=site, layer=layer, cells=copy * len(base) + spots.rows[order],
        positions=spots.positions[order], write=Given(new),
    )  # fmt: skip
    found, noise = measured.swept(len(edits), [marks])
    return measured.result({"edit": (*edits,)}, found, noise, site=site, mode="replace")
