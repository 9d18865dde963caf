"""Groups of cells that recompute the same rows of one record, and what they run at a block."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..components.block import Block
from ..errors import InputError
from ..model import HookedALM
from ..points import SITES
from ..spans import Range
from ..stacks import Stack, ranges_of, rows_in
from .cells import Cell, Edit, Look
from .record import Agreement, Record, Spliced
from .rows import Bundle, Placed, own_key_values

RecordRows = Int[Tensor, " _row"]
"""Indices of rows of a record: real positions, pads left out."""


@dataclass(frozen=True, kw_only=True)
class Finals:
    """The residual stream after the last block, of cells of one row of the batch."""

    row: int
    cells: list[int]
    """Indices of the cells in the sequence that was given."""
    resid: Float[Tensor, "cell read d_model"]
    """The stream at the rows that were asked for."""


@dataclass(frozen=True, eq=False)
class _Member:
    """A cell of a group: its edits and looks, with the rows they are at."""

    index: int
    marks: list[tuple[RecordRows, Edit | Look]]

    @cached_property
    def layer(self) -> int:
        """Block of the first edit or look; 0 without any."""
        return min((mark.layer for _, mark in self.marks), default=0)

    @cached_property
    def is_whole(self) -> bool:
        """Whether the first block changes all rows that the cell reaches; else the edited alone."""
        edits = [mark for _, mark in self.at(self.layer) if isinstance(mark, Edit)]
        return any(SITES[edit.site].reach == "reading rows" for edit in edits)

    @cached_property
    def own_rows(self) -> tuple[int, ...]:
        """Rows edited, or looked at, in the first block."""
        return tuple(sorted({row for rows, _ in self.at(self.layer) for row in rows.tolist()}))

    def at(self, layer: int) -> list[tuple[RecordRows, Edit | Look]]:
        """Edits and looks of one block."""
        return [(rows, mark) for rows, mark in self.marks if mark.layer == layer]


@dataclass(frozen=True, eq=False)
class _Step:
    """The bundles that a group runs at one block."""

    bundles: list[Bundle]
    """First the members that are under way, if any; then one for each list of entrants."""
    entrants: list[list[_Member]]
    """Members whose first block this is and whose edited rows alone run."""
    rows: RecordRows
    """Rows of the group that exist after the block."""


@dataclass(eq=False)
class Group:
    """Cells that recompute the same rows of one record, beside the same rows of another."""

    row: int
    record: Record
    beside: Record | Spliced
    """The run that the rows are taken from which no member changes."""
    changed: tuple[Range, ...]
    """Rows that a member can change (rule 1); behind a splice, from its end on (rule 2)."""
    read: RecordRows
    """Rows that are asked for, ascending."""
    members: list[_Member]
    resid: Float[Tensor, "cell row d_model"]
    """Streams of the members that have joined, the first of ``members``, at ``rows``."""
    rows: RecordRows
    """The changed rows; behind the last block, those of them that are read."""

    def __post_init__(self) -> None:
        """Order the members as they join: behind block b - 1 with some rows, at b with all."""
        # The members under way are the first ones, as many as ``resid`` is long: nothing else says
        # whose streams these are.
        self.members.sort(key=lambda m: (m.layer + (not m.is_whole), m.is_whole, m.index))

    @property
    def first_layer(self) -> int:
        """Block at which the first member joins."""
        return self.members[0].layer

    @cached_property
    def n_rows(self) -> int:
        """Rows that a member can change."""
        return sum(stop - start for start, stop in self.changed)

    @cached_property
    def read_changed(self) -> RecordRows:
        """Rows that are read and recomputed."""
        return self.read[torch.isin(self.read, rows_in(self.changed))]

    @cached_property
    def _unchanged(self) -> tuple[slice | RecordRows, RecordRows]:
        """Rows that no member changes, as an index of keys and values and as rows.

        Rows before the first changed one are a slice, which copies nothing.
        """
        n = len(self.record)
        # A tail of the prompt changes, as always in a causal stack; a splice ends where it begins.
        if not self.changed or self.changed[0][1] == n:
            start = self.changed[0][0] if self.changed else n
            return slice(start), torch.arange(start)
        is_changed = torch.zeros(n, dtype=torch.bool).index_fill(0, rows_in(self.changed), True)
        rows = (~is_changed).nonzero().flatten()
        return rows, rows

    def restarted(self) -> "Group":
        """The group before the first block again, without anything of a climb that broke off."""
        rows = rows_in(self.changed)
        resid = self.record.resid[0].new_empty(0, len(rows), self.record.resid[0].shape[-1])
        return replace(self, resid=resid, rows=rows)

    def with_members(self, members: list[_Member]) -> "Group":
        """A group of some of the members alone."""
        return replace(self, members=members)

    @property
    def joined(self) -> list[_Member]:
        """Members under way."""
        return self.members[: len(self.resid)]

    def enter(self, layer: int) -> None:
        """Start from the base run, and write what is edited in the stream before a block."""
        new = [m for m in self.members if m.is_whole and m.layer == layer]
        # Below their first block members are the base run. ``cat`` copies its expanded rows: the
        # edits must not write into the record.
        base = self.record.resid[layer][self.rows].expand(len(new), -1, -1)
        self.resid = torch.cat([self.resid, base]) if new else self.resid
        for placed in self._placed(self.joined, layer, self.rows):
            if placed.mark.site == "resid_pre":
                edited = placed.act(self.resid[placed.cell, placed.places])
                if edited is not None:
                    self.resid[placed.cell, placed.places] = edited

    def step(self, block: Block, layer: int, is_last: bool) -> _Step:
        """The bundles to run; of the last block, only the rows that are read (rule 4)."""
        rows = self.read_changed if is_last else self.rows
        bundles, entrants = [], []
        if self.joined:
            bundles.append(self._under_way(block, layer, rows))
        # In their first block these members change their own rows alone: no others need to run, and
        # all keys and values are still the base run's.
        late: dict[tuple[int, ...], list[_Member]] = {}
        for member in self.members:
            if member.layer == layer and not member.is_whole:
                late.setdefault(member.own_rows, []).append(member)
        for edited, some in late.items():
            run = torch.tensor(edited, dtype=torch.long)
            run = run[torch.isin(run, rows)]
            entrants.append(some)
            bundles.append(
                Bundle(
                    record=self.record,
                    rows=run,
                    resid=self.record.resid[layer][run].expand(len(some), -1, -1),
                    shared=self.record.key_values(layer),
                    shared_rows=torch.arange(len(self.record)),
                    marks=self._placed(some, layer, run),
                )
            )
        return _Step(bundles=bundles, entrants=entrants, rows=rows)

    def _under_way(self, block: Block, layer: int, rows: RecordRows) -> Bundle:
        keys, values = self.beside.key_values(layer)
        index, shared_rows = self._unchanged
        bundle = Bundle(
            record=self.record,
            rows=self.rows,
            resid=self.resid,
            shared=(keys[:, index], values[:, index]),
            shared_rows=shared_rows,
            own_rows=self.rows,
            marks=self._placed(self.joined, layer, self.rows),
        )
        if len(rows) == len(self.rows):
            return bundle
        # The last block: all changed rows give keys and values, but only rows that are read go on.
        # Edits of k and v act on the former, and must not act twice.
        own = own_key_values(block, bundle)
        placed = self._placed(self.joined, layer, rows)
        marks = [one for one in placed if one.mark.site not in ("k", "v")]
        resid = self.resid[:, torch.searchsorted(self.rows, rows)]
        return replace(bundle, rows=rows, resid=resid, own=own, marks=marks)

    def absorb(self, step: _Step, outputs: list[Tensor], layer: int) -> None:
        """Take the outputs over; entrants get the base run's rows where nothing changed."""
        under_way = outputs[: len(outputs) - len(step.entrants)]
        none = self.resid.new_empty(0, len(step.rows), self.resid.shape[-1])
        self.resid = under_way[0] if under_way else none
        # By index: bundles have the members by edited rows, ``resid`` in the order of ``members``.
        arrived: dict[int, Tensor] = {}
        entrants = zip(step.entrants, outputs[len(under_way) :], strict=True)
        for (members, out), bundle in zip(entrants, step.bundles[len(under_way) :], strict=True):
            resid = self.record.resid[layer + 1][step.rows].repeat(len(members), 1, 1)
            resid[:, torch.searchsorted(step.rows, bundle.rows)] = out
            arrived |= {m.index: one for m, one in zip(members, resid, strict=True)}
        new = [m for m in self.members if m.index in arrived]
        if new:
            self.resid = torch.cat([self.resid, torch.stack([arrived[m.index] for m in new])])
        self.rows = step.rows

    def _placed(self, members: list[_Member], layer: int, rows: RecordRows) -> list[Placed]:
        """Edits and looks of a block, at their places among some rows, where they have any."""
        placed = []
        for cell, member in enumerate(members):
            for where, mark in member.at(layer):
                # ``searchsorted`` finds a place for any row; the comparison tells which are there.
                places = torch.searchsorted(rows, where).clamp(max=max(len(rows) - 1, 0))
                kept = rows[places] == where if len(rows) else torch.zeros_like(where).bool()
                if kept.any():
                    some = None if kept.all() else kept
                    placed.append(Placed(cell, places[kept].tolist(), mark, some))
        return placed

    def finals(self) -> Finals:
        """The residual stream of every member at the rows that are read."""
        changed = self.read_changed
        resid = self.beside.final(self.read).expand(len(self.members), -1, -1)
        if len(changed):
            # A cell that joins behind the last block still has all its rows.
            ours = self.resid[:, torch.searchsorted(self.rows, changed)]
            if len(changed) == len(self.read):
                resid = ours
            else:
                # Expanded over the cells so far: one memory for all.
                resid = resid.clone()
                resid[:, torch.searchsorted(self.read, changed)] = ours
        return Finals(row=self.row, cells=[m.index for m in self.members], resid=resid)


