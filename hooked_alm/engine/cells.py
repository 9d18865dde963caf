"""Edits of a sweep, as data: in which cells, where, and by which rule.

A cell is a row of the batch under some edits: one question. Cells are numbers, ``c`` being one of
row ``c % n_rows``, and whatever acts on many of them in the same way is one ``Edits`` with an entry
per cell, position and unit: nothing is called, or copied to the device, per cell.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..encoder_rows import EncoderRows
from ..hooks import HookPoint
from ..points import SITES, Site, hook_name
from .record import Record, on_device

Indices = Int[np.ndarray, " entry"]
_ORDER = {site: place for place, site in enumerate(SITES)}


@runtime_checkable
class Write(Protocol):
    """A rule for the new values of a site."""

    def __call__(self, own: Tensor, entries: Indices) -> Tensor:
        """New values ``[entry, *features]``.

        Args:
            own: the run's own values, as the hook shows them: of one head or neuron where the edits
                have units, for the pattern ``[head, key_pos]`` or ``[key_pos]``.
            entries: the entries of the ``Edits`` that these are.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class Marks(ABC):
    """Places at one site of one block, in some cells.

    Positions are those of the padded prompt, at real tokens; with ``pattern`` they are query
    positions; at keys and values of cross-attention they are the memory's.
    """

    site: Site
    layer: int
    """Index of the block, along the path to the head that is read."""
    cells: Indices
    positions: Indices
    units: Indices | None = None
    """Head or neuron of every entry; None is all of them."""

    @property
    def is_of_memory(self) -> bool:
        """Whether the positions are those of what cross-attention reads."""
        return SITES[self.site].is_of_memory

    @abstractmethod
    def act(self, own: Tensor, entries: Indices) -> Tensor | None:
        """New values of some entries, or None where they stay."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Edits(Marks):
    """Changes by one rule."""

    write: Write
    donors: Sequence[Record] | None = None
    """Runs, one per row of the batch, whose rows of the same site are written as they are; the
    engine may splice them (rule 2)."""
    sources: Indices | None = None
    """Positions of the entries in those runs; -1 where the value is not a row of theirs."""

    def act(self, own: Tensor, entries: Indices) -> Tensor:
        """The values to write, where the block runs."""
        return self.write(own, entries).to(own)


@dataclass(frozen=True, eq=False, kw_only=True)
class Looks(Marks):
    """Activations that cells show to their later edits, after the edits of the same site."""

    seen: list[tuple[np.ndarray, Tensor]] = field(default_factory=list)
    """Entries and values of the cells that run now."""

    def act(self, own: Tensor, entries: Indices) -> None:
        """Take the values."""
        self.seen.append((entries, own))

    def at(self, entries: Indices) -> Tensor:
        """Values ``[entry, *features]`` of entries of the cells that run now."""
        there = np.concatenate([one for one, _ in self.seen])
        values = torch.cat([one for _, one in self.seen])
        order = np.argsort(there, kind="stable")
        # An entry whose row does not run is asked for by no row that does.
        place = np.searchsorted(there, entries, sorter=order).clip(max=len(order) - 1)
        return values[on_device(order[place], values)]


class Given:
    """Values that are known, one of every entry, as a rule."""

    def __init__(self, values: Tensor, is_added: bool = False) -> None:
        self.values, self.is_added = values, is_added

    def __call__(self, own: Tensor, entries: Indices) -> Tensor:
        """The values, or what they are added to."""
        values = self.values[on_device(entries, self.values)]
        return own + values.to(own.device) if self.is_added else values


class Called:
    """A user's function of the own values of one cell, ``[pos, *features]``, as a rule."""

    def __init__(self, function: Callable[[Tensor], Tensor], n_positions: int) -> None:
        self.function, self.n_positions = function, n_positions

    def __call__(self, own: Tensor, entries: Indices) -> Tensor:
        """New values of the positions that run."""
        if len(entries) == self.n_positions:
            return self.function(own)
        # The function expects all positions in their order: those that do not run are zeros.
        where = on_device(entries, own)
        every = own.new_zeros(self.n_positions, *own.shape[1:])
        return self.function(every.index_copy(0, where, own))[where]


def called(
    site: Site,
    layer: int,
    cell: int,
    positions: Sequence[int],
    function: Callable[[Tensor], Tensor],
) -> Edits:
    """The edit of one cell by a function of its own values: the price is a call per cell."""
    return Edits(
        site=site, layer=layer, cells=np.full(len(positions), cell),
        positions=np.array(positions, int), write=Called(function, len(positions)),
    )  # fmt: skip


def forget(marks: Iterable[Marks]) -> None:
    """Drop what looks have seen in cells that ran before."""
    for mark in marks:
        if isinstance(mark, Looks):
            mark.seen.clear()


def in_order(marks: Sequence[Marks]) -> list[Marks]:
    """Marks in the order in which they act; those of one site as they were given."""
    # A look sees what the edits of its site wrote.
    return sorted(marks, key=lambda m: (m.layer, _ORDER[m.site], isinstance(m, Looks)))


def hooks_of(
    marks: Sequence[Marks], cells: range, path: Sequence[str], rows: EncoderRows | None = None
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Forward hooks that apply some cells, one per row of the batch, in one run of the batch.

    Args:
        marks: edits and looks.
        cells: numbers of the cells.
        path: names of the blocks.
        rows: those of the encoder, where the path is its.
    """
    by_name: dict[str, list[tuple[Marks, np.ndarray]]] = {}
    forget(marks)
    for mark in in_order(marks):
        entries = np.flatnonzero((mark.cells >= cells.start) & (mark.cells < cells.stop))
        if len(entries):
            name = hook_name(mark.site, path[mark.layer])
            by_name.setdefault(name, []).append((mark, entries))

    def hook_for(chosen: list[tuple[Marks, np.ndarray]]) -> Callable[..., Tensor]:
        def act(given: Tensor, hook: HookPoint) -> Tensor:
            # In place, the edits would reach tensors that the run or a cache still holds.
            value = (given if rows is None else rows.by_prompt(str(hook.name), given)).clone()
            for mark, entries in chosen:
                # A view with positions first: assigning to it below writes into ``value``.
                first = value.transpose(1, 2) if mark.site.endswith("pattern") else value
                where = tuple(_indices(mark, entries, mark.cells[entries] % len(cells), value))
                new = mark.act(first[where], entries)
                if new is not None:
                    first[where] = new
            return value if rows is None else rows.by_window(str(hook.name), value, given)

        return act

    return [(name, hook_for(chosen)) for name, chosen in by_name.items()]


def _indices(mark: Marks, entries: Indices, rows: Indices, like: Tensor) -> Iterator[Tensor]:
    for part in (rows, mark.positions[entries]):
        yield on_device(part, like)
    if mark.units is not None:
        yield on_device(mark.units[entries], like)
