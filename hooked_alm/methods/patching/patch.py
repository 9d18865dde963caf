"""Activation patching: sweeps over layers, heads or neurons, and places (blocks S-3, S-12).

``engine="fast"`` answers all cells in one pass over the blocks (``hooked_alm.engine``);
``engine="hooks"`` is the plain loop, one ``run_with_hooks`` per cell, that a reader can check by
eye. Both give the same numbers, to rounding.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Unpack, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.cells import Edits, Indices, Write
from ...engine.record import Record, on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import SITES, Site, hook_name, sites_of
from .choice import Choice, per_query_head
from .donors import Donor, DonorValues, Mean, run_of
from .measurement import Measurement, in_precision
from .metrics import Metric, OnLogits
from .options import Engine, NodeOptions, PatchMode, PatchOptions, takes
from .placement import Chosen, Placement, Spots
from .results import PatchResult
from .run_pair import RunPair


@dataclass(frozen=True, eq=False)
class DonorWrite:
    """New values of a site from its own, ``a``, and a donor's, ``d``: a rule of the engine."""

    mode: PatchMode
    coefficient: float | Float[np.ndarray, " entry"]
    """Of all entries, or of each."""
    values: Callable[[Chosen, Chosen | None], Tensor | float]
    """The donor's at some spots; called when cells run, so that no sweep holds them all."""
    spots: Chosen
    """Spot of every entry."""
    units: Chosen | None = None

    def __call__(self, own: Float[Tensor, " entry *features"], entries: Indices) -> Tensor:
        """New values of some entries."""
        c: float | Tensor
        if isinstance(given := self.coefficient, np.ndarray):
            c = on_device(given[entries], own).reshape(-1, *[1] * (own.ndim - 1))
        else:
            c = given
        if self.mode == "scale":
            return c * own
        d = self.values(self.spots[entries], None if self.units is None else self.units[entries])
        d = d.to(own) if isinstance(d, Tensor) else torch.full_like(own, d)
        if self.mode == "replace":
            return d
        return (1 - c) * own + c * d if self.mode == "interpolate" else own + c * d


def edits_of_nodes(
    choice: Choice,
    site: Site,
    spots: Spots,
    n_rows: int,
    write: Callable[[int, Chosen, Chosen | None], Write],
    donors: Sequence[Record] | None = None,
    n_copies: int = 1,
) -> list[Edits]:
    """Edits of every cell of a sweep over nodes, those of a layer together.

    Args:
        choice: layers, units and places.
        site: what is edited.
        spots: positions of the places.
        n_rows: number of rows of the batch.
        write: layer, and spot and unit of every entry -> the rule.
        donors: runs whose rows are written as they are, one per row of the batch.
        n_copies: times that every cell is there, one sweep behind the other.
    """
    per_unit = len(choice.places) * n_rows
    per_layer = len(choice.units) * per_unit
    of, units = np.zeros(1, int), None
    if choice.unit is not None:
        joint = [one for one in choice.units if one is not None]
        of = np.repeat(np.arange(len(joint)), [len(one) for one in joint])
        units = np.repeat([unit for one in joint for unit in one], len(spots.cells))
    spot = np.tile(np.arange(len(spots.cells)), len(of))
    cells = np.repeat(of, len(spots.cells)) * per_unit + spots.cells[spot]
    copy = np.repeat(np.arange(n_copies), len(cells)) * len(choice.layers) * per_layer
    cells, spot = copy + np.tile(cells, n_copies), np.tile(spot, n_copies)
    units = None if units is None else np.tile(units, n_copies)
    # No row of the donor is what stands between two of them.
    sources = None if donors is None else np.where(spots.weight == 0, spots.lower, -1)[spot]
    return [
        Edits(
            site=site, layer=layer, cells=i * per_layer + cells,
            positions=spots.positions[spot], units=units, write=write(layer, spot, units),
            donors=donors, sources=sources,
        )
        for i, joint_layers in enumerate(choice.layers)
        for layer in joint_layers
    ]  # fmt: skip


@torch.no_grad()
def run_pair(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput | None,
    metric: Metric | OnLogits,
    sites: Sequence[Site],
    engine: Engine = "fast",
) -> RunPair:
    """Run a base and its donor once, for ``patch`` and ``donor_distance`` at any of some sites.

    All of these activations are held at once.

    Args:
        model: as in ``patch``, and so are ``base``, ``metric`` and ``engine``.
        base: a single prompt may stand beside any number of donors; see ``RunPair.towards``.
        donor: prompts, or None for a donor that is none.
        sites: that are read.

    Raises:
        InputError: what ``patch`` raises of these.
    """
    names = sorted({hook_name(site, block) for site in sites for block in model.path})
    measured = Measurement(
        model, base, donor, metric, engine=engine, keep=names, keep_of_donor=names
    )
    return RunPair(measured.base_runs, measured.donor_runs)


