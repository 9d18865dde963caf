"""Writing a store of activations, shard by shard, from wherever an earlier try stopped."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...errors import InputError
from ...storage import FilePath
from .rows import DTYPES, ActivationRows, StoreDtype
from .store import (
    CARD,
    SHARDS,
    ShardRecord,
    StoreCard,
    StoreContents,
    as_folder,
    index_file,
    read_shard,
    write_card,
    write_shard,
)

T = TypeVar("T")
_OF_A_STORE = re.compile(r"\.?\d{5,}\.(safetensors|parquet)(\.tmp)?")


class ActivationWriter:
    """Writes shards into a folder; the same calls after a kill end with the same bytes.

    ::

        writer = ActivationWriter("activations", dtype="float16")
        writer.write_all(batches, lambda batch: rows_of(model, batch, points)["prompt"])

    Shards may be written in any order, and by several processes, one of them each. Making a writer
    touches nothing on disk.
    """

    def __init__(
        self, folder: FilePath, *, dtype: StoreDtype, about: Mapping[str, Any] | None = None
    ) -> None:
        """Look at what is in the folder.

        Args:
            folder: of the store; a new or empty one, or that of an earlier try.
            dtype: of the values that are kept: float32, bfloat16 or float16.
            about: whatever tells where the rows come from, such as the model; JSON.

        Raises:
            InputError: another dtype, a folder with other files in it, or something else than JSON.
        """
        self.folder, self.dtype = as_folder(folder), dtype
        doing = f"writing activations to {self.folder}"
        if dtype not in DTYPES:
            raise InputError(f"{doing}: got dtype={dtype!r}, expected one of {', '.join(DTYPES)}.")
        try:
            self.about = dict[str, Any](json.loads(json.dumps(dict(about or {}))))
        except (TypeError, ValueError) as error:
            raise InputError(f"{doing}: got an `about` that is no JSON ({error}).") from None
        self._contents: StoreContents | None = None
        if strangers := _strangers(self.folder):
            raise InputError(
                f"{doing}: got a folder with other files in it ({', '.join(strangers[:5])}), "
                "expected a new or empty folder, or that of an earlier try. Choose another."
            )

    def is_done(self, number: int) -> bool:
        """Whether a shard is whole.

        Raises:
            InputError: it is damaged, or was written with another dtype or ``about``.
        """
        if not index_file(self.folder, number).exists():
            return False
        contents, _ = read_shard(self.folder, number)
        if (contents.dtype, contents.about) != (self.dtype, self.about):
            raise InputError(
                f"resuming the activations in {self.folder}: shard {number} was kept in "
                f"{contents.dtype} about {contents.about}, expected {self.dtype} about "
                f"{self.about}. Choose another folder, or delete this one."
            )
        self._fit(contents, number)
        return True

    def write(self, number: int, rows: ActivationRows) -> ShardRecord:
        """Writes a shard; an older one of that number is replaced.

        Args:
            number: of the shard, from 0; rows are read in the order of shards.
            rows: of the points and columns that the other shards have.

        Raises:
            InputError: rows of other points or columns, values that are not finite or not in the
                dtype, or a full disk.
        """
        if type(number) is not int or number < 0:
            raise InputError(f"writing a shard: got number {number!r}, expected 0, 1, 2, ...")
        contents = StoreContents(
            kind=rows.kind,
            points={name: [*shape] for name, shape in rows.shapes.items()},
            dtype=self.dtype,
            columns=[*rows.index],
            about=self.about,
        )
        self._fit(contents, number)
        return write_shard(self.folder, number, rows.cast(self.dtype), contents)

    def _fit(self, contents: StoreContents, number: int) -> None:
        """Refuse a shard that has something else than the first that was seen."""
        if self._contents is None:
            self._contents = contents
        elif contents != self._contents:
            raise InputError(
                f"writing activations to {self.folder}: shard {number} has {_told(contents)}, "
                f"expected {_told(self._contents)} as the others. Collect all alike, or choose "
                "another folder."
            )

    def write_all(self, batches: Sequence[T], collect: Callable[[T], ActivationRows]) -> StoreCard:
        """Writes a shard for each batch that has none yet, and the card.

        Args:
            batches: the same in every try.
            collect: batch -> its rows, such as one run of the model.

        Raises:
            InputError: see ``write`` and ``finish``.
        """
        for number, batch in enumerate(batches):
            if not self.is_done(number):
                self.write(number, collect(batch))
        return self.finish(len(batches))

    def finish(self, n_shards: int) -> StoreCard:
        """Writes the card: the store is whole, and can be read.

        Raises:
            InputError: shards that are missing, damaged, too many, or unlike one another.
        """
        numbers = {int(path.stem) for path in (self.folder / SHARDS).glob("[0-9]*.parquet")}
        doing = f"finishing the activations in {self.folder}"
        missing, beyond = sorted({*range(n_shards)} - numbers), sorted(numbers - {*range(n_shards)})
        if n_shards < 1 or missing or beyond:
            raise InputError(
                f"{doing}: got {len(numbers)} shards, expected {n_shards} and at least one"
                + (f"; there is no shard {missing[0]}" if missing else "")
                + (f"; shard {beyond[0]} is too many" if beyond else "")
                + ". Write what is missing, or choose another folder."
            )
        records = []
        for number in range(n_shards):
            contents, record = read_shard(self.folder, number)
            self._fit(contents, number)
            records.append(record)
        assert self._contents is not None
        card = StoreCard(contents=self._contents, shards=records)
        write_card(self.folder, card)
        return card


def _told(contents: StoreContents) -> str:
    points = (f"{name} {shape}" for name, shape in contents.points.items())
    return f"{contents.kind} rows of {', '.join(points)} with {', '.join(contents.columns)}"


def _strangers(folder: Path) -> list[str]:
    """Names in the folder that no store has."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        return [folder.name]
    found = [one.name for one in folder.iterdir() if one.name not in (CARD, SHARDS)]
    found = [name for name in found if name != f".{CARD}.tmp"]
    if (shards := folder / SHARDS).is_dir():
        names = (one.name for one in shards.iterdir())
        found += [f"{SHARDS}/{name}" for name in names if not _OF_A_STORE.fullmatch(name)]
    return sorted(found)
