"""All cells of a sweep in one pass over the blocks."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..components.block import Block
from ..errors import InputError
from ..model import HookedALM
from .cells import SITES, Cell, Edit, Write
from .record import Agreement, Record, Spliced
from .rows import KERNEL_ROWS, Bundle, own_key_values, run_block

CPU_BYTES = 2**27
"""Larger tensors come fresh from the operating system in every operation, page by page. Measured on
a sweep over layers and positions, 800 positions, width 512: 7.3 forwards without a limit, 6.2 with
this one, 6.4 to 6.5 with half or a quarter of it."""
RowIndex = Int[Tensor, " _row"]
PlacedEdit = tuple[int, list[int], Edit]


@dataclass(frozen=True, kw_only=True)
class Finals:
    """The residual stream after the last block, of cells of one row of the batch."""

    row: int
    cells: list[int]
    """Indices of the cells, as they were given."""
    resid: Float[Tensor, "cell read d_model"]
    """At the rows that were asked for."""


def sweep(
    model: HookedALM,
    records: Sequence[Record],
    cells: Sequence[Cell],
    read: Sequence[RowIndex],
    *,
    max_bytes: int | None = None,
) -> Iterator[Finals]:
    """Compute every cell at the rows that are read, a memory budget's worth at a time.

    Args:
        model: that made the records.
        records: of the base run, one per row of the batch.
        cells: in any order.
        read: per row of the batch, the record's rows to return, ascending.
        max_bytes: budget for activations; None takes a quarter of what is free, and at most 128 MiB
            on a CPU. It changes results by rounding only.

    Raises:
        InputError: an edit at a pad or at a block that does not exist.
    """
    budget = _budget(model.cfg.device) if max_bytes is None else max_bytes
    groups = _grouped(model, records, cells, read)
    while groups:
        part, rest = _split(model, groups, budget)
        try:
            _climb(model, part)
        except torch.OutOfMemoryError:
            n_cells = sum(len(group.members) for group in part)
            if n_cells == 1:
                raise
            budget = max(sum(_bytes(model, group) for group in part) // 2, 1)
            warnings.warn(
                f"sweep: {n_cells} cells at once did not fit into memory; going on with "
                f"{budget / 2**30:.2f} GiB at a time.",
                RuntimeWarning,
                stacklevel=2,
            )
            groups = [group.restarted() for group in part] + rest
            continue
        yield from (group.finals() for group in part)
        groups = rest


# Not on the generator above, which a decorator sees as such only where nothing else wraps it.
@torch.no_grad()
def _climb(model: HookedALM, groups: Sequence["_Group"]) -> None:
    """Once up through the blocks (rule 3): every cell joins at its own."""
    reached = [group for group in groups if len(group.read_changed)]
    n_layers = len(model.path)
    first = min((group.members[0].layer for group in reached), default=n_layers)
    for layer in range(first, n_layers):
        block = model.block(layer)
        is_last = layer == n_layers - 1
        steps = []
        for group in reached:
            group.enter(layer)
            steps.append(group.step(block, layer, is_last))
        outputs = iter(run_block(block, [bundle for step in steps for bundle in step.bundles]))
        for group, step in zip(reached, steps, strict=True):
            group.absorb(step, [next(outputs) for _ in step.bundles], layer)
    for group in reached:
        group.enter(n_layers)


@dataclass(frozen=True, eq=False)
class _Member:
    """A cell of a group: its edits, with the rows they are at."""

    index: int
    edits: list[tuple[RowIndex, Edit]]

    @cached_property
    def layer(self) -> int:
        """Block of the first edit."""
        return min((edit.layer for _, edit in self.edits), default=0)

    @cached_property
    def is_whole(self) -> bool:
        """Whether all later rows change in that very block; else only the edited ones do."""
        return any(SITES[edit.site].changes_later_rows for _, edit in self.at(self.layer))

    @cached_property
    def edited_rows(self) -> tuple[int, ...]:
        """Rows edited in the first block."""
        return tuple(sorted({r for rows, _ in self.at(self.layer) for r in rows.tolist()}))

    def at(self, layer: int) -> list[tuple[RowIndex, Edit]]:
        """Edits of one block."""
        return [(rows, edit) for rows, edit in self.edits if edit.layer == layer]


@dataclass(frozen=True, eq=False)
class _Step:
    """What a group runs at one block."""

    bundles: list[Bundle]
    """First the members that are under way, if any; then those whose edited rows alone run."""
    entrants: list[list[_Member]]
    rows: RowIndex
    """That exist after the block."""


@dataclass(eq=False)
class _Group:
    """Cells that recompute the same rows of one record, above the same prefix."""

    row: int
    record: Record
    prefix: Record | Spliced
    """What the rows before ``start`` are."""
    start: int
    """The first row that a cell can change (rule 1), or the end of a splice (rule 2)."""
    read: RowIndex
    members: list[_Member]
    resid: Float[Tensor, "cell row d_model"]
    """Of the members that have joined, at ``rows``."""
    rows: RowIndex

    def __post_init__(self) -> None:
        """Order the members as they join: behind block b - 1 with some rows, at b with all."""
        self.members.sort(key=lambda m: (m.layer + (not m.is_whole), m.is_whole, m.index))

    @property
    def read_changed(self) -> RowIndex:
        """Rows that are read and recomputed."""
        return self.read[self.read >= self.start]

    def restarted(self) -> "_Group":
        """Itself before the first block, holding nothing of the climb."""
        rows = torch.arange(self.start, len(self.record))
        resid = self.record.resid[0].new_empty(0, len(rows), self.record.resid[0].shape[-1])
        return replace(self, resid=resid, rows=rows)

    @property
    def joined(self) -> list[_Member]:
        return self.members[: len(self.resid)]

    def enter(self, layer: int) -> None:
        """Start from the base run, and write what is edited in the stream before a block."""
        new = [m for m in self.members if m.is_whole and m.layer == layer]
        base = self.record.resid[layer][self.rows].expand(len(new), -1, -1)
        self.resid = torch.cat([self.resid, base]) if new else self.resid
        for cell, places, edit in self._placed(self.joined, layer, self.rows):
            if edit.site == "resid_pre":
                edited = edit.write(self.resid[cell, places])
                self.resid[cell, places] = edited.to(self.resid.dtype)

    def step(self, block: Block, layer: int, is_last: bool) -> _Step:
        """The bundles to run; of the last block, only the rows that are read (rule 4)."""
        rows = self.read_changed if is_last else self.rows
        bundles, entrants = [], []
        if self.joined:
            bundles.append(self._under_way(block, layer, rows))
        late: dict[tuple[int, ...], list[_Member]] = {}
        for member in self.members:
            if member.layer == layer and not member.is_whole:
                late.setdefault(member.edited_rows, []).append(member)
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
                    edits=self._placed(some, layer, run),
                )
            )
        return _Step(bundles=bundles, entrants=entrants, rows=rows)

    def _under_way(self, block: Block, layer: int, rows: RowIndex) -> Bundle:
        keys, values = self.prefix.key_values(layer)
        bundle = Bundle(
            record=self.record,
            rows=self.rows,
            resid=self.resid,
            shared=(keys[:, : self.start], values[:, : self.start]),
            own_rows=self.rows,
            edits=self._placed(self.joined, layer, self.rows),
        )
        if len(rows) == len(self.rows):
            return bundle
        own = own_key_values(block, bundle)
        edits = [e for e in self._placed(self.joined, layer, rows) if e[2].site not in ("k", "v")]
        resid = self.resid[:, rows - self.start]
        return replace(bundle, rows=rows, resid=resid, own=own, edits=edits)

    def absorb(self, step: _Step, outputs: list[Tensor], layer: int) -> None:
        """Take the outputs over; entrants get the base run's rows where nothing changed."""
        under_way = outputs[: len(outputs) - len(step.entrants)]
        none = self.resid.new_empty(0, len(step.rows), self.resid.shape[-1])
        self.resid = under_way[0] if under_way else none
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

    def _placed(self, members: list[_Member], layer: int, rows: RowIndex) -> list[PlacedEdit]:
        """Edits of a block with their places among some rows; what is not there is left out."""
        placed = []
        for cell, member in enumerate(members):
            for where, edit in member.at(layer):
                places = torch.searchsorted(rows, where).clamp(max=max(len(rows) - 1, 0))
                kept = rows[places] == where if len(rows) else torch.zeros_like(where).bool()
                if kept.any():
                    if not kept.all():
                        edit = replace(edit, write=partial(_write_some, edit.write, kept))
                    placed.append((cell, places[kept].tolist(), edit))
        return placed

    def finals(self) -> Finals:
        """What was asked for, of every member."""
        unchanged = self.prefix.final(self.read[self.read < self.start])
        resid = unchanged.expand(len(self.members), -1, -1)
        if len(self.read_changed):
            # A cell that joins behind the last block still has all its rows.
            places = torch.searchsorted(self.rows, self.read_changed)
            resid = torch.cat([resid, self.resid[:, places]], dim=1)
        return Finals(row=self.row, cells=[m.index for m in self.members], resid=resid)


