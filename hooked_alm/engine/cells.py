"""What a sweep asks: edits of one run, and the cells made of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ..hooks import HookPoint
from .record import Record

Site = Literal[
    "resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid",
    "pre", "gate", "post", "mlp_out", "resid_post",
]  # fmt: skip
Unit = Literal["head", "kv_head", "neuron"]
Write = Callable[[Tensor], Tensor]
"""New values from the run's own, both ``[pos, *features]``; features are as the hook shows them,
and ``[head, key_pos]`` for the pattern."""


class SiteFacts(NamedTuple):
    """Where a site is, what it is divided into, and how far an edit there reaches at once."""

    hook: str
    unit: Unit | None
    changes_later_rows: bool
    """Within its own block: what other positions read (keys, values and all before them)."""


SITES: dict[Site, SiteFacts] = {
    "resid_pre": SiteFacts("hook_resid_pre", None, True),
    "q": SiteFacts("attn.hook_q", "head", False),
    "k": SiteFacts("attn.hook_k", "kv_head", True),
    "v": SiteFacts("attn.hook_v", "kv_head", True),
    "pattern": SiteFacts("attn.hook_pattern", "head", False),
    "z": SiteFacts("attn.hook_z", "head", False),
    "attn_out": SiteFacts("hook_attn_out", None, False),
    "resid_mid": SiteFacts("hook_resid_mid", None, False),
    "pre": SiteFacts("mlp.hook_pre", "neuron", False),
    "gate": SiteFacts("mlp.hook_gate", "neuron", False),
    "post": SiteFacts("mlp.hook_post", "neuron", False),
    "mlp_out": SiteFacts("hook_mlp_out", None, False),
    "resid_post": SiteFacts("hook_resid_post", None, False),
}
"""In the order in which they fire."""


def site_name(site: Site, block: str) -> str:
    """Hook point of a site of a block, which ``model.path`` names."""
    return f"{block}.{SITES[site].hook}"


class DonorRows(NamedTuple):
    """Says that an edit writes another run's own rows, as they are."""

    record: Record
    positions: Sequence[int]


@dataclass(frozen=True, eq=False)
class Edit:
    """One site of one block, changed at some positions of one row.

    Positions are those of the padded prompt, at real tokens; with ``pattern`` they are query
    positions.
    """

    site: Site
    layer: int
    """Along the path to the head that is read."""
    positions: Sequence[int]
    write: Write
    donor: DonorRows | None = None
    """Where the written values come from, if they are whole rows of another run's same site."""

    def apply(self, value: Tensor, row: int) -> None:
        """Write into an activation ``[batch, pos, ...]`` of the whole batch."""
        rows = value[row].transpose(0, 1) if self.site == "pattern" else value[row]
        where = list(self.positions)
        rows[where] = self.write(rows[where]).to(rows.dtype)


@dataclass(frozen=True, eq=False)
class Cell:
    """One row of the batch under one or several edits at once."""

    row: int
    edits: tuple[Edit, ...]


def hooks_of(cells: Sequence[Cell], path: Sequence[str]) -> list[tuple[str, Callable[..., Tensor]]]:
    """Forward hooks that apply cells of different rows in one run of the whole batch."""
    by_name: dict[str, list[tuple[int, Edit]]] = {}
    for cell in cells:
        for edit in cell.edits:
            name = site_name(edit.site, path[edit.layer])
            by_name.setdefault(name, []).append((cell.row, edit))

    def hook_for(edits: list[tuple[int, Edit]]) -> Callable[..., Tensor]:
        def write(value: Tensor, hook: HookPoint) -> Tensor:
            value = value.clone()
            for row, edit in edits:
                edit.apply(value, row)
            return value

        return write

    return [(name, hook_for(edits)) for name, edits in by_name.items()]
