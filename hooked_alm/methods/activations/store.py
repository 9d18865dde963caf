"""A store of activations on disk: what its files are.

::

    store.json               the card: points, dtype, columns, hashes of every shard
    shards/00000.safetensors one tensor [row, width] per point
    shards/00000.parquet     the index: what each row is

A shard is there if its index is, which is written last. The card comes at the very end: a folder
with one is a whole store. All bytes follow from the rows and the settings alone.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import InputError, any_failure
from ...storage import FilePath, expanded, write_atomic
from .rows import DTYPES, ActivationRows, StoreDtype
from .selection import RowKind, width_of

T = TypeVar("T", int, str)
CARD, SHARDS = "store.json", "shards"
FORMAT = "hooked_alm activations 1"
_KEY = b"hooked_alm"
_TYPES = {"prompt": pa.int64(), "position": pa.int64(), "seconds": pa.float64()}
"""Types of columns; all others are text."""
_DTYPE_NAMES: dict[StoreDtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreContents:
    """What all shards of a store have in common."""

    kind: RowKind
    """What a row is."""
    points: dict[str, list[int]]
    """Point -> shape of a row, of which the width is the product."""
    dtype: StoreDtype
    columns: list[str]
    """Columns of the index."""
    about: dict[str, Any]
    """Whatever else tells where the rows come from; JSON."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of all points together."""
        return sum(map(width_of, self.points.values())) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """A shard that is whole."""

    rows: int
    tensor_bytes: int
    tensor_sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreCard:
    """``store.json``."""

    contents: StoreContents
    shards: list[ShardRecord]

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.tensor_bytes + shard.index_bytes for shard in self.shards)


def tensor_file(folder: Path, number: int) -> Path:
    """File of a shard's tensors."""
    return folder / SHARDS / f"{number:05d}.safetensors"


def index_file(folder: Path, number: int) -> Path:
    """File of a shard's index, which makes the shard whole."""
    return folder / SHARDS / f"{number:05d}.parquet"


# --- Writing


