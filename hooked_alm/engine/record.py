"""Records of runs, so that runs which differ from them later need not be computed whole."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..errors import InputError
from ..spans import Range

RowMap = Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row d_model"]]
"""What stands in the place of rows, each by itself."""
Positions = Int[np.ndarray, " position"]
KeyValue = tuple[Float[Tensor, "kv_head key_row d_head"], Float[Tensor, "kv_head key_row d_head"]]


@dataclass(eq=False)
class Record:
    """The run of one prompt at its real positions; the axis ``row`` counts these, pads left out.

    With a path through an audio encoder, a prompt is the rows of its clips' windows.
    """

    where: Int[Tensor, " row"]
    """Positions of the rows in the padded prompt; on the CPU, where indices are made."""
    n_pos: int
    """Length of the padded prompt."""
    tokens: Int[Tensor, " row"]
    position_ids: Int[Tensor, "*axis row"]
    resid: list[Float[Tensor, "row d_model"]]
    """The residual stream at every depth of the path to the head in use."""
    keys: list[Float[Tensor, "kv_head row d_head"]]
    """Keys of every block, after rotation."""
    values: list[Float[Tensor, "kv_head row d_head"]]
    """Values of every block."""
    rotary: tuple[Float[Tensor, "row d_head"], Float[Tensor, "row d_head"]] | None
    """Tables ``cos`` and ``sin`` of every row; None where positions are in the stream."""
    is_seen: Bool[np.ndarray, " row"] | None = None
    """Whether a row is attended to; None is all of them."""
    memory: list[KeyValue] | None = None
    """Keys and values of what every block's cross-attention reads; None where there is none."""
    maps: "dict[int, MappedRows]" = field(default_factory=dict)
    """Depth -> what stood there in the place of some rows; of rows that are computed anew, too."""

    def __len__(self) -> int:
        """Number of real positions."""
        return len(self.where)

    def rows_of(self, positions: Positions) -> Int[np.ndarray, " position"]:
        """Rows of padded positions.

        Raises:
            InputError: a position is a pad, or beyond the prompt.
        """
        inside = (positions >= 0) & (positions < self.n_pos)
        # Clipped so that the look-up works; a position outside counts as a pad, -1.
        rows = np.where(inside, self._row_of[positions.clip(0, self.n_pos - 1)], -1)
        if (rows < 0).any():
            pads = positions[rows < 0].tolist()
            raise InputError(
                f"editing positions {pads[:8]}: they are pads, or beyond the {self.n_pos} "
                "positions of the prompt. Use positions where the attention mask is 1."
            )
        return rows

    @cached_property
    def _row_of(self) -> Int[np.ndarray, " pos"]:
        """Row of every padded position, -1 at pads."""
        found = np.full(self.n_pos, -1)
        found[self.where.numpy()] = np.arange(len(self))
        return found

    @cached_property
    def place(self) -> Int[np.ndarray, " row"]:
        """Place of every row as stacks count them, from the first."""
        where = self.where.numpy()
        return where - where[:1]

    def rows_at(self, ranges: tuple[Range, ...]) -> Int[np.ndarray, " found"]:
        """Rows at some places, ascending."""
        found = np.zeros(len(self), bool)
        for start, stop in ranges:
            found |= (self.place >= start) & (self.place < stop)
        return found.nonzero()[0]

    def key_values(self, layer: int) -> KeyValue:
        """Keys and values of every row at a block."""
        return self.keys[layer], self.values[layer]

    def final(self, rows: Int[np.ndarray, " read"]) -> Float[Tensor, "read d_model"]:
        """The residual stream after the last block, at some rows."""
        return self.resid[-1][on_device(rows, self.resid[-1])]


class MappedRows(NamedTuple):
    """Rows of a record that a map changes."""

    is_mapped: Bool[np.ndarray, " row"]
    change: RowMap

    def __call__(
        self, stream: Float[Tensor, "flat d_model"], rows: Int[np.ndarray, " flat"]
    ) -> Float[Tensor, "flat d_model"]:
        """The stream of some rows of the record, changed."""
        where = on_device(self.is_mapped[rows].nonzero()[0], stream)
        return stream.index_copy(0, where, self.change(stream[where]))


@dataclass(eq=False)
class Spliced:
    """A record whose rows ``start`` to ``stop`` are another run's (rule 2).

    From the replaced depth upward they *are* that run's rows: both agree before ``start``.
    """

    record: Record
    donor: Record
    start: int
    stop: int

    def key_values(self, layer: int) -> KeyValue:
        """Keys and values of rows 0 to ``stop`` at a block above the splice."""
        # Nothing from ``stop`` on: those rows are recomputed, and bring their own.
        pairs = zip(self.record.key_values(layer), self.donor.key_values(layer), strict=True)
        keys, values = (
            torch.cat([ours[:, : self.start], theirs[:, self.start : self.stop]], dim=1)
            for ours, theirs in pairs
        )
        return keys, values

    def final(self, rows: Int[np.ndarray, " read"]) -> Float[Tensor, "read d_model"]:
        """The residual stream after the last block, of rows before ``stop``."""
        inside = (rows >= self.start) & (rows < self.stop)
        # The donor may end before the rows that are read; clipped ones are not selected.
        ours, theirs = self.record.final(rows), self.donor.final(rows.clip(max=self.stop - 1))
        return torch.where(on_device(inside, ours)[:, None], theirs, ours)


class Agreement(NamedTuple):
    """Numbers of first rows in which two runs agree: a splice or a shared prefix needs enough.

    Runs are functions of embeddings, places and position ids; rows up to the first difference are
    the same rows.
    """

    embeddings: int
    """Rows with the same embeddings, bit for bit."""
    positions: int
    """Rows with the same position ids and the same distances in the padded prompt."""

    @classmethod
    def of(cls, ours: Record, theirs: Record) -> "Agreement":
        """Compare two runs."""
        if not _same_memory(ours, theirs):
            return cls(embeddings=0, positions=0)
        n = min(len(ours), len(theirs))
        same = (ours.resid[0][:n] == theirs.resid[0][:n]).all(dim=-1).cpu()
        # Distances, which a sliding window counts; the amount of padding in front cancels.
        places = ours.where[:n] - ours.where[0] == theirs.where[:n] - theirs.where[0]
        same_ids = ours.position_ids[..., :n] == theirs.position_ids[..., :n]
        places &= same_ids.reshape(-1, n).all(0)
        return cls(embeddings=_n_leading(same), positions=_n_leading(places))


def _same_memory(ours: Record, theirs: Record) -> bool:
    """Whether cross-attention reads the same in both runs: keys and values of its first block."""
    if ours.memory is None or theirs.memory is None:
        return ours.memory is theirs.memory
    return all(map(torch.equal, ours.memory[0], theirs.memory[0]))


def _n_leading(flags: Bool[Tensor, " row"]) -> int:
    return int(flags.long().cumprod(0).sum())


def on_device(indices: Shaped[np.ndarray, "..."], like: Tensor) -> Tensor:
    """Indices where a tensor is. Nothing waits for the copy."""
    return torch.from_numpy(np.ascontiguousarray(indices)).to(like.device, non_blocking=True)
