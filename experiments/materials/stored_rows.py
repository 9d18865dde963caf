"""Rows that a store of activations holds, whatever wrote it: other encoders' too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hooked_alm.errors import InputError
from hooked_alm.methods.activations.mixing import RowsByPoint
from hooked_alm.methods.activations.reader import ActivationReader, RowNumbers
from hooked_alm.methods.activations.rows import COLUMNS, DTYPES
from hooked_alm.methods.activations.selection import KeptPoint, select_names
from hooked_alm.methods.activations.store import CARD

from ..workbench.identity import file_sha256
from .clip_rows import ClipRowsConfig
from .row_source import RowSource


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredClip:
    """A prompt or a clip of which a store has rows; see ``KnownClip``."""

    name: str
    cells: dict[str, str]
    where: str


@dataclass(frozen=True, eq=False)
class StoredRows(RowSource):
    """Rows of a store, clip by clip in its order."""

    config: ClipRowsConfig
    reader: ActivationReader
    rows: RowNumbers
    """All that are read, in the store."""
    starts: list[int]
    """Where among these each clip begins, and where the last one ends."""

    @classmethod
    def opened(cls, folder: str, points: Sequence[str], config: ClipRowsConfig) -> "StoredRows":
        """Reads the whole store once, and compares it with its hashes.

        Rows of a clip are neighbours in a shard that have the same prompt.

        Raises:
            InputError: no store, a damaged one, or spans that it lacks.
            HookNameError: points that it lacks.
        """
        reader = ActivationReader(folder)
        contents = reader.card.contents
        kept = [
            KeptPoint(name, contents.kind, tuple(contents.points[name]))
            for name in select_names(points, reader.points)
        ]
        rows = _of_spans(reader, config.spans)
        reader.check()
        shards = np.cumsum([shard.rows for shard in reader.card.shards])
        of_row = (np.searchsorted(shards, rows, side="right"), reader.column("prompt")[rows])
        is_new = np.any([np.diff(one) != 0 for one in of_row], axis=0)
        starts = np.array([0, *(is_new.nonzero()[0] + 1), len(rows)])
        n_rows = np.diff(starts).tolist()
        columns = {
            name: [str(value) for value in reader.column(name)[rows[starts[:-1]]]]
            for name in reader.columns
            if name == "clip" or name not in COLUMNS
        }
        clips = [
            StoredClip(name=name, where=f"{folder}: {name}", cells={
                column: values[number] for column, values in columns.items() if column != "clip"
            })
            for number, name in enumerate(columns["clip"])
        ]  # fmt: skip
        model = contents.about.get("model", {})
        of_model = model if isinstance(model, dict) else {"name": str(model)}
        return cls(config, clips, kept, n_rows, n_rows, of_model, reader, rows, starts.tolist())

    @property
    def dtype(self) -> torch.dtype:
        """The store's."""
        return DTYPES[self.reader.card.contents.dtype]

    @property
    def device(self) -> torch.device:
        """That of the settings."""
        return torch.device(self.config.device)

    @property
    def described(self) -> dict[str, Any]:
        """The store's card, which has the hash of every shard."""
        return {"model": self.of_model, "store": {CARD: file_sha256(self.reader.folder / CARD)}}

    @property
    def prompt(self) -> str | None:
        """What the store says of it."""
        found = self.reader.card.contents.about.get("prompt")
        return found if found is None else str(found)

    def values(self, part: Sequence[int]) -> RowsByPoint:
        """Rows of some clips, clip by clip in their order."""
        some = [self.rows[self.starts[clip] : self.starts[clip + 1]] for clip in part]
        rows = np.concatenate(some)
        names = [point.name for point in self.points]
        return {name: self.reader.read(name, rows).to(self.device) for name in names}


def _of_spans(reader: ActivationReader, spans: Sequence[str]) -> RowNumbers:
    """Rows of some spans.

    Raises:
        InputError: spans of which the store has none.
    """
    known = sorted(map(str, reader.column("span").unique()))
    if missing := [one for one in spans if one not in (*known, "all")]:
        raise InputError(
            f"reading rows of {reader.folder}: got the spans {', '.join(missing)}, expected some "
            f"of those that it has: {', '.join(known)}, or all."
        )
    if "all" in spans:
        return np.arange(len(reader))
    return reader.rows_where(span=spans)
