"""Rows of clips at some points: what dictionaries learn, wherever it comes from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooked_alm.methods.activations.mixing import MixedRows, RowsByPoint
from hooked_alm.methods.activations.selection import KeptPoint

from ..workbench.batches import BatchedConfig, bucketed


@runtime_checkable
class KnownClip(Protocol):
    """A clip of which rows are read."""

    @property
    def name(self) -> str:
        """Names it in results."""

    @property
    def cells(self) -> Mapping[str, str]:
        """What is known of it, by column."""

    @property
    def where(self) -> str:
        """Leads the errors about it."""


@dataclass(frozen=True, eq=False)
class RowSource(ABC):
    """Rows at some points of clips, which are named by their numbers."""

    config: BatchedConfig
    clips: Sequence[KnownClip]
    points: list[KeptPoint]
    n_rows: list[int]
    """Rows of each clip."""
    lengths: list[int]
    """Of each clip, by which parts are made."""
    of_model: dict[str, Any]
    """The model whose rows they are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the rows."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the rows are."""

    @property
    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What the rows follow from, for ``inputs`` of a run."""

    @property
    @abstractmethod
    def prompt(self) -> str | None:
        """Instruction under which clips were heard, where there is one."""

    @abstractmethod
    def values(self, part: Sequence[int]) -> RowsByPoint:
        """Rows of some clips, clip by clip in their order."""

    def parts(self, clips: Sequence[int]) -> list[list[int]]:
        """Clips, by their numbers, in parts that are read together."""
        found = bucketed(
            [self.lengths[i] for i in clips], self.config.batch_size, self.config.batch_positions
        )
        return [[clips[i] for i in part] for part in found]

    def count(self, clips: Sequence[int]) -> int:
        """Rows of some clips."""
        return sum(self.n_rows[clip] for clip in clips)

    def mixed(self, clips: Sequence[int], max_bytes: int) -> MixedRows:
        """The rows of some clips, shuffled; see ``MixedRows``."""
        parts = self.parts(clips)
        return MixedRows(
            lambda part: self.values(parts[part]), [self.count(part) for part in parts],
            row_bytes=sum(point.width for point in self.points) * self.dtype.itemsize,
            max_bytes=max_bytes,
        )  # fmt: skip

    def by_clip(self, rows: Tensor, part: Sequence[int]) -> list[Tensor]:
        """What belongs to each clip of a part."""
        return [*rows.split([self.n_rows[clip] for clip in part])]


@dataclass(frozen=True, eq=False)
class MeanRows(RowSource):
    """One row a clip: the mean of its rows."""

    of: RowSource

    @classmethod
    def of_clips(cls, rows: RowSource) -> "MeanRows":
        """The means of a source's rows."""
        return cls(
            rows.config, rows.clips, rows.points, [1] * len(rows.clips), rows.lengths,
            rows.of_model, rows,
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """As of the rows."""
        return self.of.dtype

    @property
    def device(self) -> torch.device:
        """As of the rows."""
        return self.of.device

    @property
    def described(self) -> dict[str, Any]:
        """As of the rows."""
        return self.of.described

    @property
    def prompt(self) -> str | None:
        """As of the rows."""
        return self.of.prompt

    def values(self, part: Sequence[int]) -> RowsByPoint:
        """The mean row of each clip, in their order."""
        return {
            name: torch.stack([one.float().mean(0) for one in self.of.by_clip(rows, part)]).to(
                rows.dtype
            )
            for name, rows in self.of.values(part).items()
        }
