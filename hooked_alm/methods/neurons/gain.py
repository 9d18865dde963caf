"""Sets of neurons made stronger or weaker, each set and strength by itself, by the exact engine.

A neuron's value g becomes (1 + alpha) g: alpha = -1 takes it out, 0 changes nothing.

Source: arXiv 2601.03115; M-ESN-3, M-ESN-4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.cells import Edits, Indices
from ...engine.record import on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import sites_of
from ..patching.measurement import Measurement, in_precision
from ..patching.metrics import Metric, OnLogits
from ..patching.options import ExactOptions, Option, PlaceOption, takes
from ..patching.placement import Placement
from ..patching.results import PatchResult
from ..statistics.class_neurons import Neuron
from .activity import NeuronSite


class GainOptions(ExactOptions, PlaceOption, total=False):
    """Options of ``gain_neurons``."""

    site: Annotated[
        NeuronSite,
        Option("gate", '"gate", or "post", which the same gain changes alike: it is the gate\'s '
                       "product with the other factor."),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scaled:
    """Own values times a factor of every entry: a rule of the engine."""

    factors: Float[np.ndarray, " entry"]

    def __call__(self, own: Float[Tensor, " entry"], entries: Indices) -> Tensor:
        """New values of some entries."""
        return own * on_device(self.factors[entries], own).to(own.dtype)


@torch.no_grad()
@takes(GainOptions, place="all")
def gain_neurons(
    model: HookedALM,
    x: ALMInput,
    metric: Metric | OnLogits,
    sets: Sequence[Sequence[Neuron]],
    alphas: Sequence[float],
    weights: Sequence[Float[np.ndarray, "example _neuron"]] | None = None,
    **options: Unpack[GainOptions],
) -> PatchResult:
    """The metric with the neurons of every set at (1 + alpha) times their values, for every alpha.

    Args:
        model: to run.
        x: prompts.
        metric: what is read off each run; see ``metrics``.
        sets: neurons that change together; an empty set changes nothing.
        alphas: strengths.
        weights: of every set, the share of a strength that each of its neurons gets in each prompt:
            a value becomes (1 + alpha * weight) times what it was. None is 1.

    Returns:
        Axes ``set``, ``alpha``, ``example`` and, if the metric has several values, ``label``.
        ``donor``, and so recovery, is NaN.

    Raises:
        InputError: no set or no alpha, neurons that there are not or that a set names twice, blocks
            without such a point, a place that no prompt has, or weights of other shapes.
    """
    site, strengths = options["site"], np.asarray(alphas, np.float64)
    _refuse(model, site, sets, strengths)
    shares = [np.ones((len(x), len(one))) for one in sets] if weights is None else [*weights]
    if [one.shape for one in shares] != [(len(x), len(one)) for one in sets]:
        raise InputError(
            f"changing the gain of neurons: got weights of shapes {[one.shape for one in shares]}, "
            f"expected a row for each of {len(x)} prompts and a column for each of a set's "
            f"{[len(one) for one in sets]} neurons."
        )
    placement = Placement(model, x, None, [options["place"]])
    spots, n_rows = placement.spots, len(x)
    with in_precision(options["precision"], model):
        measured = Measurement(
            model, x, None, metric, engine=options["engine"], max_bytes=options["max_bytes"]
        )
        edits = []
        for layer in sorted({block for one in sets for block, _ in one}):
            # An entry for every set and neuron of this block, strength, and position.
            of = [
                (k, unit, n)
                for k, one in enumerate(sets)
                for n, (block, unit) in enumerate(one)
                if block == layer
            ]
            grid = np.meshgrid(
                range(len(of)), range(len(strengths)), range(len(spots.rows)), indexing="ij"
            )
            member, strength, spot = (one.ravel() for one in grid)
            which, units, _ = np.array(of).T
            share = np.stack([shares[k][:, n] for k, _, n in of])[member, spots.rows[spot]]
            cells = which[member] * len(strengths) + strength
            edits.append(Edits(
                site=site, layer=layer, cells=cells * n_rows + spots.rows[spot],
                positions=spots.positions[spot], units=units[member],
                write=Scaled(1 + strengths[strength] * share),
            ))  # fmt: skip
        found, noise = measured.swept(len(sets) * len(strengths), edits)
        axes = {"set": tuple(range(len(sets))), "alpha": tuple(strengths.tolist())}
        return measured.result(axes, found, noise, site=site, mode="gain")


def _refuse(
    model: HookedALM,
    site: NeuronSite,
    sets: Sequence[Sequence[Neuron]],
    alphas: Float[np.ndarray, " alpha"],
) -> None:
    """Refuse what there is not.

    Raises:
        InputError: see ``gain_neurons``.
    """
    model.refuse_encoder("changing the gain of neurons")
    if site not in sites_of(model.path_cfg):
        raise InputError(f"changing the gain of neurons at {site!r}: the blocks have no such site.")
    if not len(sets) or alphas.ndim != 1 or not len(alphas) or not np.isfinite(alphas).all():
        raise InputError(
            f"changing the gain of {len(sets)} sets of neurons with alphas {alphas.tolist()!r}: "
            "expected a set at least, and some finite numbers."
        )
    n_blocks, width = len(model.path), model.path_cfg.d_mlp
    every = {one for neurons in sets for one in neurons}
    if wrong := sorted((b, n) for b, n in every if not (0 <= b < n_blocks and 0 <= n < width)):
        raise InputError(
            f"changing the gain of neurons {wrong[:5]}: expected blocks 0 to {n_blocks - 1}, "
            f"neurons 0 to {width - 1}."
        )
    if twice := [k for k, neurons in enumerate(sets) if len({*neurons}) < len(neurons)]:
        raise InputError(f"changing the gain of neurons: the sets {twice} name one of them twice.")
