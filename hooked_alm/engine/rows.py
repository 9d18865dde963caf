"""Rows of many cells, one cell after the other in one tensor."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from .record import on_device


class RowSets:
    """Different sets of rows of a record, each ascending."""

    def __init__(self, sets: Sequence[Int[np.ndarray, " _row"]], n_rows: int) -> None:
        """Take the sets, and the number of rows of the record."""
        self.sets, self.n_rows = list(sets), n_rows
        self.sizes = np.array([len(one) for one in self.sets], int)
        self._only: dict[bytes, RowSets] = {}

    @cached_property
    def place(self) -> Int[np.ndarray, "set row"]:
        """Place of every row within every set, -1 where the set lacks it."""
        found = np.full((len(self.sets), self.n_rows), -1)
        for at, one in zip(found, self.sets, strict=True):
            at[one] = np.arange(len(one))
        return found

    @cached_property
    def joined(self) -> Int[np.ndarray, " row"]:
        """Rows of all sets, one set after the other."""
        return np.concatenate([*self.sets, np.zeros(0, int)])

    def padded(self, which: Int[np.ndarray, " _set"], n: int) -> Int[np.ndarray, "_set row"]:
        """Some of the sets, the last row of a shorter one repeated up to ``n``."""
        found = np.zeros((len(which), n), int)
        for at, one in zip(found, which, strict=True):
            rows = self.sets[one]
            at[:] = np.append(rows, np.repeat(rows[-1:] if len(rows) else 0, n - len(rows)))
        return found

    def only(self, rows: Int[np.ndarray, " _read"]) -> "RowSets":
        """The sets without what is not among some rows."""
        key = rows.tobytes()
        if key not in self._only:
            kept = [one[np.isin(one, rows)] for one in self.sets]
            self._only[key] = RowSets(kept, self.n_rows)
        return self._only[key]


class CellRows:
    """Rows of several cells, one cell after the other."""

    def __init__(self, sets: RowSets, of: Int[np.ndarray, " cell"]) -> None:
        """Take the sets, and the set of every cell."""
        self.sets, self.of = sets, of
        self.counts = sets.sizes[of]
        self.starts = np.cumsum(self.counts) - self.counts

    def __len__(self) -> int:
        """Number of rows of all cells."""
        return int(self.counts.sum())

    @cached_property
    def longest(self) -> int:
        """Number of rows of the cell that has most."""
        return int(self.counts.max(initial=0))

    @cached_property
    def flat(self) -> Int[np.ndarray, " flat"]:
        """Row of the record at every place."""
        first = np.cumsum(self.sets.sizes) - self.sets.sizes
        return self.sets.joined[
            np.arange(len(self)) + np.repeat(first[self.of] - self.starts, self.counts)
        ]

    def places(
        self, cells: Int[np.ndarray, " entry"], rows: Int[np.ndarray, " entry"]
    ) -> Int[np.ndarray, " entry"]:
        """Places of rows of cells, -1 where they are not there."""
        within = self.sets.place[self.of[cells], rows]
        return np.where(within < 0, -1, self.starts[cells] + within)

    @cached_property
    def _padded(self) -> Int[np.ndarray, "cell longest"] | None:
        """Places by cell, the last one repeated; None if all cells have as many rows."""
        if (self.counts == self.longest).all():
            return None
        steps = np.minimum(np.arange(self.longest), self.counts[:, None] - 1)
        return (self.starts[:, None] + steps).clip(min=0)

    def by_cell(self, flat: Float[Tensor, "head flat e"]) -> Float[Tensor, "head cell longest e"]:
        """Values apart by cell. Behind the rows of a shorter one its last is repeated."""
        if self._padded is None:
            return flat.unflatten(1, (len(self.counts), self.longest))
        return flat[:, on_device(self._padded, flat)]

    def joined(self, apart: Float[Tensor, "head cell longest e"]) -> Float[Tensor, "head flat e"]:
        """Values one cell after the other, as ``by_cell`` was given them."""
        flat = apart.flatten(1, 2)
        if self._padded is None:
            return flat
        cells = np.repeat(np.arange(len(self.counts)), self.counts)
        within = np.arange(len(self)) - np.repeat(self.starts, self.counts)
        return flat[:, on_device(cells * self.longest + within, flat)]

    def places_of(self, cells: Int[np.ndarray, "*slot"]) -> Int[np.ndarray, "*slot longest"]:
        """Places of the rows of some cells as ``by_cell`` has them, -1 where one is repeated."""
        steps = np.arange(self.longest)
        return np.where(
            steps < self.counts[cells][..., None], self.starts[cells][..., None] + steps, -1
        )
