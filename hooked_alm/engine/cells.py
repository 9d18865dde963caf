"""Cells of a sweep: a row of the batch, the edits of its run, and the looks at it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from ..hooks import HookPoint
from ..points import SITES, Site, hook_name
from .record import Record

Write = Callable[[Tensor], Tensor]
"""Function from a run's own values to new ones, both ``[pos, *features]``. Features are as the hook
shows them, for the pattern ``[head, key_pos]``."""


class DonorRows(NamedTuple):
    """Rows of another run that an edit writes unchanged; the engine may splice them (rule 2)."""

    record: Record
    positions: Sequence[int]


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one site of one block, at some positions of one row.

    Positions are those of the padded prompt, at real tokens; with ``pattern`` they are query
    positions.
    """

    site: Site
    layer: int
    """Index of the block, along the path to the head that is read."""
    positions: Sequence[int]
    write: Write
    donor: DonorRows | None = None
    """Source of the values, if they are whole rows of the same site of another run."""


@dataclass(eq=False)
class Look:
    """An activation that a cell's own run shows to its later edits, which read ``value``.

    It is taken after the edits of the same site.
    """

    site: Site
    layer: int
    positions: Sequence[int]
    value: Float[Tensor, " pos *features"] = field(init=False)


@dataclass(frozen=True, eq=False)
class Cell:
    """A row of the batch under one or several edits at once: one question of a sweep."""

    row: int
    edits: tuple[Edit, ...]
    looks: tuple[Look, ...] = ()

    @property
    def marks(self) -> list[Edit | Look]:
        """Edits and looks in the order in which they act; those of one site as they were given."""
        # Edits first: the sort is stable, so a look sees what the edits of its site wrote.
        marks: list[Edit | Look] = [*self.edits, *self.looks]
        return sorted(marks, key=lambda mark: (mark.layer, _ORDER[mark.site]))


_ORDER = {site: place for place, site in enumerate(SITES)}


def hooks_of(cells: Sequence[Cell], path: Sequence[str]) -> list[tuple[str, Callable[..., Tensor]]]:
    """Forward hooks that apply cells of different rows in one run of the whole batch."""
    by_name: dict[str, list[tuple[int, Edit | Look]]] = {}
    for cell in cells:
        for mark in cell.marks:
            name = hook_name(mark.site, path[mark.layer])
            by_name.setdefault(name, []).append((cell.row, mark))

    def hook_for(marks: list[tuple[int, Edit | Look]]) -> Callable[..., Tensor]:
        def act(value: Tensor, hook: HookPoint) -> Tensor:
            # In place, the edit would reach tensors that the run or a cache still holds.
            value = value.clone()
            for row, mark in marks:
                # A view with positions first: assigning to it below writes into ``value``.
                rows = value[row].transpose(0, 1) if mark.site == "pattern" else value[row]
                where = list(mark.positions)
                if isinstance(mark, Look):
                    mark.value = rows[where]
                else:
                    rows[where] = mark.write(rows[where]).to(rows.dtype)
            return value

        return act

    return [(name, hook_for(marks)) for name, marks in by_name.items()]
