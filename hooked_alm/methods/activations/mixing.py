"""Rows of runs that nobody stores, mixed within a memory bound."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError

RowsByPoint = Mapping[str, Tensor]
"""Point -> ``[row, width]``."""


class MixedRows:
    """Rows of a pass over prompts, shuffled epoch by epoch: an ``ActivationReader`` without files.

    Prompts run in parts, in another order every epoch; the rows of as many parts as the memory
    bound allows are shuffled together. Where it allows all, they run once and are kept. All follows
    from the arguments, so that a training that was stopped goes on with the same rows; what it
    costs is one such chunk, run again.
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
            max_bytes: of the rows that are held and shuffled together; twice as many while they
                are put together. At least one part is held.

        Raises:
            InputError: no rows.
        """
        if not sum(n_rows):
            raise InputError("mixing rows of runs: got none, expected some. Give other clips.")
        self._run, self._n_rows = run, [*n_rows]
        self._most = max(max_bytes // row_bytes, 1)
        self._kept = dict[int, RowsByPoint]()

    def __len__(self) -> int:
        """Number of rows of a pass."""
        return sum(self._n_rows)

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
        ends = self._chunk_ends(order)
        first, left = start * batch_size, dict[str, Tensor]()
        begins = 0  # of the chunk, among the epoch's rows
        for low, high in pairwise([0, *ends]):
            parts = order[low:high]
            n = sum(self._n_rows[part] for part in parts)
            if begins + n > first:
                rows = self._shuffled(parts, (seed, epoch, low))
                skipped = max(first - begins, 0)
                rows = {name: value[skipped:] for name, value in rows.items()}
                left = {n: torch.cat([left[n], v]) if left else v for n, v in rows.items()}
                n_left = len(next(iter(left.values())))
                for at in range(0, n_left - batch_size + 1, batch_size):
                    yield {name: value[at : at + batch_size] for name, value in left.items()}
                cut = n_left // batch_size * batch_size
                left = {name: value[cut:] for name, value in left.items()}
            begins += n

    def _chunk_ends(self, order: Sequence[int]) -> list[int]:
        """Where in the order of parts each chunk ends."""
        ends, n = list[int](), 0
        for place, part in enumerate(order):
            if n and n + self._n_rows[part] > self._most:
                ends.append(place)
                n = 0
            n += self._n_rows[part]
        return [*ends, len(order)]

    def _shuffled(self, parts: Sequence[int], key: tuple[int, ...]) -> dict[str, Tensor]:
        found = [self._part(part) for part in parts]
        mixed = np.random.default_rng(key).permutation(sum(self._n_rows[one] for one in parts))
        pick = torch.from_numpy(mixed)
        return {
            name: torch.cat([rows[name] for rows in found])[pick.to(found[0][name].device)]
            for name in found[0]
        }

    def _part(self, part: int) -> RowsByPoint:
        if part in self._kept:
            return self._kept[part]
        rows = self._run(part)
        if wrong := [name for name, value in rows.items() if len(value) != self._n_rows[part]]:
            raise InputError(
                f"mixing rows of runs: part {part} gave {len(rows[wrong[0]])} rows of {wrong[0]}, "
                f"expected {self._n_rows[part]}. Were its clips changed?"
            )
        if len(self) <= self._most:
            self._kept[part] = rows
        return rows
