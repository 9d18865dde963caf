"""Reading a store of activations: at random, shuffled within a memory bound, split by group."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Int64, UInt8
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from ...errors import InputError
from ...storage import FilePath
from .rows import DTYPES
from .selection import select_names, width_of
from .store import as_folder, check_hashes, check_sizes, mapped_tensors, read_card, read_index

RowNumbers = Int64[np.ndarray, " _row"]
RawRows = UInt8[np.ndarray, "row byte"]
N_CHUNKS = 256
"""Chunks of neighbouring rows that a full window mixes."""
MOST_OF_A_CHUNK = 4096
"""Rows that are read in one piece."""


class ActivationBatch(NamedTuple):
    """Some rows of a store."""

    values: dict[str, Tensor]
    """Point -> ``[row, width]``; memory of its own."""
    rows: RowNumbers
    """Their numbers in the store, for its columns."""


class ActivationReader:
    """A finished store; ``len`` is its number of rows, numbered from 0 in the order of its shards.

    ::

        reader = ActivationReader("activations")
        train, held_out = reader.split("speaker", share=0.2)
        emotion = reader.column("emotion")
        for batch in reader.epoch(point, batch_size=4096, rows=train, seed=0, epoch=3):
            train_on(batch.values[point], emotion[batch.rows])

    Files are mapped into memory: what is read stays in the system's cache, which gives way to
    others. ``card`` says what the store holds, and what it was written about.
    """

    def __init__(self, folder: FilePath) -> None:
        """Open a store, whose files must be there in their sizes; ``check`` reads them.

        Raises:
            InputError: no store, one that is not finished, or a shard that is damaged.
        """
        self.folder = as_folder(folder)
        self.card = read_card(self.folder)
        for number, record in enumerate(self.card.shards):
            check_sizes(self.folder, number, record)
        ends = np.cumsum([0, *(record.rows for record in self.card.shards)], dtype=np.int64)
        self._starts = ends
        self._mapped: dict[int, dict[str, RawRows]] = {}
        self._columns: dict[str, Any] = {}

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    def __reduce__(self) -> Any:
        """Open it anew in another process."""
        return ActivationReader, (str(self.folder),)

    @property
    def points(self) -> list[str]:
        """Points that were kept."""
        return [*self.card.contents.points]

    @property
    def columns(self) -> list[str]:
        """Columns of the index."""
        return self.card.contents.columns

    def shape(self, point: str) -> tuple[int, ...]:
        """Shape of a row of a point: ``(d_model,)``, or ``(head, d_head)``."""
        (name,) = self._names([point])
        return (*self.card.contents.points[name],)

    def check(self) -> None:
        """Reads every shard once and compares it with its hash.

        Raises:
            InputError: the first that is not what was written, by its name.
        """
        for number, record in enumerate(self.card.shards):
            check_hashes(self.folder, number, record)

    # --- What the rows are

    @cached_property
    def index(self) -> Any:
        """All columns, a ``pyarrow.Table``; ``to_pandas()`` makes a data frame of it.

        Raises:
            InputError: a shard's index is damaged.
        """
        return self._index(None)

    def column(self, name: str) -> Any:
        """A column of the index, one value a row: an array, or of texts a ``pandas.Categorical``.

        That takes row numbers and is compared as an array is, but holds every text once.

        Raises:
            InputError: there is none of that name, or a shard's index is damaged.
        """
        column = self._column(name)
        is_text = pa.types.is_dictionary(column.type)
        return column.to_pandas().array if is_text else column.to_numpy(zero_copy_only=False)

    def _index(self, columns: list[str] | None) -> Any:
        shards = range(len(self.card.shards))
        tables = [read_index(self.folder, number, columns) for number in shards]
        return pa.concat_tables(tables).unify_dictionaries().combine_chunks()

    def _coded(self, name: str) -> tuple[RowNumbers, np.ndarray]:
        """A code for every row's value, and the values, each once; texts are not taken apart."""
        column = self._column(name)
        if pa.types.is_dictionary(column.type):
            codes = column.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            return codes, column.dictionary.to_numpy(zero_copy_only=False)
        values, codes = np.unique(self.column(name), return_inverse=True)
        return codes, values

    def _column(self, name: str) -> Any:
        if name not in self.columns:
            raise InputError(
                f"reading a column of {self.folder}: got {name!r}, expected one of "
                f"{', '.join(self.columns)}."
            )
        if name not in self._columns:
            self._columns[name] = self._index([name]).column(0).combine_chunks()
        return self._columns[name]

    def rows_where(self, **conditions: Any) -> RowNumbers:
        """Numbers of the rows in which every column has the value, or one of the values.

        ``rows_where(span="audio", emotion=["sad", "angry"])``

        Raises:
            InputError: no such column, or a value of another type.
        """
        chosen = np.ones(len(self), bool)
        for name, wanted in conditions.items():
            column = self._column(name)
            several = isinstance(wanted, Iterable) and not isinstance(wanted, str)
            values = [*wanted] if several else [wanted]
            plain = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            try:
                is_in = pc.is_in(column, value_set=pa.array(values, type=plain))
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise InputError(
                    f"choosing rows by {name!r}: got {values!r}, expected values of the column "
                    f"({error})."
                ) from None
            chosen &= is_in.to_numpy(zero_copy_only=False)
        return chosen.nonzero()[0]

    def split(
        self, by: str, share: float, *, seed: int = 0, rows: Any = None
    ) -> tuple[RowNumbers, RowNumbers]:
        """Rows to learn from, and held-out ones; all rows of a group are on one side.

        Args:
            by: column that names the group, such as the speaker or the clip.
            share: share of the groups that is held out; at least one is, and one is not.
            seed: of the draw of groups.
            rows: among which, by number or as a flag for each; None is all.

        Raises:
            InputError: a share outside of 0 to 1, one group alone, or rows without a group.
        """
        among = self._chosen(rows)
        codes, values = self._coded(by)
        codes = codes[among]
        present = np.unique(codes)
        present = present[np.argsort(values[present], kind="stable")]
        groups = values[present]
        doing = f"splitting {len(among)} rows by {by!r}"
        if not 0 < share < 1 or len(groups) < 2:
            raise InputError(
                f"{doing}: got share={share} of {len(groups)} groups, expected one between 0 and "
                "1, of two groups or more. Take another column."
            )
        if "" in groups:
            raise InputError(
                f"{doing}: {int((values[codes] == '').sum())} rows have none, and could be of "
                "either side. Complete the labels, or choose rows that have one."
            )
        n_held_out = min(max(round(share * len(groups)), 1), len(groups) - 1)
        order = np.random.default_rng(seed).permutation(len(groups))
        is_held_out = np.isin(codes, present[order[:n_held_out]])
        return among[~is_held_out], among[is_held_out]

    # --- Their values

    def read(self, point: str, rows: Any) -> Tensor:
        """Values ``[row, width]`` of some rows, in their order.

        Raises:
            InputError: no such point or rows.
        """
        (name,) = self._names([point])
        return self._values(name, self._chosen(rows))

    def epoch(
        self,
        points: str | Iterable[str],
        batch_size: int,
        *,
        rows: Any = None,
        seed: int = 0,
        epoch: int = 0,
        max_bytes: int = 2**28,
        start: int = 0,
    ) -> Iterator[ActivationBatch]:
        """Batches of shuffled rows, each row once; the last batch may be smaller.

        Batches are drawn at random from a window: chunks of neighbouring rows from anywhere in the
        store. A window that holds everything shuffles everything. The order follows from the
        arguments, so that a training that was stopped goes on at batch ``start``.

        Args:
            points: names or patterns of points that were kept; see ``select_names``.
            batch_size: rows of a batch.
            rows: which to read, by number or as a flag for each; None is all.
            seed: of the order.
            epoch: of the order, too: every epoch has another.
            max_bytes: of the window. It stays in the system's cache of files, if that has room;
                the process itself holds one batch.
            start: number of the first batch, from 0; those before it are not read.

        Raises:
            InputError: no such points or rows, or a window smaller than a batch.
        """
        names, chosen = self._names(points), None if rows is None else self._chosen(rows)
        row_bytes = self._width(names) * DTYPES[self.card.contents.dtype].itemsize
        n_window = max_bytes // row_bytes // max(batch_size, 1) * batch_size
        if batch_size < 1 or n_window < 1 or min(start, seed, epoch) < 0:
            raise InputError(
                f"reading {self.folder} shuffled: got batch_size={batch_size}, start={start}, "
                f"seed={seed}, epoch={epoch}, max_bytes={max_bytes}, expected nothing below 0, and "
                f"a batch of one row or more that max_bytes hold: {row_bytes} bytes a row. Give "
                "smaller batches, or more max_bytes."
            )
        n = len(self) if chosen is None else len(chosen)
        return self._batches(names, batch_size, chosen, (seed, epoch), min(n_window, n), start, n)

    def _batches(
        self,
        names: Sequence[str],
        batch_size: int,
        rows: RowNumbers | None,
        key: tuple[int, int],
        n_window: int,
        start: int,
        n: int,
    ) -> Iterator[ActivationBatch]:
        if n == 0:
            return
        # Whole batches, but where the window holds all there is.
        n_chunk = min(max(n_window // N_CHUNKS, 1), MOST_OF_A_CHUNK)
        order = np.random.default_rng(key).permutation(-(-n // n_chunk))
        ends = np.cumsum(np.minimum(n - order * n_chunk, n_chunk))
        for first in range(start * batch_size // n_window * n_window, n, n_window):
            numbers = _stretch(order, ends, n_chunk, first, min(first + n_window, n))
            if rows is not None:
                numbers = rows[numbers]
            mixed = np.random.default_rng((*key, first)).permutation(len(numbers))
            for at in range(max(start * batch_size - first, 0), len(numbers), batch_size):
                picked = numbers[mixed[at : at + batch_size]]
                yield ActivationBatch({name: self._values(name, picked) for name in names}, picked)

    def _names(self, points: str | Iterable[str]) -> list[str]:
        return select_names(points, self.points)

    def _width(self, names: Iterable[str]) -> int:
        return sum(width_of(self.card.contents.points[name]) for name in names)

    def _chosen(self, rows: Any) -> RowNumbers:
        """Numbers of rows, given as such, or as a flag for every row."""
        if rows is None:
            return np.arange(len(self))
        given = np.asarray(rows)
        if given.dtype == bool and given.shape == (len(self),):
            return given.nonzero()[0]
        is_whole = np.issubdtype(given.dtype, np.integer) or not given.size
        is_there = given.ndim == 1 and is_whole
        if not is_there or (given.size and not 0 <= given.min() <= given.max() < len(self)):
            raise InputError(
                f"reading {self.folder}: got rows {list(given.shape)} of {given.dtype} that are "
                f"not all there, expected numbers from 0 to {len(self) - 1}, or a flag for each."
            )
        return given.astype(np.int64)

    def _raw(self, number: int, name: str) -> RawRows:
        """A point's rows of a shard as bytes, in memory that the file is mapped to."""
        if number not in self._mapped:
            found = mapped_tensors(self.folder, number, self.card.contents)
            self._mapped[number] = {
                point: one.view(torch.uint8).numpy() for point, one in found.items()
            }
        return self._mapped[number][name]

    def _values(self, name: str, rows: RowNumbers) -> Tensor:
        """Values of some rows in memory of their own, copied once."""
        width, dtype = self._width([name]), DTYPES[self.card.contents.dtype]
        row_bytes = width * dtype.itemsize
        if not len(rows):
            return torch.empty(0, width, dtype=dtype)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        used = np.bincount(shards).nonzero()[0]
        mapped = [self._raw(number, name) for number in used.tolist()]
        begins = np.zeros(used[-1] + 1, np.int64)
        begins[used] = [one.ctypes.data for one in mapped]
        lowest = mapped[begins[used].argmin()]
        # One array with a row at every byte from the lowest file on, of which none is looked at but
        # those that a file has: to bring shard by shard into the order of rows is a second copy.
        places = begins[shards] - lowest.ctypes.data + (rows - self._starts[shards]) * row_bytes
        row = lowest[:1].view(f"V{row_bytes}")[0]
        found = as_strided(row, (int(places.max()) + 1,), (1,))[places]
        return torch.from_numpy(found.view(np.uint8).reshape(-1, row_bytes)).view(dtype)


def _stretch(
    order: Int64[np.ndarray, " chunk"],
    ends: Int64[np.ndarray, " chunk"],
    n_chunk: int,
    first: int,
    stop: int,
) -> RowNumbers:
    """Rows ``first`` to ``stop`` of all, chunk by chunk in the order of chunks."""
    low, high = np.searchsorted(ends, [first, stop - 1], side="right")
    chunks = order[low : high + 1]
    stops = np.minimum(ends[low : high + 1], stop)
    begins = np.concatenate([[first], stops[:-1]])
    starts = chunks * n_chunk
    if low or first:  # the first chunk may have begun in the window before
        starts[0] += first - (ends[low - 1] if low else 0)
    return np.repeat(starts - begins, stops - begins) + np.arange(first, stop)
