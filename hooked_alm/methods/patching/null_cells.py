"""Null cells: a run's own values written back, through the kernels that a sweep's cells use.

What they move is rounding: in low precision, results depend on how many rows a product has.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from ...engine.cells import Edits, Indices, Marks
from ...engine.record import Record

PER_BLOCK = 3
"""Null cells beside the cells of one site of one block, at most."""
ONE_IN = 8
"""Cells to a null cell, at least; ``PER_BLOCK`` in all are there in any case."""


class NullCells(NamedTuple):
    """Marks with null cells among them; all cells have new numbers."""

    marks: list[Marks]
    n_cells: int
    """Number of cells of all rows, the null ones among them."""
    cells: Int[np.ndarray, " cell"]
    """New numbers of the cells that were given."""
    null: Int[np.ndarray, " null"]
    is_edited: Bool[np.ndarray, "null row"]
    """Rows in which a null cell writes anything."""


def with_null_cells(marks: Sequence[Marks], n_cells: int, records: Sequence[Record]) -> NullCells:
    """A few null cells for every block that cells enter, each next to the cell that it copies.

    Args:
        marks: edits and looks; row ``r`` of cell ``c`` is ``c * n_rows + r``.
        n_cells: number of cells.
        records: the base run, one per row of the batch.
    """
    n_rows = len(records)
    chosen: list[tuple[Edits, int]] = []
    for mark in marks:
        if isinstance(mark, Edits) and len(mark.cells):
            cells = np.unique(mark.cells // n_rows)
            chosen += [(mark, int(cells[at])) for at in _spread(len(cells), PER_BLOCK)]
    limit = max(n_cells // ONE_IN, PER_BLOCK)
    chosen = [chosen[at] for at in _spread(len(chosen), limit)]
    chosen.sort(key=lambda one: one[1])
    anchors = np.array([cell for _, cell in chosen], int)
    # Behind the cell that it copies, so that they are spread over the batch.
    new = np.arange(n_cells) + np.searchsorted(anchors, np.arange(n_cells))
    null = anchors + np.arange(len(anchors)) + 1
    found: list[Marks] = [
        replace(m, cells=new[m.cells // n_rows] * n_rows + m.cells % n_rows) for m in marks
    ]
    is_edited = np.zeros((len(null), n_rows), bool)
    for i, (mark, cell) in enumerate(chosen):
        here = mark.cells // n_rows == cell
        rows = mark.cells[here] % n_rows
        is_edited[i, rows] = True
        # Where the cell's rows may be spliced, so may the run's own: the same rows run.
        found.append(Edits(
            site=mark.site, layer=mark.layer, cells=null[i] * n_rows + rows,
            positions=mark.positions[here], write=_own,
            units=None if mark.units is None else mark.units[here],
            donors=None if mark.donors is None else records,
            sources=None if mark.donors is None else mark.positions[here],
        ))  # fmt: skip
    return NullCells(found, n_cells + len(null), new, null, is_edited)


def _spread(n: int, limit: int) -> list[int]:
    """Indices among ``n``, evenly spread, ``limit`` at most."""
    return sorted(set(np.linspace(0, n - 1, min(n, limit)).round().astype(int).tolist()))


def _own(own: Tensor, entries: Indices) -> Tensor:
    return own
