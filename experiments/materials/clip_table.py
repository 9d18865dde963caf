"""Tables that say which clip is which, and the habit of reporting every fault of a list at once."""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from hooked_alm.errors import InputError

from .ob1 import ClipName, Emotion, Intensity, Language

IDENTITY = ("language", "emotion", "intensity")
MEASURED = (
    "duration_s", "sample_rate", "rms_dbfs", "f0_median_hz", "f0_iqr_hz", "voiced_fraction",
    "sha256",
)  # fmt: skip
"""Columns of a manifest that are computed; of these only ``sha256`` is ever read back."""
_CHOICES = {
    "language": get_args(Language), "emotion": get_args(Emotion), "intensity": get_args(Intensity)
}  # fmt: skip

CsvLine = dict[Any, Any]  # str to str, but for what DictReader does to a line of the wrong length
Made = TypeVar("Made")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipEntry:
    """A clip as named, not yet opened."""

    where: str
    """The file, or the table and its line; leads the errors about it."""
    column: str = ""
    """``column path: `` if a table names the file, to lead the errors of opening it."""
    path: Path
    name: ClipName
    sha256: str = ""
    other: dict[str, str] = field(default_factory=dict)


def read_clip_table(table: Path, *, path_column: str, folder: Path) -> list[ClipEntry]:
    """The clips that a CSV file names.

    Args:
        table: columns ``path_column``, language, emotion, intensity, and any others.
        path_column: holds the files, relative to ``folder``.

    Raises:
        InputError: the table cannot be read, or the faults of all its lines with their columns.
    """
    needed = (path_column, *IDENTITY)
    columns, lines = read_lines(table, needed)

    def entry(line: tuple[str, CsvLine]) -> ClipEntry:
        where, cells = line
        check_cells(cells, path_column, len(columns), _CHOICES)
        cells = {column: cell.strip() for column, cell in cells.items()}
        name = ClipName(**{column: cells[column] for column in IDENTITY})
        known = {*needed, *MEASURED}
        return ClipEntry(
            where=where,
            column=f"column {path_column}: ",
            path=folder / cells[path_column],
            name=name,
            sha256=cells.get("sha256", ""),
            other={column: cell for column, cell in cells.items() if column not in known},
        )

    return collect(f"reading {table}", entry, lines, lambda line: line[0])


def read_lines(table: Path, needed: Sequence[str]) -> tuple[list[str], list[tuple[str, CsvLine]]]:
    """The columns of a CSV file, and its lines, each with where it is.

    Raises:
        InputError: the file cannot be read, lacks a needed column, or has no line.
    """
    try:
        # utf-8-sig: spreadsheets write a byte-order mark, which would join the first column's name.
        with table.open(newline="", encoding="utf-8-sig") as file:
            # strict: a quote that is never closed would swallow the lines behind it.
            reader = csv.DictReader(file, strict=True)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            lines = [(f"{table.name} line {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        cure = "Check the path, or save the sheet again as CSV UTF-8."
        if isinstance(error, csv.Error):
            cure = "Close every quote, and double those inside a quoted cell."
        raise InputError(
            f"reading {table}: got {reason}, expected a CSV file in UTF-8. {cure}"
        ) from error
    missing = [column for column in needed if column not in columns]
    if missing or len(set(columns)) < len(columns) or not lines:
        raise InputError(
            f"reading {table}: got {len(lines)} lines and columns {columns} (without {missing}), "
            f"expected each of {list(needed)} once and at least one line. Add what is missing."
        )
    return columns, lines


def check_cells(
    cells: CsvLine, path_column: str, n_columns: int, allowed: Mapping[str, Sequence[str]]
) -> None:
    """Refuse a line with too many or few cells, no file, or a cell that its column does not allow.

    Raises:
        InputError: all that is wrong with the line, by column.
    """
    # DictReader files surplus cells under None, and gives missing ones the value None.
    if None in cells or None in cells.values():
        raise InputError(f"the line has more or fewer cells than the {n_columns} columns")
    faults = [
        f"column {column}: got {cells[column]!r}, expected one of {', '.join(choices)}"
        for column, choices in allowed.items()
        if cells[column].strip() not in choices
    ]
    if not cells[path_column].strip():
        faults.append(f"column {path_column}: got nothing, expected a file name")
    if faults:
        raise InputError("; ".join(faults))


def collect(
    doing: str,
    function: Callable[[Made], Result],
    items: Iterable[Made],
    label: Callable[[Made], str],
) -> list[Result]:
    """``function`` of every item.

    Raises:
        InputError: what all the items' ``InputError`` say, each after its item's label.
    """
    results, faults = [], []
    for item in items:
        try:
            results.append(function(item))
        except InputError as error:
            faults.append(f"{label(item)}: {error}")
    raise_all(doing, faults)
    return results


def repeats(
    entries: Sequence[ClipEntry], what: str, key: Callable[[ClipEntry], object]
) -> list[str]:
    """A fault for every entry whose key an earlier one has."""
    first: dict[object, ClipEntry] = {}
    pairs = [(first.setdefault(key(entry), entry), entry) for entry in entries]
    return [f"{b.where}: the same {what} as {a.where}" for a, b in pairs if a is not b]


def raise_all(doing: str, faults: Sequence[str]) -> None:
    """Raise the faults, if any, as one ``InputError``."""
    if len(faults) == 1:
        raise InputError(f"{doing}: {faults[0]}")
    if faults:
        raise InputError(f"{doing}: {len(faults)} problems\n  " + "\n  ".join(faults))
