"""Choice of what a sweep over nodes patches: layers, heads or neurons, places; coordinates."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...errors import InputError
from ...model import HookedALM
from ...points import SITES, sites_of
from ...turns import restored
from .alignment import Place, Window
from .options import NodeOptions

Units = tuple[int, ...] | None
"""Heads or neurons that are patched together; None is all."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Layers, units and places of a sweep over nodes."""

    layers: list[tuple[int, ...]]
    """Blocks, in tuples that are patched together."""
    unit: str | None
    """Name of the units' axis (head, kv_head, neuron), if any were chosen."""
    units: list[Units]
    places: list[Place]

    @classmethod
    def of(cls, model: HookedALM, n_positions: int, options: NodeOptions) -> "Choice":
        """Layers, units and places that the options of a sweep name.

        Args:
            model: to be swept.
            n_positions: number of positions, where each is a place.
            options: of the sweep.

        Raises:
            InputError: layers, heads or neurons that do not exist or that the site does not have.
        """
        unit, units = _units(model, options)
        places = options["places"]
        return cls(
            layers=_joint_indices("layer", options["layers"], len(model.path)),
            unit=unit,
            units=units,
            places=list(range(n_positions)) if places == "each" else list(places),
        )

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Axes of the sweep, with their coordinates."""
        units = {} if self.unit is None else {self.unit: _joint_ticks(self.units)}
        return {"layer": _joint_ticks(self.layers), **units, "place": place_ticks(self.places)}


def _joint_indices(what: str, chosen: Any, size: int) -> list[tuple[int, ...]]:
    """Indices to patch, each on its own or several at once."""
    each = chosen is None or isinstance(chosen, str)
    joint = [(i,) if isinstance(i, int) else tuple(i) for i in (range(size) if each else chosen)]
    if wrong := sorted({i for one in joint for i in one if not 0 <= i < size}):
        raise InputError(f"choosing {what} {wrong}: the model has {what}s 0 to {size - 1}.")
    return joint


def _units(model: HookedALM, options: NodeOptions) -> tuple[str | None, list[Units]]:
    """The axis of heads or neurons, if one was asked for, and what is patched along it."""
    site, heads, neurons = options["site"], options["heads"], options["neurons"]
    unit, cfg = SITES[site].unit, model.path_cfg
    for name, given, fitting in (
        ("heads", heads, ("head", "kv_head")),
        ("neurons", neurons, ("neuron",)),
    ):
        if given is not None and unit not in fitting:
            have = [one for one in sites_of(cfg) if SITES[one].unit in fitting]
            raise InputError(f"patching {name} {given} of {site}: only {', '.join(have)} have any.")
    chosen = heads if neurons is None else neurons
    if chosen is None:
        return None, [None]
    sizes = {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads, "neuron": cfg.d_mlp}
    assert unit is not None
    return unit, [*_joint_indices(unit.replace("_", " "), chosen, sizes[unit])]


def place_ticks(places: Sequence[Place]) -> tuple[Any, ...]:
    """Places as coordinates."""
    return tuple(p if isinstance(p, str | int | Window) else tuple(p) for p in places)


def _joint_ticks(joint: Sequence[Units]) -> tuple[Any, ...]:
    """Indices as coordinates: single ones as they are, several as a tuple."""
    return tuple(one[0] if one is not None and len(one) == 1 else one for one in joint)


@contextmanager
def per_query_head(model: HookedALM, is_wanted: bool) -> Iterator[None]:
    """Compute keys and values once per query head within the context, if that is wanted."""
    with model.turn.running():
        before = model.cfg.ungroup_grouped_query_attention
        with restored(partial(model.set_ungroup_grouped_query_attention, before)):
            model.set_ungroup_grouped_query_attention(is_wanted or before)
            yield
