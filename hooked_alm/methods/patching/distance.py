"""How far a patch moves what it writes over: the distance from a run to its donor, in every cell.

Of two sites the one that is moved farther may do more for that alone (M-BT-4).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.record import on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import SITES, Site, hook_name
from .alignment import AlignPolicies, Place
from .choice import Choice
from .donors import Donor, run_of
from .options import Joint, NodeOptions
from .patch import check_node_options
from .placement import Placement
from .run_pair import RunPair

Distances = Float[np.ndarray, "layer *unit place example"]


@torch.no_grad()
def donor_distance(
    model: HookedALM,
    base: ALMInput,
    donor: Donor,
    *,
    site: Site = "resid_post",
    layers: Sequence[Joint] | None = None,
    heads: Sequence[Joint] | Literal["each"] | None = None,
    places: Sequence[Place] = ("audio",),
    policy: AlignPolicies = "error",
    runs: RunPair | None = None,
) -> Distances:
    """Distances ‖d − a‖ between what a run and its donor have in every cell of a sweep.

    It is the Euclidean norm over the positions and features of the cell. ``patch`` moves the site
    so far with ``mode="replace"``, and c times as far with ``interpolate``.

    Args:
        model: to run.
        base: as in ``patch``, and so are the other options.
        donor: a run, or ``"zero"``.
        site: any but a pattern, whose rows are not added to anything.
        layers: as in ``patch``.
        heads: as in ``patch``; with them there is an axis of heads.
        places: as in ``patch``.
        policy: as in ``patch``.
        runs: of both, from ``run_pair``, where they ran already.

    Returns:
        Distances in float64, axes as those of ``patch``.

    Raises:
        InputError: what ``patch`` raises of these; a donor that is neither; a pattern.
    """
    other = run_of(donor)
    if other is None and donor != "zero":
        raise InputError(f"measuring the distance to {donor!r}: expected prompts, or 'zero'.")
    if site.endswith("pattern"):
        raise InputError("measuring a distance at the pattern: take what it attends with, at z.")
    options: NodeOptions = {
        "site": site, "layers": layers, "heads": heads, "neurons": None, "places": places,
        "mode": "replace", "policy": policy,
    }  # fmt: skip
    check_node_options("measuring a distance", model, options)
    placed = model.towards("encoder") if SITES[site].is_of_memory else model
    choice = Choice.of(model, placed.positions_of(base).shape[1], options)
    placement = Placement(placed, base, other, choice.places, policy)
    names = [hook_name(site, block) for block in model.path]
    if runs is not None:
        runs.check(names)
        ours, theirs = runs.base.kept, None if runs.donor is None else runs.donor.kept
    else:
        ours = _kept(model, base, names)
        theirs = None if other is None else _kept(model, other, names)
    spots = placement.spots
    every, n_units = np.arange(len(spots.cells)), len(choice.units)
    found = np.zeros((len(choice.layers), n_units, len(choice.places) * len(base)))
    for i, joint in enumerate(choice.layers):
        for layer in joint:
            a = spots.of_base(ours[names[layer]], every).double()
            if theirs is not None:
                a = spots.of_donor(theirs[names[layer]], every).double() - a
            # Of each head, or of all that there is.
            squares = a.square().flatten(2).sum(-1) if choice.unit else a.flatten(1).square().sum(1)
            for j, units in enumerate(choice.units):
                mine = squares if units is None else squares[:, [*units]].sum(-1)
                sums = mine.new_zeros(found.shape[-1])
                found[i, j] += sums.index_add_(0, on_device(spots.cells, sums), mine).cpu().numpy()
    shape = (len(choice.layers), *([n_units] if choice.unit else []), len(choice.places), len(base))
    return np.sqrt(found).reshape(shape)


def _kept(model: HookedALM, x: ALMInput, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations by hook name; those of the encoder by prompt."""
    _, kept = model.run_with_cache(x, names_filter=list(names), return_cache_object=False)
    return dict(kept) if model.part is None else model.encoder_rows(x).kept(kept)