def _write_some(write: Write, kept: Bool[Tensor, " edited"], value: Tensor) -> Tensor:
    """An edit's values at some of its positions."""
    every = value.new_zeros(len(kept), *value.shape[1:])
    every[kept.to(value.device)] = value
    return write(every)[kept.to(value.device)]


def _grouped(
    model: HookedALM, records: Sequence[Record], cells: Sequence[Cell], read: Sequence[RowIndex]
) -> list[_Group]:
    """Cells by the rows they recompute and the prefix they share."""
    groups: dict[tuple[object, ...], _Group] = {}
    common: dict[tuple[Record, Record], Agreement] = {}
    for index, cell in enumerate(cells):
        if wrong := [e.layer for e in cell.edits if not 0 <= e.layer < len(model.path)]:
            raise InputError(
                f"editing blocks {wrong}: the model has blocks 0 to {len(model.path) - 1}."
            )
        record = records[cell.row]
        edits = [_before_a_block(edit) for edit in sorted(cell.edits, key=_firing)]
        edits = [edit for edit in edits if len(edit.positions)]
        member = _Member(index, [(record.rows_of(edit.positions), edit) for edit in edits])
        start, prefix = _start_and_prefix(record, member, common)
        splice = (id(prefix.donor), prefix.start) if isinstance(prefix, Spliced) else None
        key = (cell.row, start, splice)
        if key not in groups:
            rows = torch.arange(start, len(record))
            resid = record.resid[0][:0].reshape(0, 1, record.resid[0].shape[-1])
            resid = resid.expand(0, len(rows), -1)
            groups[key] = _Group(cell.row, record, prefix, start, read[cell.row], [], resid, rows)
        groups[key].members.append(member)
    return [replace(group) for group in groups.values()]


