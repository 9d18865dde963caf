"""Activation patching: sweeps over layers, heads or neurons, and places (blocks S-3, S-12).

``engine="fast"`` answers all cells in one pass over the blocks (``hooked_alm.engine``);
``engine="hooks"`` is the plain loop, one ``run_with_hooks`` per cell, that a reader can check by
eye. Both give the same numbers, to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Unpack, get_args

import torch
from torch import Tensor

from ...engine.cells import Cell, DonorRows, Edit
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import SITES, hook_name
from .choice import Choice, Units, per_query_head
from .donors import Donor, DonorValues, run_of
from .measurement import Measurement
from .metrics import Metric, OnLogits
from .options import NodeOptions, PatchMode, PatchOptions, takes
from .placement import Placement
from .results import PatchResult


@dataclass(frozen=True, eq=False)
class DonorWrite:
    """New values of some units of a site from its own, ``a``, and a donor's, ``d``."""

    mode: PatchMode
    coefficient: float
    donor: Callable[[], Tensor | float]
    """Called when the cell is computed, so that no sweep holds all its values."""
    units: Units = None

    def __call__(self, value: Tensor) -> Tensor:
        """New values ``[pos, *features]`` from the site's own."""
        c, units = self.coefficient, self.units
        own = value if units is None else value[:, list(units)]
        new: Tensor | float
        if self.mode == "scale":
            new = c * own
        else:
            d = self.donor()
            d = d.to(value) if isinstance(d, Tensor) else d
            if self.mode == "replace":
                new = d
            else:
                new = (1 - c) * own + c * d if self.mode == "interpolate" else own + c * d
        if units is None:
            return new if isinstance(new, Tensor) else torch.full_like(value, new)
        out = value.clone()
        out[:, list(units)] = new
        return out


@torch.no_grad()
@takes(PatchOptions)
def patch(
    model: HookedALM,
    base: ALMInput,
    donor: Donor,
    metric: Metric | OnLogits,
    **options: Unpack[PatchOptions],
) -> PatchResult:
    """Patch every cell of {layers} x {heads or neurons} x {places}, one at a time.

    Args:
        model: to run.
        base: prompts to be patched.
        donor: as many prompts as ``base``, whose activations are written in; or ``Mean``,
            ``Noise``, ``"zero"`` (ablation), ``"self"`` (for ``mode="scale"``, and to see
            rounding).
        metric: what is read off each run; see ``metrics``.

    Returns:
        Axes ``layer``, ``head`` (``kv_head``, ``neuron``) if these were given, ``place``,
        ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: batches of different size, layers, heads or neurons that do not exist or that
            the site does not have, places that do not align, or hooks on the model.
    """
    check_node_options("patching", options)
    site, mode, coefficient = options["site"], options["mode"], options["coefficient"]
    with per_query_head(model, options["kv"] == "query" and site in ("k", "v")):
        choice = Choice.of(model, base, options)
        other = run_of(donor)
        placement = Placement(model, base, other, choice.places, options["policy"])
        values = DonorValues(model, donor, placement)
        read = options["donor_site"] or site
        names = sorted({hook_name(read, model.path[b]) for joint in choice.layers for b in joint})
        measured = Measurement(
            model, base, other, metric, engine=options["engine"], max_bytes=options["max_bytes"],
            keep=names if values.reads_base and mode != "scale" else (),
            keep_of_donor=names if other is not None else (),
        )  # fmt: skip
        if mode != "scale":
            values.read(read, names, measured)
        # Whole rows of another run's same site, which the engine may splice in.
        records = values.records(measured) if read == site else []

        def edit(layer: int, units: Units, place: int, row: int) -> Edit:
            alignment = placement.alignments[place][row]
            theirs = partial(values.values, hook_name(read, model.path[layer]), row, place, units)
            is_whole = mode == "replace" and units is None and alignment.is_exact
            return Edit(
                site=site,
                layer=layer,
                positions=alignment.base,
                write=DonorWrite(mode, coefficient, theirs, units),
                donor=DonorRows(records[row], alignment.lower) if records and is_whole else None,
            )

        found = measured.values(
            [
                [
                    Cell(row, tuple(edit(b, units, place, row) for b in joint))
                    for row in range(len(base))
                ]
                for joint, units, place in product(
                    choice.layers, choice.units, range(len(choice.places))
                )
            ]
        )
        return measured.result(
            choice.axes, found, site=site, mode=mode, length_ratios=placement.length_ratios
        )


def check_node_options(attempt: str, options: NodeOptions) -> None:
    """Refuse a mode or site that does not exist.

    Raises:
        InputError: either of them.
    """
    for what, given, known in (
        ("mode", options["mode"], get_args(PatchMode)),
        ("site", options["site"], tuple(SITES)),
    ):
        if given not in known:
            raise InputError(
                f"{attempt} with {what} {given!r}: expected one of {', '.join(known)}."
            )