@torch.no_grad()
@takes(PatchOptions)
def patch(
    model: HookedALM,
    base: ALMInput,
    donor: Donor,
    metric: Metric | OnLogits,
    *,
    runs: RunPair | None = None,
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
        runs: of ``base`` and ``donor`` in this model as it is, where they ran already.

    Returns:
        Axes ``coefficient`` if several were given, ``layer``, ``head`` (``kv_head``, ``neuron``) if
        these were given, ``place``, ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: batches of different size, layers, heads or neurons that do not exist or that
            the site does not have, places that do not align, coefficients that are no numbers, or
            hooks on the model.
    """
    check_node_options("patching", model, options)
    site, mode, coefficient = options["site"], options["mode"], options["coefficient"]
    strengths = _checked_coefficients(options["coefficients"])
    other_model = options["donor_model"]
    if runs is not None and (other_model or options["splice"] or options["precision"] != "model"):
        raise InputError(
            "patching between runs that were made before: they are of the model as it is. Leave "
            "out donor_model, splice and precision, or runs."
        )
    models = (model,) if other_model in (None, model) else (model, other_model)
    with (
        in_precision(options["precision"], *models),
        per_query_head(model, options["kv"] == "query" and site in ("k", "v")),
    ):
        other = run_of(donor)
        # Rows of a memory are the encoder's.
        placed = model.towards("encoder") if SITES[site].is_of_memory else model
        choice = Choice.of(model, placed.positions_of(base).shape[1], options)
        placement = Placement(placed, base, other, choice.places, options["policy"])
        if model.part is not None and other is not None and mode == "replace":
            _warn_of_whole_clips(placement, site)
        if other_model is not None and other is None and not isinstance(donor, Mean):
            raise InputError(
                f"patching with donor {donor!r} and a donor_model: that donor is no run, so "
                "there is nothing for another model to run. Give prompts, or a Mean of some."
            )
        read = options["donor_site"] or site
        _check_donor_site(model, read, site)
        values_of = placed
        if other_model is not None:
            values_of = other_model if placed is model else other_model.towards("encoder")
        values = DonorValues(values_of, donor, placement)
        names = sorted({hook_name(read, model.path[b]) for joint in choice.layers for b in joint})
        measured = Measurement(
            model, base, other, metric, engine=options["engine"], max_bytes=options["max_bytes"],
            keep=names if values.reads_base and mode != "scale" else (),
            keep_of_donor=names if other is not None else (), donor_model=other_model,
            splice=options["splice"], runs=runs,
        )  # fmt: skip
        if mode != "scale":
            values.read(read, names, measured)
        # Whole rows of another run's same site, which the engine may splice in.
        # Those of another model are not what this one makes of them further up.
        is_whole = mode == "replace" and choice.unit is None and read == site
        # Nor are those of a spliced run, whose spans may be others.
        is_whole &= other_model in (None, model) and options["splice"] is None

        def write(layer: int, spots: Chosen, units: Chosen | None) -> DonorWrite:
            theirs = partial(values.values, hook_name(read, model.path[layer]))
            # Entries of one coefficient stand together.
            c = coefficient if strengths is None else strengths.repeat(len(spots) // n_copies)
            return DonorWrite(mode, c, theirs, spots, units)

        donors = (values.records(measured) if is_whole else None) or None
        n_copies = 1 if strengths is None else len(strengths)
        edits = edits_of_nodes(choice, site, placement.spots, len(base), write, donors, n_copies)
        n_cells = n_copies * len(choice.layers) * len(choice.units) * len(choice.places)
        found, noise = measured.swept(n_cells, edits)
        axes = choice.axes
        if strengths is not None:
            axes = {"coefficient": tuple(options["coefficients"] or ()), **axes}
        return measured.result(
            axes, found, noise, site=site, mode=mode, length_ratios=placement.length_ratios
        )


def _checked_coefficients(given: Sequence[float] | None) -> Float[np.ndarray, " copy"] | None:
    """Coefficients of a sweep over several.

    Raises:
        InputError: there are none, or one is no number.
    """
    if given is None:
        return None
    found = np.asarray(given, np.float32)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise InputError(f"patching with coefficients {given!r}: expected some finite numbers.")
    return found


def _check_donor_site(model: HookedALM, read: Site, site: Site) -> None:
    """Refuse values of another shape, or of other rows.

    Raises:
        InputError: the sites' axes differ; query and kv heads may be as many.
    """
    if read not in sites_of(model.path_cfg):
        raise InputError(f"patching {site} with donor_site {read!r}: the blocks have no such site.")
    axes = [SITES[one].axes for one in (read, site)]
    if model.path_cfg.n_groups == 1:
        axes = [one.replace("kv_head", "head") for one in axes]
    if axes[0] != axes[1]:
        raise InputError(
            f"patching {site} [{SITES[site].axes}] with donor_site {read!r} [{SITES[read].axes}]: "
            "expected values of the same axes."
        )


def _warn_of_whole_clips(placement: Placement, site: Site) -> None:
    """Say where a sweep over depths shows one number: the encoder is the donor's from there on."""
    base = placement.base
    for place, rows in zip(placement.places, placement.alignments, strict=True):
        is_whole = all(
            one.base == one.lower and {*one.base} == {*base.is_real[row].nonzero()[0].tolist()}
            for row, one in enumerate(rows)
        )
        if is_whole and site.startswith("resid"):
            warnings.warn(
                f"patching {site} of the encoder at {place!r}: every row becomes the donor's, and "
                "so does what the encoder says, at any depth. Patch some of the rows to learn "
                "where.",
                stacklevel=5,  # past this function, `patch` and its two decorators
            )


def check_node_options(attempt: str, model: HookedALM, options: NodeOptions) -> None:
    """Refuse a mode that does not exist, or a site that the model's blocks do not have.

    Raises:
        InputError: either of them.
    """
    for what, given, known in (
        ("mode", options["mode"], get_args(PatchMode)),
        ("site", options["site"], sites_of(model.path_cfg)),
    ):
        if given not in known:
            raise InputError(
                f"{attempt} with {what} {given!r}: expected one of {', '.join(known)}."
            )