def _firing(edit: Edit) -> tuple[int, int]:
    """When its hook fires; edits of one hook stay in their order."""
    return edit.layer, list(SITES).index(edit.site)


def _before_a_block(edit: Edit) -> Edit:
    """The stream behind a block is the stream before the next."""
    if edit.site != "resid_post":
        return edit
    return replace(edit, site="resid_pre", layer=edit.layer + 1)


def _start_and_prefix(
    record: Record, member: _Member, common: dict[tuple[Record, Record], Agreement]
) -> tuple[int, Record | Spliced]:
    """The first row to recompute, and what stands before it."""
    if not member.edits:
        return len(record), record
    first = min(int(rows.min()) for rows, _ in member.edits)
    (rows, edit), n_rows = member.edits[0], len(member.edits[0][0])
    if len(member.edits) == 1 and edit.site == "resid_pre" and edit.donor is not None:
        stop = first + n_rows
        is_whole_span = torch.equal(rows.sort().values, torch.arange(first, stop))
        theirs = edit.donor.record.rows_of(edit.donor.positions)
        pair = record, edit.donor.record
        if pair not in common:
            common[pair] = Agreement.of(*pair)
        if is_whole_span and torch.equal(rows, theirs) and common[pair].allows(first, stop):
            return stop, Spliced(*pair, first, stop)
    return first, record


def _split(
    model: HookedALM, groups: Sequence[_Group], budget: int
) -> tuple[list[_Group], list[_Group]]:
    """As many cells as fit into the budget, at least one, and the others."""
    part: list[_Group] = []
    for i, group in enumerate(groups):
        fit = budget // max(_bytes(model, group) // len(group.members), 1)
        if fit < len(group.members):
            n = max(fit, 0 if part else 1)
            now = [replace(group, members=group.members[:n])] if n else []
            left = [replace(group, members=group.members[n:])] if n < len(group.members) else []
            return part + now, [*left, *groups[i + 1 :]]
        part.append(group)
        budget -= _bytes(model, group)
    return part, []


def _bytes(model: HookedALM, group: _Group) -> int:
    """What a group holds at its largest block: streams, MLP, and attention over all keys."""
    cfg, size = model.cfg, group.resid.element_size()
    heads = cfg.n_heads * cfg.d_head
    per_row = size * (6 * cfg.d_model + 4 * cfg.d_mlp + 4 * heads)
    n_rows = max(len(group.record) - group.start, 1)
    if n_rows < KERNEL_ROWS:
        per_row += cfg.n_heads * len(group.record) * (2 * size + 8)  # scores, a softmax in fp32
    return per_row * n_rows * len(group.members)


def _budget(device: torch.device) -> int:
    """A quarter of the free memory; on a CPU no more than fits the allocator's reuse."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free // 4, CPU_BYTES)
