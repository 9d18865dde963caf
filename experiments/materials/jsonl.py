"""Records of a user's own, from JSONL: one JSON object a line (UTF-8); empty lines are skipped.

A kind of record is a pydantic model. All that is wrong with a file is said at once, by line and
field: ``reading pairs from mine.jsonl: line 3: donor.text: got '', expected text``.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
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

from .clip_table import collect, raise_all

_NAME = re.compile(r"[\w+=@,-][\w+=@,.-]{0,63}")  # names files, so it is not long
EXPECTED = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_type": "text",
}
"""Kind of pydantic's error -> what was expected, where its own words name Python's types."""


def _group(value: Any) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and text.strip():
        return text
    raise ValueError("a name")


def _name(value: Any) -> str:
    if _NAME.fullmatch(text := _group(value)):
        return text
    raise ValueError("up to 64 letters, digits and any of _ + = @ , . -")


def _words(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise ValueError("text")


def _files(value: Any, info: Any) -> tuple[Path, ...]:
    given = value if isinstance(value, list | tuple) else [value]
    if not given or not all(isinstance(one, str | Path) and str(one).strip() for one in given):
        raise ValueError("a file name or a list of them")
    paths = tuple((info.context or {}).get("folder", Path()) / one for one in given)
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ValueError(f"files that exist, and {missing[0]} is no file")
    return paths


Name = Annotated[str, BeforeValidator(_name)]
"""Names results, and their files; an integer counts as text."""
GroupName = Annotated[str, BeforeValidator(_group)]
"""Names what items share that are no independent evidence; an integer counts as text."""
Words = Annotated[str, BeforeValidator(_words)]
"""Text that is not blank."""
Files = Annotated[tuple[Path, ...], BeforeValidator(_files)]
"""A file relative to the table, or a list of them."""
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


def repeated_ids(records: Sequence[LineRecord]) -> list[str]:
    """A fault for every record whose id an earlier one has, but for upper and lower case."""
    first: dict[str, LineRecord] = {}
    pairs = [(first.setdefault(one.id.casefold(), one), one) for one in records]
    return [f"{b.where}: id: got {b.id!r}, which {a.where} has" for a, b in pairs if a is not b]


def read_records(
    what: str,
    file: Path,
    kind: type[R],
    check: Callable[[Sequence[R]], list[str]] = repeated_ids,
) -> list[R]:
    """The records of a file, in its order.

    Args:
        what: it is read for, in a word.
        file: JSONL.
        kind: of record.
        check: records that are right by themselves -> what is wrong with them together.

    Raises:
        InputError: no such file, nothing in it, or all that is wrong with its lines.
    """
    doing = f"reading {what} from {file}"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"{doing}: got {error.strerror}, expected a JSONL file. Check the path."
        ) from error
    try:
        # Not splitlines, which also cuts at characters that JSON allows inside a string.
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        at = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{doing}: line {at}: got text that is not UTF-8 (byte {data[error.start]:#x}), "
            "expected JSON in UTF-8. Save the file as UTF-8."
        ) from error
    numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(f"{doing}: got an empty file, expected one JSON object a line.")

    def read(line: tuple[int, str]) -> R:
        about = {"folder": file.parent, "line": f"line{line[0]:04d}"}
        return parsed(kind, line[1], {**about, "where": f"{file.name} line {line[0]}"})

    found = collect(doing, read, numbered, lambda line: f"line {line[0]}")
    raise_all(doing, check(found))
    return found


def parsed(kind: type[R], line: str | dict[str, Any], context: dict[str, Any]) -> R:
    """A record from a line of JSON, or from an object that was read already.

    Raises:
        InputError: all that is wrong with it, by field.
    """
    try:
        found = json.loads(line, object_pairs_hook=_once) if isinstance(line, str) else line
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


def explained(error: ValidationError) -> list[str]:
    """Each fault by its dotted field: what came, and what was expected."""
    lines = []
    for one in error.errors(include_url=False):
        field = ".".join(str(part) for part in one["loc"] if part != "[key]")
        expected = one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = EXPECTED.get(one["type"], expected)
        shown = "null" if one["input"] is None else repr(one["input"])
        got = shown if len(shown) <= 80 else shown[:77] + "..."
        lines.append(
            f"{field}: missing" if one["type"] == "missing"
            else f"{field}: got an unknown field" if one["type"] == "extra_forbidden"
            else f"{field or 'the line'}: got {got}, expected {expected}"
        )  # fmt: skip
    return lines
