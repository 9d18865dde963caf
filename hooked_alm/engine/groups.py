"""Groups of cells that climb through the blocks together, and what they run at each."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..components.block import Block
from .blocks import own_key_values
from .bundles import Bundle, FlatStream, InMemory, Placed, indices
from .cells import Indices, Marks
from .record import Record, Spliced, on_device
from .rows import CellRows, RowSets

RecordRows = Int[np.ndarray, " _row"]
"""Indices of rows of a record: real positions, pads left out."""
CellIndices = Int[np.ndarray, " cell"]
STREAM, KEYS, ROWS = 0, 1, 2
"""How a cell enters at its first block: by an edit of the stream before it, of keys or values that
all later rows read, or of nothing but its own rows."""


@dataclass(frozen=True, kw_only=True)
class Finals:
    """The residual stream after the last block, of cells of one row of the batch."""

    row: int
    cells: CellIndices
    resid: Float[Tensor, "cell read d_model"]
    """The stream at the rows that were asked for."""


class InGroup(NamedTuple):
    """Entries of some marks in one group: which of its cells, which rows of the record."""

    turn: int
    mark: Marks
    entries: Indices
    cells: Indices
    rows: Indices

    def among(self, cells: CellIndices, n_cells: int) -> "InGroup":
        """The entries of some of the cells, which count in their order from then on."""
        place = np.full(n_cells, -1)
        place[cells] = np.arange(len(cells))
        there = place[self.cells]
        kept = there >= 0
        return self._replace(entries=self.entries[kept], cells=there[kept], rows=self.rows[kept])


class SetsOfCells(NamedTuple):
    """A set of rows for every cell."""

    sets: RowSets
    of: CellIndices

    def rows(self, cells: CellIndices, among: RecordRows | None = None) -> CellRows:
        """Rows of some cells, or those of them that are among others."""
        return CellRows(self.sets if among is None else self.sets.only(among), self.of[cells])

    def of_cells(self, cells: CellIndices) -> "SetsOfCells":
        """The same for some cells, which count in their order from then on."""
        return self._replace(of=self.of[cells])


@dataclass(eq=False)
class Group:
    """Cells of one record that recompute about as many rows, beside the same unchanged ones.

    They are in the order in which they join: at a block with all changed rows, or behind it, after
    some rows have run. Of the cells, the first ``n_joined`` are under way.
    """

    row: int
    record: Record
    beside: Record | Spliced
    """The run that the rows are taken from which a cell does not change."""
    read: RecordRows
    """Rows that are asked for, ascending."""
    cells: CellIndices
    layers: CellIndices
    """Block of the first edit or look of every cell."""
    entry: CellIndices
    """``STREAM``, ``KEYS`` or ``ROWS``."""
    changed: SetsOfCells
    """Rows that a cell can change (rule 1); behind a splice, from its end on (rule 2)."""
    marked: SetsOfCells
    """Rows that are edited, or looked at, in the first block."""
    keyed: SetsOfCells
    """Rows whose keys or values are edited in the first block."""
    marks: list[InGroup]
    seen: RecordRows
    """Rows that the cells can read."""
    resid: FlatStream | None = None
    """Streams of the cells under way; behind the last block at the rows that are read alone."""
    n_joined: int = 0
    masks: dict[object, Tensor | None] = field(default_factory=dict)

    @cached_property
    def n_own_memory(self) -> int:
        """Rows of the memory, times heads, that a cell has of its own; 0 where none is edited."""
        edited = [one.mark for one in self.marks if len(one.entries) and one.mark.is_of_memory]
        if not edited or self.record.memory is None:
            return 0
        n_heads, n_rows, _ = self.record.memory[0][0].shape
        return n_rows * (n_heads if any(mark.units is None for mark in edited) else 1)

    @cached_property
    def counts(self) -> CellIndices:
        """Number of rows that every cell can change."""
        return self.changed.sets.sizes[self.changed.of]

    @cached_property
    def is_still(self) -> bool:
        """Whether nothing that is read can change: the run beside is the answer."""
        return not len(self.changed.rows(np.arange(len(self.cells)), self.read))

    def restarted(self) -> "Group":
        """The group before the first block again, without anything of a climb that broke off."""
        return replace(self, resid=None, n_joined=0)

    def part(self, start: int, stop: int) -> "Group":
        """The group of some of the cells alone."""
        some = np.arange(start, stop)
        return replace(
            self, cells=self.cells[some], layers=self.layers[some], entry=self.entry[some],
            changed=self.changed.of_cells(some), marked=self.marked.of_cells(some),
            keyed=self.keyed.of_cells(some), masks={},
            marks=[one.among(some, len(self.cells)) for one in self.marks],
        )  # fmt: skip

    @cached_property
    def _by_layer(self) -> dict[int, list[InGroup]]:
        found: dict[int, list[InGroup]] = {}
        for one in self.marks:
            if len(one.entries):
                found.setdefault(one.mark.layer, []).append(one)
        return found

    def _placed(self, cells: CellIndices, layer: int, rows: CellRows) -> list[Placed]:
        """Entries of a block in some cells, at their places among the rows of these."""
        found = []
        for located in self._by_layer.get(layer, []):
            if located.mark.is_of_memory:
                continue
            some = located.among(cells, len(self.cells))
            places = rows.places(some.cells, some.rows)
            kept = places >= 0
            if kept.any():
                entries, there, places = some.entries[kept], some.cells[kept], places[kept]
                found.append(Placed(some.turn, some.mark, entries, there, places))
        return found

    def _in_memory(self, cells: CellIndices, layer: int) -> list[InMemory]:
        """Entries of a block at keys and values of the memory, in some cells."""
        found = []
        for located in self._by_layer.get(layer, []):
            if located.mark.is_of_memory:
                some = located.among(cells, len(self.cells))
                if len(some.entries):
                    found.append(InMemory(some.mark, some.entries, some.cells, some.rows))
        return found

    def enter(self, layer: int, n_layers: int) -> None:
        """Start from the base run, and act on the stream before a block."""
        among = None if layer < n_layers else self.read
        first, stop = self.n_joined, self.n_joined
        stop += int(((self.entry == STREAM) & (self.layers == layer)).sum())
        if stop > first:
            # Below their first block cells are the base run.
            base = self.record.resid[layer]
            rows = self.changed.rows(np.arange(first, stop), among)
            self._join(base[on_device(rows.flat, base)], stop)
        if self.resid is None:
            return
        cells = np.arange(stop)
        is_copied = False
        for placed in self._placed(cells, layer, self.changed.rows(cells, among)):
            if placed.mark.site != "resid_pre":
                continue
            where = indices(placed.mark, placed.entries, placed.places, self.resid)
            new = placed.mark.act(self.resid[where], placed.entries)
            if new is not None:
                # A look at the block below may have taken the same memory.
                self.resid = self.resid if is_copied else self.resid.clone()
                is_copied = True
                self.resid[where] = new

    def _join(self, resid: FlatStream, stop: int) -> None:
        self.resid = resid if self.resid is None else torch.cat([self.resid, resid])
        self.n_joined = stop

    def bundles(self, block: Block, layer: int, is_last: bool) -> list[Bundle]:
        """What runs at a block: the cells under way, then those that enter by keys, and by rows.

        Of the last block, only the rows that are read run (rule 4).
        """
        among = self.read if is_last else None
        found = [self._under_way(block, layer, among)] if self.n_joined else []
        for kind, cells, rows in self._entrants(layer, among):
            base = self.record.resid[layer]
            index = _index(self.seen, base)
            keys, values = self.record.key_values(layer)
            bundle = Bundle(
                record=self.record, rows=rows, resid=base[on_device(rows.flat, base)],
                shared=(keys[:, index], values[:, index]), shared_rows=self.seen,
                marks=self._placed(cells, layer, rows), masks=self.masks, is_base=True,
                of_memory=self._in_memory(cells, layer), layer=layer,
            )  # fmt: skip
            keyed = self.keyed.rows(cells)
            if kind == KEYS and len(keyed):
                self._give_own(
                    block, layer, bundle, cells, keyed, base[on_device(keyed.flat, base)]
                )
            found.append(bundle)
        return found

    def _entrants(
        self, layer: int, among: RecordRows | None
    ) -> list[tuple[int, CellIndices, CellRows]]:
        """Cells that enter a block by keys and by rows, with the rows that run, if any do."""
        found = []
        start = self.n_joined
        for kind, sets in ((KEYS, self.changed), (ROWS, self.marked)):
            stop = start + int(((self.entry == kind) & (self.layers == layer)).sum())
            cells = np.arange(start, stop)
            cells = cells[sets.rows(cells, among).counts > 0]
            if len(cells):
                found.append((kind, cells, sets.rows(cells, among)))
            start = stop
        return found

    def _under_way(self, block: Block, layer: int, among: RecordRows | None) -> Bundle:
        assert self.resid is not None
        cells = np.arange(self.n_joined)
        changed, rows = self.changed.rows(cells), self.changed.rows(cells, among)
        shared_rows = self._shared
        keys, values = self.beside.key_values(layer)
        index = _index(shared_rows, keys)
        bundle = Bundle(
            record=self.record, rows=rows, resid=self.resid,
            shared=(keys[:, index], values[:, index]), shared_rows=shared_rows, own_rows=changed,
            marks=self._placed(cells, layer, rows), masks=self.masks,
            of_memory=self._in_memory(cells, layer), layer=layer,
        )  # fmt: skip
        if len(rows) < len(changed):
            # All changed rows give keys and values, but only rows that are read go on.
            self._give_own(block, layer, bundle, cells, changed, self.resid)
            kept = changed.places(np.repeat(cells, rows.counts), rows.flat)
            bundle.resid = self.resid[on_device(kept, self.resid)]
        return bundle

    def _give_own(
        self, block: Block, layer: int, bundle: Bundle, cells: CellIndices, rows: CellRows,
        resid: FlatStream,
    ) -> None:  # fmt: skip
        """Give a bundle keys and values of some rows, with their edits, which act there alone."""
        edited = [one for one in self._placed(cells, layer, rows) if one.mark.site in ("k", "v")]
        bundle.own_rows = rows
        bundle.own = own_key_values(block, replace(bundle, rows=rows, resid=resid, marks=edited))
        bundle.marks = [one for one in bundle.marks if one.mark.site not in ("k", "v")] + edited

    @cached_property
    def _shared(self) -> RecordRows:
        """Rows of the keys that all cells read; each cell has its changed rows' own."""
        n = len(self.record) if isinstance(self.beside, Record) else self.beside.stop
        used = [self.changed.sets.sets[of] for of in np.unique(self.changed.of)]
        left = np.zeros(n, bool)
        for one in used:
            left |= ~np.isin(np.arange(n), one)
        rows = left.nonzero()[0]
        if len(self.seen) < len(self.record):
            rows = rows[np.isin(rows, self.seen)]
        return rows

    def absorb(self, outputs: Sequence[FlatStream], layer: int, is_last: bool) -> None:
        """Take the outputs over; entrants get the base run's rows where nothing changed."""
        among = self.read if is_last else None
        base = self.record.resid[layer + 1]
        # To where the next block runs, which is where it ran in the base run.
        outputs = [one.to(base.device) for one in outputs]
        if (mapped := self.record.maps.get(layer + 1)) is not None:
            ran = [self.changed.rows(np.arange(self.n_joined), among)] if self.n_joined else []
            ran += [rows for _, _, rows in self._entrants(layer, among)]
            outputs = [mapped(one, rows.flat) for one, rows in zip(outputs, ran, strict=True)]
        if self.n_joined:
            self.resid = outputs.pop(0)
        first = self.n_joined
        stop = first + int(((self.entry != STREAM) & (self.layers == layer)).sum())
        if stop == first:
            return
        arrived = self.changed.rows(np.arange(first, stop), among)
        new = base[on_device(arrived.flat, base)]
        if outputs:
            places = [
                arrived.places(np.repeat(cells - first, rows.counts), rows.flat)
                for _, cells, rows in self._entrants(layer, among)
            ]
            new[on_device(np.concatenate(places), new)] = torch.cat(outputs)
        self._join(new, stop)

    def finals(self) -> Finals:
        """The residual stream of every cell at the rows that are read."""
        resid = self.beside.final(self.read).expand(len(self.cells), -1, -1)
        if not self.is_still:
            assert self.resid is not None
            rows = self.changed.rows(np.arange(len(self.cells)), self.read)
            if len(rows) == len(self.cells) * len(self.read):
                resid = self.resid.unflatten(0, (len(self.cells), -1))
            else:
                # Expanded over the cells so far: one memory for all.
                resid = resid.clone()
                cells = np.repeat(np.arange(len(self.cells)), rows.counts)
                at = np.searchsorted(self.read, rows.flat)
                resid[on_device(cells, resid), on_device(at, resid)] = self.resid
        return Finals(row=self.row, cells=self.cells, resid=resid)


def _index(rows: RecordRows, like: Tensor) -> slice | Tensor:
    """Index of some rows; a slice where they are in one piece, which copies nothing."""
    if len(rows) == 0:
        return slice(0)
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return on_device(rows, like)
