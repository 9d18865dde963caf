"""Rows of runs that nobody stores, mixed within a memory bound."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ...errors import InputError

RowsByPoint = Mapping[str, Tensor]
"""Point -> ``[row, width]``."""
BufferPlaces = Int64[np.ndarray, " _row"]


class MixedRows:
    """Rows of a pass over prompts, shuffled epoch by epoch: an ``ActivationReader`` without files.

    Prompts run in parts, in another order every epoch; the rows of as many parts as the memory
    bound allows are shuffled together. Where it allows all, they run once and are kept. All follows
    from the arguments, so that a training that was stopped goes on with the same rows; what it
    costs is one such chunk, run again.

    Every part is written into its place of one buffer, and batches are copied from there row by
    row: what is held is the buffer, a part that has just run, and two batches.
    """

    def __init__(
        self,
        run: Callable[[int], RowsByPoint],
        n_rows: Sequence[int],
        *,
        row_bytes: int,
        max_bytes: int,
    ) -> None:
        """Runs nothing yet.

        Args:
            run: number of a part -> its rows, the same whenever it runs.
            n_rows: of every part, known beforehand.
            row_bytes: of all points together.
            max_bytes: of the rows that are held and shuffled together; at least one part is.

        Raises:
            InputError: no rows.
        """
        if not sum(n_rows):
            raise InputError("mixing rows of runs: got none, expected some. Give other clips.")
        self._run, self._n_rows = run, [*n_rows]
        self._most = max(max_bytes // row_bytes, 1)
        self._starts = [*accumulate(n_rows, initial=0)]
        self._kept = dict[str, Tensor]()
        """All rows in the order of their parts, once they have run, where all fit."""

    def __len__(self) -> int:
        """Number of rows of a pass."""
        return self._starts[-1]

    def epoch(
        self, batch_size: int, *, seed: int = 0, epoch: int = 0, start: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of shuffled rows, each row at most once; rows that fill no batch are left out.

        Args:
            batch_size: rows of a batch.
            seed: of the order.
            epoch: of the order, too: every epoch has another.
            start: number of the first batch, from 0; parts before it do not run.

        Raises:
            InputError: a part with other rows than were told.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self._n_rows)).tolist()
        bounds = [*pairwise([0, *self._chunk_ends(order)])]
        most = max(self._count(order[low:high]) for low, high in bounds)
        first, buffer, left = start * batch_size, dict[str, Tensor](), dict[str, Tensor]()
        begins = 0  # of the chunk, among the epoch's rows
        for low, high in bounds:
            parts = order[low:high]
            n = self._count(parts)
            if begins + n > first:
                mixed = np.random.default_rng((seed, epoch, low)).permutation(n)
                held, places = self._held(parts, buffer, most)
                mixed = places[mixed[max(first - begins, 0) :]]
                at, n_left = 0, len(next(iter(left.values()))) if left else 0
                for stop in range(batch_size - n_left, len(mixed) + 1, batch_size):
                    yield _joined(left, _picked(held, mixed[at:stop]))
                    at, left = stop, {}
                left = _joined(left, _picked(held, mixed[at:]))
            begins += n

    def _count(self, parts: Sequence[int]) -> int:
        return sum(self._n_rows[part] for part in parts)

    def _chunk_ends(self, order: Sequence[int]) -> list[int]:
        """Where in the order of parts each chunk ends."""
        ends, n = list[int](), 0
        for place, part in enumerate(order):
            if n and n + self._n_rows[part] > self._most:
                ends.append(place)
                n = 0
            n += self._n_rows[part]
        return [*ends, len(order)]

    def _held(
        self, parts: Sequence[int], buffer: dict[str, Tensor], most: int
    ) -> tuple[RowsByPoint, BufferPlaces]:
        """Some parts' rows in a buffer, and where there each of them is, part by part.

        Args:
            parts: of a chunk.
            buffer: which they are written into; empty before the first chunk.
            most: rows that it has room for.
        """
        if len(self) > self._most:
            at = 0
            for part in parts:
                self._write(part, buffer, at, most)
                at += self._n_rows[part]
            return buffer, np.arange(at)
        if not self._kept:
            for part in range(len(self._n_rows)):
                self._write(part, buffer, self._starts[part], len(self))
            self._kept = buffer
        places = [np.arange(self._starts[part], self._starts[part + 1]) for part in parts]
        return self._kept, np.concatenate(places)

    def _write(self, part: int, buffer: dict[str, Tensor], at: int, most: int) -> None:
        """Runs a part, and writes its rows into a buffer from a place on.

        A function of its own, so that nothing of a part is left when the next one runs.
        """
        rows, n = self._run(part), self._n_rows[part]
        if wrong := [name for name, value in rows.items() if len(value) != n]:
            raise InputError(
                f"mixing rows of runs: part {part} gave {len(rows[wrong[0]])} rows of {wrong[0]}, "
                f"expected {n}. Were its clips changed?"
            )
        for name, value in rows.items():
            if name not in buffer:
                buffer[name] = value.new_empty(most, *value.shape[1:])
            buffer[name][at : at + n] = value


def _picked(rows: RowsByPoint, places: BufferPlaces) -> dict[str, Tensor]:
    """Copies of some rows."""
    pick = torch.from_numpy(places)
    return {name: value[pick.to(value.device)] for name, value in rows.items()}


def _joined(first: RowsByPoint, second: RowsByPoint) -> dict[str, Tensor]:
    """Rows behind those before them, of which there may be none."""
    return {n: torch.cat([first[n], value]) if first else value for n, value in second.items()}
