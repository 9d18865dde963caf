r"""Items from a file: two or more prefixes, and the one continuation that follows them all.

One JSON object a line (JSONL, UTF-8); empty lines are skipped::

    {"id": "he-0", "group": "he-0", "continuation": "    return x + 1\n", "labels": [],
     "conditions": {
       "agentic":  {"prefix": [["instruction", "..."], ["tool_response", "def f(x): ..."]],
                    "outcome": true, "saved": {"token_ids": [1, 2, 3]}},
       "assisted": {"messages": [{"role": "user", "content": "...", "segment": "spec"}],
                    "outcome": false}}}

A condition's prefix is one of

* ``prefix``: named segments of the text that the model read, exactly: nothing is added to it;
* ``messages`` (and ``tools``): chat messages, rendered with the tokenizer's template. A message is
  a segment named by its ``segment``, or else its role; the rest of the template is ``struct``;
* ``audio`` (a file relative to this one, or a list) and ``text`` or ``segments``: a prompt of an
  audio model. ``silent`` puts silence of the same length in the clips' place.

``outcome`` says whether the run with that prefix succeeded. ``saved`` holds what the real run
recorded of its prefix, to be compared with what is rebuilt here: ``token_ids``, ``token_texts``
(decoded or vocabulary pieces), ``token_spans`` (segment -> half-open token ranges),
``prompt_offsets`` (character range of each token). ``labels`` are words of the continuation that
count as label words. Items of one ``group`` share a source and are resampled together.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from hooked_alm.errors import InputError
from hooked_alm.spans import SPAN_NAMES

from ..materials.clip_table import raise_all
from ..materials.pairs import read_lines

RESERVED = (SPAN_NAMES - {"text"}) | {"prior_output", "filler"}
_NAME = re.compile(r"[\w+=@,-][\w+=@,.-]{0,63}")  # names files, so it is not long
StrictRange = tuple[StrictInt, StrictInt]


def _name(value: Any) -> Any:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and _NAME.fullmatch(text):
        return text
    raise ValueError("up to 64 letters, digits and any of _ + = @ , . -")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Name = Annotated[StrictStr, BeforeValidator(_name)]
Text = Annotated[StrictStr, Field(min_length=1)]
Segment = tuple[Name, Text]


class Saved(BaseModel):
    """What the real run recorded of its prefix; None is not compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_ids: list[StrictInt] | None = None
    token_texts: list[StrictStr] | None = None
    token_spans: dict[str, list[StrictRange]] | None = None
    prompt_offsets: list[StrictRange] | None = None


class Condition(BaseModel):
    """One prefix of an item."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: list[Segment] | None = Field(default=None, min_length=1)
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    audio: Annotated[list[StrictStr], BeforeValidator(_as_list), Field(min_length=1)] | None = None
    silent: StrictBool = False
    text: Text | None = None
    segments: list[Segment] | None = Field(default=None, min_length=1)
    outcome: StrictBool | None = None
    saved: Saved | None = None
    paths: tuple[Path, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _paths_are_ours(cls, values: Any) -> Any:
        if isinstance(values, dict) and "paths" in values:
            raise ValueError("no field 'paths'; name files in audio")
        return values

    @model_validator(mode="after")
    def _one_form(self) -> "Condition":
        is_prompt = any(one is not None for one in (self.audio, self.text, self.segments))
        forms = [self.prefix is not None, self.messages is not None, is_prompt]
        if sum(forms) != 1:
            raise ValueError("one of: prefix; messages; or audio, text and segments")
        if self.text is not None and self.segments is not None:
            raise ValueError("text or segments, not both")
        if self.silent and self.audio is None:
            raise ValueError("audio, which silent takes its length from")
        if self.tools is not None and self.messages is None:
            raise ValueError("messages beside tools")
        for number, message in enumerate(self.messages or []):
            if not isinstance(message.get("role"), str):
                raise ValueError(f"a role in messages.{number}")
            if not isinstance(message.get("content"), str | None):
                raise ValueError(f"text in messages.{number}.content (audio goes into audio)")
        if taken := sorted({name for name in self.names() if name in RESERVED}):
            raise ValueError(f"other names than {', '.join(taken)}, which the experiment gives")
        return self

    def names(self) -> list[str]:
        """Names of its segments, in order."""
        if self.messages is not None:
            return [str(m.get("segment", m["role"])) for m in self.messages if m.get("content")]
        return [name for name, _ in self.prefix or self.segments or []]


class PrefixItem(BaseModel):
    """One continuation and its prefixes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Name
    group: Name
    continuation: Text
    labels: list[Text] = []
    conditions: dict[Name, Condition] = Field(min_length=2)
    where: str = ""

    @model_validator(mode="before")
    @classmethod
    def _one_group_each(cls, values: Any) -> Any:
        if isinstance(values, dict) and "id" in values:
            return {"group": values["id"], **values}
        return values


def read_items(file: str | Path) -> list[PrefixItem]:
    """The items of a file, in its order.

    Raises:
        InputError: all that is wrong with it, by file, line and field.
    """
    file = Path(file)
    items = read_lines("items", file, lambda number, line: _read_line(file, number, line))
    _check_together(f"reading items from {file}", items)
    return items


def _check_together(doing: str, items: Sequence[PrefixItem]) -> None:
    first: dict[str, PrefixItem] = {}
    faults = []
    names = list(items[0].conditions)
    for item in items:
        before = first.setdefault(item.id.casefold(), item)
        if before is not item:
            faults.append(f"{item.where}: id: got {item.id!r}, which {before.where} has")
        if set(item.conditions) != set(names):
            faults.append(
                f"{item.where}: conditions: got {', '.join(item.conditions)}, expected those of "
                f"{items[0].where}: {', '.join(names)}"
            )
    raise_all(doing, faults)


def _read_line(file: Path, number: int, line: str) -> PrefixItem:
    try:
        found = json.loads(line, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise InputError(f"got no usable JSON ({error}), expected one object a line") from None
    if not isinstance(found, dict):
        raise InputError(f"got a {type(found).__name__}, expected an object")
    if "where" in found:
        raise InputError("where: got an unknown field")
    try:
        item = PrefixItem.model_validate({**found, "where": f"{file.name} line {number}"})
    except ValidationError as error:
        raise InputError("; ".join(_explained(error))) from None
    conditions, faults = {}, []
    for name, one in item.conditions.items():
        paths = tuple(file.parent / clip for clip in one.audio or ())
        missing = [path for path in paths if not path.is_file()]
        faults += [f"conditions.{name}.audio: got {path}, which is no file" for path in missing]
        conditions[name] = one.model_copy(update={"paths": paths})
    if faults:
        raise InputError("; ".join(faults))
    return item.model_copy(update={"conditions": conditions})


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} twice")
        found[key] = value
    return found


def _explained(error: ValidationError) -> list[str]:
    lines = []
    for one in error.errors(include_url=False):
        field = ".".join(str(part) for part in one["loc"] if part != "[key]") or "the object"
        expected = one["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = "a list of two" if one["type"] == "tuple_type" else expected
        if one["type"] == "missing":
            lines.append(f"{field}: missing")
        elif one["type"] == "extra_forbidden":
            lines.append(f"{field}: got an unknown field")
        else:
            got = repr(one["input"])
            got = got if len(got) <= 80 else got[:77] + "..."
            lines.append(f"{field}: got {got}, expected {expected}")
    return lines


def sha256(value: bytes | str) -> str:
    """Hexadecimal."""
    return hashlib.sha256(value if isinstance(value, bytes) else value.encode()).hexdigest()
