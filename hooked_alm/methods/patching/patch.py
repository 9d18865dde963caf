"""Activation patching: sweeps over layers, heads or neurons, and places (blocks S-3, S-12).

``engine="fast"`` answers all cells in one pass over the blocks (``hooked_alm.engine``);
``engine="hooks"`` is the plain loop, one ``run_with_hooks`` per cell, that a reader can check by
eye. Both give the same numbers, to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...engine.cells import SITES, Cell, DonorRows, Edit, Site, site_name
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from .alignment import AlignPolicies, Place, Window
from .donors import Donor, DonorValues
from .measurement import Engine, Measurement
from .metrics import Metric, OnLogits
from .results import PatchResult

PatchMode = Literal["replace", "interpolate", "add", "scale"]
Joint = int | Sequence[int]
"""One index, or several patched at once."""


@dataclass(frozen=True, eq=False)
class Write:
    """New values of some units of a site from its own, ``a``, and a donor's, ``d``."""

    mode: PatchMode
    coefficient: float
    donor: Callable[[], Tensor | float]
    """Called when the cell is computed, so that no sweep holds all its values."""
    units: tuple[int, ...] | None = None
    """Heads or neurons; None is all."""

    def __call__(self, value: Tensor) -> Tensor:
        """From and to ``[pos, *features]``."""
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
def patch(
    model: HookedALM,
    base: ALMInput,
    donor: Donor,
    metric: Metric | OnLogits,
    *,
    site: Site = "resid_post",
    layers: Sequence[Joint] | None = None,
    heads: Sequence[Joint] | Literal["each"] | None = None,
    neurons: Sequence[Joint] | Literal["each"] | None = None,
    places: Sequence[Place] | Literal["each"] = ("audio",),
    mode: PatchMode = "replace",
    coefficient: float = 1.0,
    policy: AlignPolicies = "error",
    kv: Literal["group", "query"] = "group",
    donor_site: Site | None = None,
    engine: Engine = "fast",
    max_bytes: int | None = None,
) -> PatchResult:
    """Patch every cell of {layers} x {heads or neurons} x {places}, one at a time.

    Args:
        model: to run.
        base: prompts to be patched.
        donor: as many prompts, whose activations are written in; or ``Mean``, ``Noise``, ``"zero"``
            (ablation), ``"self"`` (for ``mode="scale"``, and to see rounding).
        metric: what is read off each run; see ``metrics``.
        site: resid_post of block b is depth b + 1, resid_pre depth b; z is before the output
            projection; q, k, v before rotation; pre, gate and post are the MLP's neurons. With
            pattern, places are query positions, and whole rows of the pattern are written.
        layers: blocks; None is each. A tuple patches several at once.
        heads: with z, q and pattern, query heads; with k and v, kv heads. None is all at once.
        neurons: with pre, gate and post. None is all at once.
        places: span names (``"readout"`` among them), ``Window`` of seconds, positions, ``"all"``,
            or tuples of these, patched at once; the string "each" is every position of the prompt,
            one by one.
        mode: ``replace`` writes d; ``interpolate`` ``(1 - c) a + c d``; ``add`` ``a + c d``;
            ``scale`` ``c a``.
        coefficient: c.
        policy: for places of unequal length, see ``align``.
        kv: "query" patches k and v once per query head instead of per kv head.
        donor_site: where the donor's values are read, if not at ``site``; to reproduce work that
            took them elsewhere.
        engine: "fast", or "hooks" for the plain loop.
        max_bytes: memory budget of the fast engine; None takes a quarter of what is free, on a
            CPU at most 128 MiB.

    Returns:
        Axes ``layer``, ``head`` (``kv_head``, ``neuron``) if these were given, ``place``,
        ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: batches of different size, layers, heads or neurons that do not exist or that
            the site does not have, places that do not align, or hooks on the model.
    """
    for what, given, known in (("mode", mode, get_args(PatchMode)), ("site", site, tuple(SITES))):
        if given not in known:
            raise InputError(f"patching with {what} {given!r}: expected one of {', '.join(known)}.")
    with per_query_head(model, kv == "query" and site in ("k", "v")):
        blocks = joint_indices("layer", layers, len(model.path))
        unit, units = units_of(model, site, heads, neurons)
        where = list(range(base.shape[1])) if places == "each" else list(places)
        values = DonorValues(model, base, donor, where, policy)
        read = donor_site or site
        names = sorted({site_name(read, model.path[b]) for joint in blocks for b in joint})
        measured = Measurement(
            model, base, values.run, metric, engine=engine, max_bytes=max_bytes,
            keep=names if values.reads_base and mode != "scale" else (),
            keep_of_donor=names if values.run is not None else (),
        )  # fmt: skip
        if mode != "scale":
            values.read(read, names, measured)
        # Whole rows of another run's same site, which the engine may splice in.
        records = values.records(measured) if donor_site in (None, site) else []

        def edit(layer: int, heads: tuple[int, ...] | None, place: int, row: int) -> Edit:
            alignment = values.alignments[place][row]
            name = site_name(read, model.path[layer])
            theirs = partial(values.values, name, row, place, heads)
            is_whole = mode == "replace" and heads is None and alignment.is_exact
            return Edit(
                site=site,
                layer=layer,
                positions=alignment.base,
                write=Write(mode, coefficient, theirs, heads),
                donor=DonorRows(records[row], alignment.lower) if records and is_whole else None,
            )

        found = measured.values(
            [
                [
                    Cell(row, tuple(edit(b, h, place, row) for b in joint))
                    for row in range(len(base))
                ]
                for joint, h, place in product(blocks, units, range(len(where)))
            ]
        )
        axes = {"layer": joint_ticks(blocks), **({unit: joint_ticks(units)} if unit else {})}
        axes["place"] = place_ticks(where)
        return measured.result(
            axes,
            found,
            site=site,
            mode=mode,
            length_ratios=values.length_ratios,
        )


