"""Cells that run through a block together: their rows, what they read, what is done to them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..components.rotary import RotaryTables
from ..points import Site
from ..stacks import Stack
from .cells import Indices, Marks
from .record import KeyValue, Record, on_device
from .rows import CellRows

FlatStream = Float[Tensor, "_flat d_model"]
"""The residual stream at the rows of some cells, one cell after the other."""
FlatKeyValue = tuple[Float[Tensor, "kv_head _flat d_head"], Float[Tensor, "kv_head _flat d_head"]]
Mask = Bool[Tensor, "#kv #group #cell row key"]


class Placed(NamedTuple):
    """Entries of some marks at their places among the rows of a bundle."""

    turn: int
    """Place of the marks among all, in the order in which they act."""
    mark: Marks
    entries: Indices
    cells: Indices
    places: Indices


class InMemory(NamedTuple):
    """Entries of some marks at keys or values of what cells read by cross-attention."""

    mark: Marks
    entries: Indices
    cells: Indices
    rows: Indices
    """Positions of the memory."""


@dataclass(eq=False, kw_only=True)
class Bundle:
    """Cells of one record that run together, reading the same earlier keys and values."""

    record: Record
    rows: CellRows
    """Rows that run."""
    resid: FlatStream
    shared: KeyValue
    """Keys and values that all cells read, held once (rule 3)."""
    shared_rows: Int[np.ndarray, " key"]
    own_rows: CellRows | None = None
    """Rows of which each cell has keys of its own, in place of the shared ones."""
    own: FlatKeyValue | None = None
    """Keys and values of ``own_rows``; None if they are made of the very rows that run."""
    is_base: bool = False
    """Whether the cells are the base run but for the edits of this block: then only heads that
    these touch are mixed anew."""
    marks: list[Placed] = field(default_factory=list)
    layer: int = 0
    """Index of the block along the path."""
    of_memory: list[InMemory] = field(default_factory=list)
    """Entries at keys and values of the memory."""
    masks: dict[object, Tensor | None] = field(default_factory=dict)
    """Masks of earlier blocks, where bundles of one group share them."""

    def at(self, *sites: Site) -> list[Placed]:
        """Entries at some sites."""
        return [placed for placed in self.marks if placed.mark.site in sites]

    def own_by_cell(self, fresh: FlatKeyValue) -> tuple[Tensor, Tensor] | None:
        """Keys and values of each cell's own, of the rows that run if the bundle was given none."""
        if self.own_rows is None:
            return None
        keys, values = (self.own_rows.by_cell(part) for part in self.own or fresh)
        return keys, values

    def visible(self, stack: Stack, window: int | None, like: Tensor) -> Mask | None:
        """True where a row of a cell attends to a key, its own behind the shared ones.

        Cells are one if all have the same rows. None if every row attends to every key.
        """
        own_of = self.rows.of if self.own_rows is None else self.own_rows.of
        pairs, kind = np.unique(np.stack([self.rows.of, own_of]), axis=1, return_inverse=True)
        sets = [self.rows.sets.sets[of].tobytes() for of in pairs[0]]
        if self.own_rows is not None:
            sets += [self.own_rows.sets.sets[of].tobytes() for of in pairs[1]]
        key = stack, window, self.own_rows is None, *sets, self.shared_rows.tobytes(), like.device
        if key not in self.masks:
            seen = self._seen(stack, window, *pairs)
            self.masks[key] = None if bool(seen.all()) else seen.to(like.device, non_blocking=True)
        mask = self.masks[key]
        if mask is None:
            return None
        return (mask if len(mask) == 1 else mask[on_device(kind, mask)])[None, None]

    def _seen(
        self,
        stack: Stack,
        window: int | None,
        of: Int[np.ndarray, " kind"],
        own_of: Int[np.ndarray, " kind"],
    ) -> Bool[Tensor, "kind row key"]:
        """What cells see that have one set of rows, and one of own keys."""
        rows = self.rows.sets.padded(of, self.rows.longest)
        keys = np.tile(self.shared_rows, (len(of), 1))
        is_key = np.ones(keys.shape, bool)
        if self.own_rows is not None:
            own = self.own_rows.sets
            is_key = own.place[own_of][:, self.shared_rows] < 0
            is_own = np.arange(self.own_rows.longest) < own.sizes[own_of][:, None]
            is_key = np.concatenate([is_key, is_own], axis=1)
            keys = np.concatenate([keys, own.padded(own_of, self.own_rows.longest)], axis=1)
        if self.record.is_seen is not None:
            is_key = is_key & self.record.is_seen[keys]
        at, key_at = torch.from_numpy(rows)[:, :, None], torch.from_numpy(keys)[:, None]
        place = torch.from_numpy(self.record.place)
        seen = stack.sees(place[at], place[key_at]) & torch.from_numpy(is_key)[:, None]
        if window is not None:
            # Windows count padded positions, as the masks of a whole run do.
            where = self.record.where
            seen &= where[key_at] > where[at] - window
        return seen


def rotary_tables(
    parts: Sequence[tuple[Record, Int[np.ndarray, " _row"]]], device: torch.device
) -> RotaryTables | None:
    """Tables ``cos`` and ``sin`` of some rows of some records on a device, ``[1, row, d_head]``."""
    tables = [
        [table[on_device(rows, table)] for table in record.rotary]
        for record, rows in parts
        if record.rotary is not None
    ]
    if not tables:
        return None
    cos, sin = (torch.cat(some)[None].to(device) for some in zip(*tables, strict=True))
    return cos, sin


def indices(mark: Marks, entries: Indices, places: Indices, like: Tensor) -> tuple[Tensor, ...]:
    """Index of some entries of a mark into a flat activation, given their places there."""
    where = (on_device(places, like),)
    return where if mark.units is None else (*where, on_device(mark.units[entries], like))