def grouped(
    model: HookedALM,
    records: Sequence[Record],
    cells: Sequence[Cell],
    read: Sequence[RecordRows],
) -> list[Group]:
    """Groups of the cells that recompute the same rows beside the same unchanged ones.

    Raises:
        InputError: an edit at a pad, or at a block that does not exist.
    """
    groups: dict[tuple[object, ...], Group] = {}
    common: dict[tuple[Record, Record], Agreement] = {}
    stacks = model.path_stacks
    n_layers = len(stacks)
    # Stacks from each block up. The entry after the last is for edits behind the last block.
    above = [tuple(dict.fromkeys(stacks[min(b, n_layers - 1) :])) for b in range(n_layers + 1)]
    for index, cell in enumerate(cells):
        marks = cell.marks
        if wrong := [mark.layer for mark in marks if not 0 <= mark.layer < n_layers]:
            raise InputError(f"editing blocks {wrong}: the model has blocks 0 to {n_layers - 1}.")
        record = records[cell.row]
        marks = [_before_a_block(mark) for mark in marks if len(mark.positions)]
        member = _Member(index, [(record.rows_of(mark.positions), mark) for mark in marks])
        changed, beside = _changed_and_beside(record, member, above[member.layer], common)
        # Its end is in ``changed``, or is the end of the record.
        splice = (id(beside.donor), beside.start) if isinstance(beside, Spliced) else None
        key = (cell.row, changed, splice)
        if key not in groups:
            empty = record.resid[0][:0].reshape(0, 1, record.resid[0].shape[-1])
            rows = rows_in(changed)
            groups[key] = Group(
                cell.row, record, beside, changed, read[cell.row], [],
                empty.expand(0, len(rows), -1), rows,
            )  # fmt: skip
        groups[key].members.append(member)
    # Made anew, because ``__post_init__`` orders the members, which are complete only now.
    return [replace(group) for group in groups.values()]