def joint_indices(what: str, chosen: Any, size: int) -> list[tuple[int, ...]]:
    """Indices to patch, each on its own or several at once.

    Raises:
        InputError: one that does not exist.
    """
    each = chosen is None or isinstance(chosen, str)
    joint = [(i,) if isinstance(i, int) else tuple(i) for i in (range(size) if each else chosen)]
    if wrong := sorted({i for one in joint for i in one if not 0 <= i < size}):
        raise InputError(f"choosing {what} {wrong}: the model has {what}s 0 to {size - 1}.")
    return joint


def units_of(
    model: HookedALM, site: Site, heads: Any, neurons: Any
) -> tuple[str | None, list[Any]]:
    """The axis of heads or neurons, if one was asked for, and what is patched along it."""
    unit, cfg = SITES[site].unit, model.cfg
    for name, given, fitting in (
        ("heads", heads, ("head", "kv_head")),
        ("neurons", neurons, ("neuron",)),
    ):
        if given is not None and unit not in fitting:
            have = [s for s, facts in SITES.items() if facts.unit in fitting]
            raise InputError(f"patching {name} {given} of {site}: only {', '.join(have)} have any.")
    chosen = heads if neurons is None else neurons
    if chosen is None:
        return None, [None]
    sizes = {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads, "neuron": cfg.d_mlp}
    assert unit is not None
    return unit, joint_indices(unit.replace("_", " "), chosen, sizes[unit])


def place_ticks(places: Sequence[Place]) -> tuple[Any, ...]:
    """Places as coordinates."""
    return tuple(p if isinstance(p, str | int | Window) else tuple(p) for p in places)


def joint_ticks(joint: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
    """Indices as coordinates: single ones as they are, several as a tuple."""
    return tuple(one[0] if len(one) == 1 else one for one in joint)


@contextmanager
def per_query_head(model: HookedALM, is_wanted: bool) -> Iterator[None]:
    """Keys and values of every query head, for a while."""
    before = model.cfg.ungroup_grouped_query_attention
    model.set_ungroup_grouped_query_attention(is_wanted or before)
    try:
        yield
    finally:
        model.set_ungroup_grouped_query_attention(before)
