"""Which cells climb together, from what edits say: the rows that each can change, and splices."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import InputError
from ..model import HookedALM
from ..points import SITES
from ..spans import Range, as_ranges
from ..stacks import Stack
from .cells import Edits, Marks, in_order
from .groups import KEYS, ROWS, STREAM, CellIndices, Group, InGroup, RecordRows, SetsOfCells
from .mixing import KERNEL_ROWS
from .record import Agreement, Record, Spliced
from .rows import RowSets

WORTH_SPLICING = 8
"""A donor's span is taken over (rule 2) if that saves one of so many rows. Less is not worth a
group of its own: it would run alone what it now runs among others."""


def grouped(
    model: HookedALM,
    records: Sequence[Record],
    marks: Sequence[Marks],
    read: Sequence[RecordRows],
    only: CellIndices | None = None,
) -> list[Group]:
    """Groups of all cells that any edit is in, or of some of them.

    Raises:
        InputError: an edit at a pad, or at a block that does not exist.
    """
    n_layers = len(model.path)
    if wrong := sorted({m.layer for m in marks if not 0 <= m.layer < n_layers}):
        raise InputError(f"editing blocks {wrong}: the model has blocks 0 to {n_layers - 1}.")
    # An edit behind a block is one before the next: the same stream.
    acting = [
        replace(m, site="resid_pre", layer=m.layer + 1)
        if m.site == "resid_post" and isinstance(m, Edits)
        else m
        for m in in_order(marks)
    ]
    groups: list[Group] = []
    for row, record in enumerate(records):
        located = []
        for turn, mark in enumerate(acting):
            is_mine = mark.cells % len(records) == row
            entries = np.flatnonzero(
                is_mine if only is None else is_mine & np.isin(mark.cells, only)
            )
            if len(entries):
                rows = mark.positions[entries]
                if mark.is_of_memory:
                    _check_memory(record, rows)
                else:
                    rows = record.rows_of(rows)
                located.append(InGroup(turn, mark, entries, mark.cells[entries], rows))
        if located:
            groups += _of_record(model, row, record, located, read[row])
    return groups


def _check_memory(record: Record, rows: RecordRows) -> None:
    """Refuse rows that a memory does not have.

    Raises:
        InputError: there are some.
    """
    n = 0 if record.memory is None else record.memory[0][0].shape[1]
    if wrong := rows[(rows < 0) | (rows >= n)].tolist():
        raise InputError(f"editing rows {wrong[:8]} of a memory: it has {n}.")


def _of_record(
    model: HookedALM, row: int, record: Record, located: list[InGroup], read: RecordRows
) -> list[Group]:
    """Groups of the cells of one row of the batch."""
    edited = [one.cells for one in located if isinstance(one.mark, Edits)]
    ids = np.unique(np.concatenate([*edited, np.zeros(0, int)]))
    # Nobody reads a look at a cell without edits. From here on, cells count in this row alone.
    n_cells = 1 + max(int(one.cells.max()) for one in located)
    located = [one.among(ids, n_cells) for one in located]
    n = len(ids)
    layers = np.full(n, len(model.path))
    for one in located:
        layers[one.cells] = np.minimum(layers[one.cells], one.mark.layer)
    entry, marked, keys = _entries(located, layers, n, len(record))
    changed = _changed(model, record, located, layers, n)
    splices, spliced, changed = _splices(model, record, located, changed, layers)
    # Cells of about as many rows run together, to within a factor of 2, or of 1.2 where the kernel
    # runs and padding costs; where nothing is read that changes, none run.
    counts = changed.sets.sizes[changed.of].clip(min=1)
    size = np.floor(np.log2(counts) * np.where(counts < KERNEL_ROWS, 1, 4)).astype(int)
    size[changed.sets.only(read).sizes[changed.of] == 0] = -1
    # A pattern shows all keys of a cell: those of a group have to be the same rows.
    has_pattern = np.zeros(n, bool)
    for one in located:
        has_pattern[one.cells] |= one.mark.site == "pattern"
    pattern = np.where(has_pattern, changed.of * len(keys.sets.sets) + keys.of, -1)
    # Where a memory is edited, cells have keys of it of their own.
    in_memory = np.zeros(n, int)
    for one in located:
        in_memory[one.cells] |= one.mark.is_of_memory
    # Cells in one chunk read no other: they run beside its keys alone.
    is_chunked = all(stack.reach == "own chunk" for stack in model.path_stacks)
    chunk = changed.of if is_chunked else np.full(n, -1)
    features = np.stack([splices, size, pattern, chunk, in_memory])
    kinds, kind = np.unique(features, axis=1, return_inverse=True)
    made = []
    for i, splice in enumerate(kinds[0]):
        mine = np.flatnonzero(kind == i)
        is_late = entry[mine] != STREAM
        order = mine[np.lexsort((mine, entry[mine], ~is_late, layers[mine] + is_late))]
        made.append(Group(
            row, record, record if splice < 0 else spliced[splice], read, ids[order],
            layers[order], entry[order], changed.of_cells(order), marked.of_cells(order),
            keys.of_cells(order), [one.among(order, n) for one in located],
            changed.sets.sets[kinds[3, i]] if is_chunked else np.arange(len(record)),
        ))  # fmt: skip
    return made


def _entries(
    located: Sequence[InGroup], layers: CellIndices, n: int, n_rows: int
) -> tuple[CellIndices, SetsOfCells, SetsOfCells]:
    """How cells enter at their first block; rows that are marked there, and those of k and v."""
    entry, marked, keyed = np.full(n, ROWS), [], []
    for one in located:
        here = layers[one.cells] == one.mark.layer
        cells, rows = one.cells[here], one.rows[here]
        if one.mark.is_of_memory:  # which every row reads
            entry[cells] = np.minimum(entry[cells], KEYS)
            continue
        marked.append((cells, rows))
        if one.mark.site == "resid_pre":
            entry[cells] = STREAM
        elif SITES[one.mark.site].reach == "reading rows":
            entry[cells] = np.minimum(entry[cells], KEYS)
            keyed.append((cells, rows))
    return entry, _interned(marked, n, n_rows), _interned(keyed, n, n_rows)


def _interned(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], n_cells: int, n_rows: int
) -> SetsOfCells:
    """Sets of rows by cell, from cells and rows; equal sets are one."""
    codes = np.unique(
        np.concatenate([*(cells * n_rows + rows for cells, rows in pairs), np.zeros(0, int)])
    )
    cells, rows = np.divmod(codes, n_rows)
    ends = np.searchsorted(cells, np.arange(n_cells), side="right")
    data, size = rows.tobytes(), rows.itemsize
    known: dict[bytes, int] = {}
    of = np.zeros(n_cells, int)
    start = 0
    # The one loop over cells of a sweep, at a tenth of a microsecond a cell.
    for cell, end in enumerate(ends.tolist()):
        of[cell] = known.setdefault(data[start * size : end * size], len(known))
        start = end
    sets = [np.frombuffer(one, rows.dtype) for one in known]
    return SetsOfCells(RowSets(sets, n_rows), of)


def _changed(
    model: HookedALM, record: Record, located: Sequence[InGroup], layers: CellIndices, n: int
) -> SetsOfCells:
    """Rows that every cell can change, those that are looked at among them.

    The widest reach holds for all blocks, so that a cell keeps one set of rows on its way up.
    """
    n_rows, stacks = len(record), model.path_stacks
    above = [
        tuple(dict.fromkeys(stacks[min(b, len(stacks) - 1) :])) for b in range(len(stacks) + 1)
    ]
    if all(stack.reach == "later rows" for stack in stacks):
        first = np.full(n, n_rows)
        for one in located:
            np.minimum.at(first, one.cells, 0 if one.mark.is_of_memory else one.rows)
        starts, of = np.unique(first, return_inverse=True)
        return SetsOfCells(RowSets([np.arange(start, n_rows) for start in starts], n_rows), of)
    touched = _interned([(one.cells, one.rows) for one in located], n, n_rows)
    known: dict[tuple[int, tuple[Stack, ...]], int] = {}
    # Different rows reach the same ones: those of their chunk.
    sets: dict[tuple[Range, ...], int] = {}
    of = np.zeros(n, int)
    for cell, layer in enumerate(layers):
        key = int(touched.of[cell]), above[layer]
        if key not in known:
            ranges = tuple(as_ranges(record.place[touched.sets.sets[key[0]]].tolist()))
            for stack in key[1]:
                ranges = stack.reached(ranges, int(record.place[-1]) + 1)
            known[key] = sets.setdefault(ranges, len(sets))
        of[cell] = known[key]
    return SetsOfCells(RowSets([record.rows_at(ranges) for ranges in sets], n_rows), of)


def _splices(
    model: HookedALM,
    record: Record,
    located: Sequence[InGroup],
    changed: SetsOfCells,
    layers: CellIndices,
) -> tuple[CellIndices, list[Spliced], SetsOfCells]:
    """Rule 2: which splice a cell is beside, or -1; the splices; and the rows that then change."""
    n, n_rows = len(layers), len(record)
    found, made = np.full(n, -1), list[Spliced]()
    n_marks = np.zeros(n, int)
    for one in located:
        n_marks[np.unique(one.cells)] += 1
    stacks = model.path_stacks
    is_causal = np.array(
        [all(s.reach == "later rows" for s in stacks[b:]) for b in range(len(stacks) + 1)]
    )
    sets, of = list(changed.sets.sets), changed.of.copy()
    known: dict[tuple[Record, int, int], tuple[int, int]] = {}
    agreements: dict[Record, Agreement] = {}
    for one in located:
        mark = one.mark
        if not isinstance(mark, Edits) or mark.donors is None or mark.sources is None:
            continue
        if mark.site != "resid_pre" or not is_causal[mark.layer] or not len(one.entries):
            continue
        donor = mark.donors[int(mark.cells[one.entries[0]] % len(mark.donors))]
        if donor not in agreements:
            agreements[donor] = Agreement.of(record, donor)
        sources = mark.sources[one.entries]
        theirs = donor.rows_of(np.where(sources < 0, donor.where[0].item(), sources))
        low, high, is_whole = _spans(one, (theirs == one.rows) & (sources >= 0), n, n_rows)
        # Nothing else is edited in the cell, and both runs agree before the span.
        is_exact = is_whole & (n_marks == 1)
        is_exact &= (low <= agreements[donor].embeddings) & (high <= agreements[donor].positions)
        is_exact &= (high - low) * WORTH_SPLICING >= n_rows - low
        for cell in np.flatnonzero(is_exact).tolist():
            key = donor, int(low[cell]), int(high[cell])
            if key not in known:
                made.append(Spliced(record, *key))
                known[key] = len(made) - 1, len(sets)
                sets.append(np.arange(key[2], n_rows))
            found[cell], of[cell] = known[key]
    return found, made, SetsOfCells(RowSets(sets, n_rows), of)


def _spans(
    one: InGroup, is_same: np.ndarray, n: int, n_rows: int
) -> tuple[CellIndices, CellIndices, np.ndarray]:
    """First row and end of what is edited in every cell; whether it is one span, row for row.

    ``is_same`` says for every entry whether the donor has it at the same row. Whether a donor's
    rows are exact is compared, not assumed: no row may be left out or come twice.
    """
    low, high, is_whole = np.full(n, n_rows), np.full(n, -1), np.ones(n, bool)
    np.minimum.at(low, one.cells, one.rows)
    np.maximum.at(high, one.cells, one.rows + 1)
    np.logical_and.at(is_whole, one.cells, is_same)
    size = np.bincount(one.cells, minlength=n)
    different = np.bincount(np.unique(one.cells * n_rows + one.rows) // n_rows, minlength=n)
    return low, high, is_whole & (size == different) & (size == high - low)