def write_shard(
    folder: Path, number: int, rows: ActivationRows, contents: StoreContents
) -> ShardRecord:
    """Writes a shard; it is there wholly or, whenever the process dies, not at all.

    Args:
        folder: of the store.
        number: of the shard, from 0.
        rows: already in the store's dtype.
        contents: what the store's shards have in common.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    parts = _tensor_parts(rows, contents.dtype)
    digest, n_bytes = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        n_bytes += len(part)
    tensors = {"rows": len(rows), "bytes": n_bytes, "sha256": digest.hexdigest()}
    index = _index_bytes(rows, {"contents": asdict(contents), "tensors": tensors})
    path = tensor_file(folder, number)
    try:
        # The store is not finished any more; and an index of other tensors would vouch for these.
        (folder / CARD).unlink(missing_ok=True)
        index_file(folder, number).unlink(missing_ok=True)
        write_atomic(path, *parts)
        write_atomic(index_file(folder, number), index)
    except OSError as error:
        raise InputError(
            f"writing {path}: got '{error.strerror or error}' from the system, expected room for "
            f"{(n_bytes + len(index)) / 1e6:.1f} MB. See to the disk; what is whole is kept, and "
            "the same call goes on behind it."
        ) from error
    return _record(tensors, index)


def _record(tensors: Mapping[str, Any], index: bytes) -> ShardRecord:
    return ShardRecord(
        rows=tensors["rows"],
        tensor_bytes=tensors["bytes"],
        tensor_sha256=tensors["sha256"],
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def _tensor_parts(rows: ActivationRows, dtype: StoreDtype) -> list[bytes | memoryview]:
    """A safetensors file: its header, and the tensors' own memory, of which nothing is copied.

    The library's writer copies everything twice, at less than a disk's speed.

    Source: the format's page in https://github.com/huggingface/safetensors.
    """
    header, parts, at = dict[str, Any](), list[bytes | memoryview](), 0
    for name, value in rows.values.items():
        data = value.reshape(-1).view(torch.uint8).numpy().data
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": [*value.shape],
            "data_offsets": [at, at + len(data)],
        }
        parts.append(data)
        at += len(data)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return [len(text).to_bytes(8, "little"), text, *parts]


def _index_bytes(rows: ActivationRows, about: Mapping[str, Any]) -> bytes:
    """A parquet file of the index; what else is known of the shard stands in its schema."""
    columns = {}
    for name, column in rows.index.items():
        if name in _TYPES:
            columns[name] = pa.array(column, type=_TYPES[name])
        else:
            columns[name] = pa.array(column, type=pa.string()).dictionary_encode()
    table = pa.table(columns)
    schema = table.schema.with_metadata({_KEY: json.dumps(about, sort_keys=True).encode()})
    file = io.BytesIO()
    pq.write_table(table.cast(schema), file, compression="zstd", write_page_checksum=True)
    return file.getvalue()


def write_card(folder: Path, card: StoreCard) -> None:
    """Writes ``store.json``: the store is whole.

    Raises:
        InputError: it cannot be written.
    """
    text = json.dumps({"format": FORMAT, **asdict(card)}, indent=1, ensure_ascii=False)
    try:
        write_atomic(folder / CARD, text.encode() + b"\n")
    except OSError as error:
        raise InputError(
            f"writing {folder / CARD}: got '{error.strerror or error}' from the system. See to the "
            "disk, and call `finish` again."
        ) from error


# --- Reading


def read_card(folder: Path) -> StoreCard:
    """``store.json`` of a folder.

    Raises:
        InputError: the folder holds no store, one that is not finished, or a damaged card.
    """
    path = folder / CARD
    doing = f"opening the activations in {folder}"
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        is_begun = (folder / SHARDS).is_dir()
        raise InputError(
            f"{doing}: got "
            + (f"shards without {CARD}" if is_begun else f"no {CARD} ({error.strerror})")
            + ", expected a finished store. "
            + (
                "Run what writes it again, which goes on where it stopped."
                if is_begun
                else "Give its folder; in a run of `hooked-alm activations` that is "
                "activations/prompt or activations/encoder."
            )
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{doing}: {CARD} is damaged ({error}). Copy the store again.") from None
    with any_failure(InputError, f"{doing}: {CARD} is none of this version's", "Write it again."):
        if found.pop("format") != FORMAT:
            raise ValueError(f"expected {FORMAT}")
        shards = [ShardRecord(**shard) for shard in found.pop("shards")]
        return StoreCard(contents=_contents(found.pop("contents")), shards=shards, **found)


def _contents(found: Mapping[str, Any]) -> StoreContents:
    contents = StoreContents(**found)
    if contents.dtype not in DTYPES or contents.kind not in get_args(RowKind):
        raise ValueError(f"got {contents.kind} rows in {contents.dtype}")
    return contents


def read_shard(folder: Path, number: int) -> tuple[StoreContents, ShardRecord]:
    """What a shard says of itself; its tensors are looked at, but not read.

    Raises:
        InputError: there is none, it is damaged, or its tensors are not of the size they had.
    """
    path = index_file(folder, number)
    doing = f"reading the shard {path}"
    cure = f"Delete {path.name} and write the shard again."
    with any_failure(InputError, f"{doing}: it is damaged", cure):
        data = path.read_bytes()
        about = json.loads(pq.read_schema(io.BytesIO(data)).metadata[_KEY])
        contents, record = _contents(about["contents"]), _record(about["tensors"], data)
    check_sizes(folder, number, record)
    return contents, record


def check_sizes(folder: Path, number: int, record: ShardRecord) -> None:
    """Refuse a shard of which a file is missing or has another size, without reading it.

    Raises:
        InputError: it is so.
    """
    sizes = record.tensor_bytes, record.index_bytes
    for path, found, expected in _found(folder, number, sizes, lambda path: path.stat().st_size):
        if found != expected:
            raise _damaged(path, f"{found} bytes, expected {expected}")


def check_hashes(folder: Path, number: int, record: ShardRecord) -> None:
    """Refuse a shard of which a byte is not what was written; reads all of it.

    Raises:
        InputError: it is so.
    """
    hashes = record.tensor_sha256, record.index_sha256
    for path, found, expected in _found(folder, number, hashes, _sha256):
        if found != expected:
            raise _damaged(path, "other bytes than were written")


def _found(
    folder: Path, number: int, expected: tuple[T, T], look: Callable[[Path], T]
) -> Iterator[tuple[Path, T, T]]:
    """Both files of a shard, what is found of each, and what is expected."""
    for path, one in zip((tensor_file(folder, number), index_file(folder, number)), expected,
                         strict=True):  # fmt: skip
        try:
            found = look(path)
        except OSError as error:
            raise _damaged(path, error.strerror or "no file") from None
        yield path, found, one


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"reading {path}: got a damaged shard ({what}). Delete the shard's .parquet file and run "
        "what wrote the store again, or copy it again."
    )


def mapped_tensors(folder: Path, number: int, contents: StoreContents) -> dict[str, Tensor]:
    """Tensors of a shard in memory that the file is mapped to: read when they are looked at.

    Raises:
        InputError: the file is damaged, or holds other tensors than the card says.
    """
    path = tensor_file(folder, number)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in contents.points}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, " ".join(str(error).split())[:200]) from None
    for name, shape in contents.points.items():
        if (
            found[name].shape[1:] != (width_of(shape),)
            or found[name].dtype != DTYPES[contents.dtype]
        ):
            raise _damaged(path, f"{name} is not as {CARD} says")
    return found


def read_index(folder: Path, number: int, columns: list[str] | None = None) -> Any:
    """Index of a shard, a ``pyarrow.Table`` without what the schema says of the shard.

    Args:
        folder: of the store.
        number: of the shard.
        columns: those that are read; None is all.

    Raises:
        InputError: the file is damaged.
    """
    path = index_file(folder, number)
    with any_failure(InputError, f"reading {path}: it is damaged", "Write the shard again."):
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
        return table.replace_schema_metadata(None)


def as_folder(path: FilePath) -> Path:
    """The folder at a path, with ``~`` as home."""
    return expanded(Path(path))
