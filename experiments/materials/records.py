"""Records of a user's own: JSONL, one JSON object a line, or a CSV sheet; both in UTF-8.

A kind of record is a pydantic model; the cells of a sheet are its fields, and empty ones are left
out. All that is wrong with a file is said at once, by line and field: ``reading pairs from
mine.jsonl: line 3: donor.text: got '', expected text``. Names and labels are compared as Unicode
composes them (NFC), since systems write the same letter in different ways.
"""

import csv
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictStr,
    ValidationError,
    model_validator,
)

from hooked_alm.errors import InputError
from hooked_alm.storage import expanded

from ..workbench.files import is_file
from ..workbench.inert import for_terminal, from_sheet
from .sources import beside, fetch, fetched, is_url, local, shown

_NAME = re.compile(r"[\w+=@,-][\w+=@,.-]*")
LONGEST_NAME = 100
"""Bytes. Two names and a few words are the name of a file, of which most systems take 255."""
SHEETS = {".csv", ".tsv"}
EXPECTED = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_type": "text",
}
"""Kind of pydantic's error -> what was expected, where its own words name Python's types."""


# --- Fields


def composed(text: str) -> str:
    """The text with letters and their accents joined (NFC)."""
    return unicodedata.normalize("NFC", text)


def _group(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and text.strip():
        if for_terminal(name := composed(text.strip())) != name or "\n" in name:
            raise ValueError("a name without line breaks or other characters that are not shown")
        return name
    raise ValueError("a name")


def as_label(text: str) -> str:
    """A label, which files of a run are named by.

    Raises:
        ValueError: what was expected of it.
    """
    if len((label := _group(text)).encode()) > LONGEST_NAME:
        raise ValueError(f"up to {LONGEST_NAME} bytes: results are named by it")
    return label


def _name(value: Any) -> str:
    if _NAME.fullmatch(text := _group(value)) and len(text.encode()) <= LONGEST_NAME:
        return text
    raise ValueError(f"up to {LONGEST_NAME} bytes of letters, digits and any of _ + = @ , . -")


def _words(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise ValueError("text")


def _file(value: Any, info: Any) -> Path:
    """A file beside the table, or a URL's; found too where its letters are spelt otherwise."""
    if not (isinstance(value, str | Path) and str(value).strip() and "\0" not in str(value)):
        raise ValueError("a file name")
    context = info.context or {}
    path = beside(context.get("folder", Path()), value)
    if isinstance(path, str):
        return context.get("fetched", fetched)(path)
    forms = (path, *(Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")))
    return next((one for one in forms if is_file(one)), path)


def _files(value: Any, info: Any) -> tuple[Path, ...]:
    given = value if isinstance(value, list | tuple) else [value]
    if not given or not all(isinstance(one, str | Path) and str(one).strip() for one in given):
        raise ValueError("a file name or a list of them")
    paths = tuple(_file(one, info) for one in given)
    if missing := [str(path) for path in paths if not is_file(path)]:
        raise ValueError(f"files that exist, and {missing[0]} is no file")
    return paths


Name = Annotated[str, BeforeValidator(_name)]
"""Names results, and their files; an integer counts as text."""
GroupName = Annotated[str, BeforeValidator(_group)]
"""Names what items share, such as a speaker or a label; an integer counts as text."""
Words = Annotated[str, BeforeValidator(_words)]
"""Text that is not blank."""
File = Annotated[Path, BeforeValidator(_file)]
"""A file relative to the table, or a URL; opening it shows whether it is there."""
Files = Annotated[tuple[Path, ...], BeforeValidator(_files)]
"""A file relative to the table, or a URL; or a list of them."""
Text = Annotated[StrictStr, Field(min_length=1)]
"""Text that may be blank, but not empty."""
Parts = Annotated[tuple[tuple[Words, Text], ...], Field(min_length=1)]
"""Named parts of an instruction: ``[["text", "Say "], ["word", "sad"]]``."""


class LineRecord(BaseModel):
    """What every record has.

    Without an ``id`` its line stands for one; without a ``group`` it stands alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Name
    group: GroupName
    where: str = ""
    """The file and line; leads the errors about it."""

    @model_validator(mode="before")
    @classmethod
    def _by_its_line(cls, values: Any, info: Any) -> Any:
        if isinstance(values, dict) and info.context:
            line = info.context["line"]
            own = {"id": line, "group": values.get("id", line), **values}
            return {**own, "where": info.context["where"]}
        return values


R = TypeVar("R", bound=LineRecord)
Made = TypeVar("Made")
Result = TypeVar("Result")


# --- Files


def repeated_ids(records: Sequence[LineRecord]) -> list[str]:
    """A fault for every record whose id an earlier one has, but for upper and lower case."""
    first: dict[str, LineRecord] = {}
    pairs = [(first.setdefault(one.id.casefold(), one), one) for one in records]
    return [f"{b.where}: id: got {b.id!r}, which {a.where} has" for a, b in pairs if a is not b]


def read_records(
    what: str,
    file: str | Path,
    kind: type[R],
    check: Callable[[Sequence[R]], list[str]] = repeated_ids,
    *,
    folder: Path | None = None,
) -> list[R]:
    """The records of a file, in its order; see `read_made`."""
    return read_made(what, file, kind, lambda record: record, check, folder=folder)


def read_made(
    what: str,
    file: str | Path,
    kind: type[R],
    make: Callable[[R], Made],
    check: Callable[[Sequence[Made]], list[str]],
    *,
    folder: Path | None = None,
) -> list[Made]:
    """What is made of the records of a file, in its order.

    Args:
        what: it is read for, in a word.
        file: a CSV sheet by its suffix, else JSONL; or what `sources` makes one of.
        kind: of record.
        make: record -> what is wanted of it; refuses a record, or a file that it names.
        check: all that was made -> what is wrong with it together.
        folder: that files are relative to; None is the table's own, or that of its URL.

    Raises:
        InputError: no such file, nothing in it, or all that is wrong with its lines.
    """
    table = local(file)
    named = expanded(file) if isinstance(file, Path) else shown(file)
    doing, is_sheet = f"reading {what} from {named}", table.suffix.lower() in SHEETS
    text = _text(doing, table, "a CSV sheet" if is_sheet else "a JSONL file")
    columns, lines = _sheet(doing, text, kind) if is_sheet else ([], _json_lines(doing, text))
    around = folder or (file if is_url(file) else table.parent)

    def record(numbered: tuple[int, Any], fetched: Callable[[str], Path]) -> R:
        number, line = numbered
        about = {"folder": around, "fetched": fetched, "line": f"line{number:04d}"}
        context = {**about, "where": f"{table.name} line {number}"}
        return parsed(kind, _cells(columns, line) if is_sheet else line, context)

    ready = _fetched_together(record, lines) if is_url(file) or "//" in text else {}
    from_urls = partial(fetched, ready=ready)
    found = collect(
        doing, lambda line: make(record(line, from_urls)), lines, lambda line: f"line {line[0]}"
    )
    raise_all(doing, check(found))
    return found


def _fetched_together(
    record: Callable[[Made, Callable[[str], Path]], Any], lines: Iterable[Made]
) -> Mapping[str, Path | str]:
    """The files of all URLs that lines name, fetched some at a time; see `fetch`."""
    urls: dict[str, Path] = {}
    for line in lines:
        with suppress(InputError):  # said later, with all that is wrong
            record(line, lambda url: urls.setdefault(url, Path()))
    return fetch(urls)


def _text(doing: str, file: Path, expected: str) -> str:
    try:
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{doing}: got {reason}, expected {expected}. Check the path.") from error
    try:
        return data.decode("utf-8-sig")  # spreadsheets begin it with a byte-order mark
    except UnicodeDecodeError as error:
        at = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{doing}: line {at}: got text that is not UTF-8 (byte {data[error.start]:#x}), "
            f"expected {expected} in UTF-8. Save the file as UTF-8."
        ) from error


def _json_lines(doing: str, text: str) -> list[tuple[int, Any]]:
    # Not splitlines, which also cuts at characters that JSON allows inside a string.
    numbered = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not numbered:
        raise InputError(f"{doing}: got an empty file, expected one JSON object a line.")
    return list(numbered)


def _sheet(
    doing: str, text: str, kind: type[LineRecord]
) -> tuple[list[str], list[tuple[int, Any]]]:
    """The columns of a CSV sheet and its rows, which have to be commas apart."""
    # strict: a quote that is never closed would swallow the lines behind it.
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(
            f"{doing}: line {reader.line_num}: got {error}, expected CSV. Close every quote, and "
            "double those inside a quoted cell."
        ) from error
    columns = [from_sheet(composed(cell.strip())) for cell in rows[0][1]] if rows else []
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(columns) == 1 and mark in columns[0]:
            raise InputError(
                f"{doing}: got columns separated by {name}, expected commas. Save the sheet again "
                "with a comma as its delimiter (field separator)."
            )
    ours = {*LineRecord.model_fields}
    needed = [name for name, f in kind.model_fields.items() if f.is_required() and name not in ours]
    missing = [name for name in needed if name not in columns]
    if missing or len(set(columns)) < len(columns) or len(rows) < 2:
        raise InputError(
            f"{doing}: got {max(len(rows) - 1, 0)} lines and columns {columns} (without {missing}),"
            f" expected each of {needed} once and at least one line. Add what is missing."
        )
    return columns, rows[1:]


def _cells(columns: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    if len(row) != len(columns):
        raise InputError(
            f"got {len(row)} cells, expected one for each of the {len(columns)} columns. Quote a "
            "cell that holds commas"
        )
    stripped = zip(columns, map(str.strip, row), strict=True)
    return {column: from_sheet(cell) for column, cell in stripped if cell}


def parsed(kind: type[R], line: str | dict[str, Any], context: dict[str, Any]) -> R:
    """A record from a line of JSON, or from an object that was read already.

    Raises:
        InputError: all that is wrong with it, by field.
    """
    try:
        found = json.loads(line, object_pairs_hook=_once) if isinstance(line, str) else line
        _check_characters(found)
    except (ValueError, RecursionError) as error:
        raise InputError(f"got no usable JSON ({error}), expected one object a line") from None
    if isinstance(found, dict) and "where" in found:  # ours, not the file's
        raise InputError("where: got an unknown field")
    try:
        return kind.model_validate(found, context=context)
    except ValidationError as error:
        raise InputError("; ".join(explained(error))) from None


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} twice")
        found[key] = value
    return found


def _check_characters(value: Any) -> None:
    """Refuse half a character (an escaped surrogate): it is no text for a tokenizer or a file."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"\\u{ord(half[0]):x} is half of a character: write the character itself")


# --- Faults


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


def raise_all(doing: str, faults: Sequence[str]) -> None:
    """Raise the faults, if any, as one ``InputError``."""
    if len(faults) == 1:
        raise InputError(f"{doing}: {faults[0]}")
    if faults:
        raise InputError(f"{doing}: {len(faults)} problems\n  " + "\n  ".join(faults))


def explained(error: ValidationError) -> list[str]:
    """Each fault by its dotted field: what came, and what was expected."""
    lines = []
    for one in error.errors(include_url=False):
        field = ".".join(str(part) for part in one["loc"] if part != "[key]")
        expected = one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = EXPECTED.get(one["type"], expected)
        text = "null" if one["input"] is None else shown(repr(one["input"]))
        got = text if len(text) <= 80 else text[:77] + "..."
        lines.append(
            f"{field}: missing" if one["type"] == "missing"
            else f"{field}: got an unknown field" if one["type"] == "extra_forbidden"
            else f"{field or 'the line'}: got {got}, expected {expected}"
        )  # fmt: skip
    return lines
