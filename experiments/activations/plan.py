"""What a run will store, told before any weight is loaded: points, shards, rows, bytes."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hooked_alm.display import amount, listed
from hooked_alm.errors import InputError
from hooked_alm.methods.activations.collect import n_rows_of
from hooked_alm.methods.activations.rows import COLUMNS, DTYPES, StoreDtype
from hooked_alm.methods.activations.selection import KeptPoint, RowKind, kept_points
from hooked_alm.model import HookedALM

from ..materials.clips import ClipFile
from ..materials.records import collect
from .settings import ActivationsConfig

INDEX_BYTES, SHARD_BYTES = 24, 16_000
"""Bytes of a row of the index and of what is known of a shard, at most, as parquet packs it."""


@dataclass(frozen=True)
class StoragePlan:
    """Rows of every clip, by kind of row and span, and the points that are kept of them."""

    points: list[KeptPoint]
    rows: list[dict[RowKind, dict[str, int]]]
    """Per clip."""
    shards: list[range]
    """Clips of every shard, by their numbers."""
    dtype: StoreDtype

    @property
    def kinds(self) -> list[RowKind]:
        """Kinds of rows, each a store of its own."""
        return [*dict.fromkeys(point.kind for point in self.points)]

    def n_rows(self, kind: RowKind, clips: Sequence[int] | None = None) -> int:
        """Rows of some clips; None is all."""
        some = self.rows if clips is None else [self.rows[clip] for clip in clips]
        return sum(sum(by_kind[kind].values()) for by_kind in some)

    def row_bytes(self, kind: RowKind) -> int:
        """Bytes of a row of all points of a kind."""
        width = sum(point.width for point in self.points if point.kind == kind)
        return width * DTYPES[self.dtype].itemsize

    def n_bytes(self, shards: Sequence[int]) -> int:
        """Bytes of some shards, their index included."""
        clips = [clip for shard in shards for clip in self.shards[shard]]
        return sum(
            self.n_rows(kind, clips) * (self.row_bytes(kind) + INDEX_BYTES)
            + len(shards) * SHARD_BYTES
            for kind in self.kinds
        )

    def lines(self) -> Iterator[str]:
        """What will be stored, for a terminal."""
        for kind in self.kinds:
            mine = [point.name for point in self.points if point.kind == kind]
            yield (
                f"{kind}: {self.n_rows(kind):,} rows of {len(mine)} points ({listed(mine, 3)}), "
                f"{self.row_bytes(kind):,} bytes a row in {self.dtype}"
            )
        every = range(len(self.shards))
        yield (
            f"{len(self.rows)} clips in {len(every)} shards: about {amount(self.n_bytes(every))}, "
            f"the largest shard {amount(max(self.n_bytes([shard]) for shard in every))}"
        )


def labels_of(clips: Sequence[ClipFile]) -> dict[str, list[str]]:
    """Columns that the clips' table adds to the index, one text a clip.

    Raises:
        InputError: a column that every index has already.
    """
    names = [*dict.fromkeys(name for clip in clips for name in clip.cells)]
    if taken := [name for name in names if name in COLUMNS]:
        raise InputError(
            f"labelling rows by the table of clips: got the columns {', '.join(taken)}, expected "
            f"other names than the index' own ({', '.join(COLUMNS)}). Rename them in the table."
        )
    return {name: [clip.cells.get(name, "") for clip in clips] for name in names}


def plan_storage(
    model: HookedALM, clips: Sequence[ClipFile], config: ActivationsConfig
) -> StoragePlan:
    """What will be stored of some clips; every clip is read, and nothing runs.

    Args:
        model: laid out; it has ears, and needs no weights.
        clips: to be heard.
        config: of the run.

    Raises:
        InputError: clips that cannot be heard, spans that they lack.
        HookNameError: points that cannot be kept.
    """
    points = kept_points(model, config.points)

    def counted(clip: ClipFile) -> dict[RowKind, dict[str, int]]:
        # Counts do not depend on the language, which some models would have to hear first.
        x = config.heard(model, [config.read(model, clip)], stand_in="en")
        return n_rows_of(model, x, points, config.spans)

    rows = collect("hearing the clips", counted, clips, lambda clip: clip.where)
    shards = cut(range(len(clips)), config.batch_size * config.unit_batches)
    return StoragePlan(points, rows, shards, config.kept_dtype)


def cut(numbers: range, n: int) -> list[range]:
    """Neighbouring numbers in parts of ``n``; the last may have fewer."""
    return [numbers[first : first + n] for first in range(0, len(numbers), n)]


def check_room(plan: StoragePlan, folder: Path, left: Sequence[int]) -> None:
    """Refuse a disk that has no room for the shards that are still to be written.

    Raises:
        InputError: it is so.
    """
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    needed, free = plan.n_bytes(left), shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"storing activations in {folder}: got a disk with {amount(free)} free, expected "
            f"{amount(needed)} for {len(left)} shards. Free some space, choose fewer points or "
            "spans, a smaller store_dtype, or another --out."
        )
