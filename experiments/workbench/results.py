"""What a run has found: its tables, and what they were measured with."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd

from .intervals import Draws
from .settings import ExperimentConfig

Row = dict[str, Any]
"""A row of a tidy table: column -> value."""
Tables = Mapping[str, pd.DataFrame]
"""Tidy tables by name."""
Columns = Mapping[str, Any]
"""Columns of a table, which broadcast to cells and items."""
ItemRows = list[list[Row]]
"""Rows of every item of a batch."""
C = TypeVar("C", bound=ExperimentConfig)


def having(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows of a table that have these values; of several for a column, one of them."""
    for column, value in values.items():
        is_one_of = isinstance(value, list | tuple | set)
        table = table[table[column].isin([*value]) if is_one_of else table[column] == value]
    return table


def item_rows(columns: Columns, n_items: int) -> ItemRows:
    """A row per cell of every item, of columns whose last axis is the item."""
    every = np.broadcast_arrays(*(np.asarray(one, object) for one in columns.values()))
    by_item = [one.reshape(-1, n_items).T.tolist() for one in every]
    return [
        [dict(zip(columns, cell, strict=True)) for cell in zip(*own, strict=True)]
        for own in zip(*by_item, strict=True)
    ]


def joined(parts: Iterable[ItemRows]) -> ItemRows:
    """The rows of all parts, item by item."""
    return [[row for rows in own for row in rows] for own in zip(*parts, strict=True)]


def parts_by(table: pd.DataFrame, *columns: str) -> Iterator[tuple[Row, pd.DataFrame]]:
    """What the rows of each part of a table have in common, and the part; in order of their rows.

    Args:
        table: to be parted.
        columns: whose values are the same within a part.
    """
    for key, part in table.groupby([*columns], sort=False):
        yield dict(zip(columns, key, strict=True)), part


@dataclass(frozen=True)
class Results(Generic[C]):
    """All that summaries, controls, claims and pages are made of."""

    config: C
    inputs: Mapping[str, Any]
    """What `Experiment.identify` returned."""
    tables: dict[str, pd.DataFrame]
    """Measured tables, then summaries, each as soon as it is made."""

    def __getitem__(self, name: str) -> pd.DataFrame:
        return self.tables[name]

    @property
    def n_blocks(self) -> int:
        """Number of blocks on the model's way to its output."""
        return int(self.inputs["model"]["blocks"])

    @property
    def draws(self) -> Draws:
        """The draws behind the run's intervals."""
        return Draws(self.config.seed, self.config.n_resamples)