def _before_a_block(mark: Edit | Look) -> Edit | Look:
    """The mark itself, or an edit behind a block as one before the next: the same stream."""
    if mark.site != "resid_post" or isinstance(mark, Look):
        return mark
    return replace(mark, site="resid_pre", layer=mark.layer + 1)


def _changed_and_beside(
    record: Record,
    member: _Member,
    above: Sequence[Stack],
    common: dict[tuple[Record, Record], Agreement],
) -> tuple[tuple[Range, ...], Record | Spliced]:
    """Ranges of rows to recompute, and the run that the others are taken from."""
    edits = [(rows, mark) for rows, mark in member.marks if isinstance(mark, Edit)]
    if not edits:
        return (), record
    rows, edit = edits[0]
    if len(edits) == 1 and edit.site == "resid_pre" and edit.donor is not None:
        first, stop = int(rows.min()), int(rows.min()) + len(rows)
        # Rule 2. Whether the donor's rows are exact here is compared, not assumed: no row is left
        # out, both runs have the span at the same rows, and they agree before it.
        is_whole_span = torch.equal(rows.sort().values, torch.arange(first, stop))
        theirs = edit.donor.record.rows_of(edit.donor.positions)
        pair = record, edit.donor.record
        if pair not in common:
            common[pair] = Agreement.of(*pair)
        if (
            all(stack.reach == "later rows" for stack in above)
            and is_whole_span
            and torch.equal(rows, theirs)
            and common[pair].allows(first, stop)
        ):
            return ((stop, len(record)),) if stop < len(record) else (), Spliced(*pair, first, stop)
    # Rows that are looked at have to run, too. The widest reach holds for all blocks, so that a
    # member keeps one set of rows on its way up.
    changed = ranges_of(*(rows for rows, _ in member.marks))
    for stack in above:
        changed = stack.reached(changed, len(record))
    return changed, record
