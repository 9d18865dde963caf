r"""Items from a file: two or more prefixes, and the one continuation that follows them all.

One JSON object a line (see ``materials.records``)::

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

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from hooked_alm.spans import SPAN_NAMES

from ..materials.records import Files, LineRecord, Name, Text, read_records, repeated_ids

RESERVED = (SPAN_NAMES - {"text"}) | {"prior_output", "filler"}
PrefixSegments = Annotated[list[tuple[Name, Text]], Field(min_length=1)]
StrictRange = tuple[StrictInt, StrictInt]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Saved(_Strict):
    """What the real run recorded of its prefix; None is not compared."""

    token_ids: list[StrictInt] | None = None
    token_texts: list[StrictStr] | None = None
    token_spans: dict[str, list[StrictRange]] | None = None
    prompt_offsets: list[StrictRange] | None = None


class Condition(_Strict):
    """One prefix of an item."""

    prefix: PrefixSegments | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    audio: Files = ()
    silent: StrictBool = False
    text: Text | None = None
    segments: PrefixSegments | None = None
    outcome: StrictBool | None = None
    saved: Saved | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "Condition":
        is_prompt = bool(self.audio) or self.asked is not None
        if sum([self.prefix is not None, self.messages is not None, is_prompt]) != 1:
            raise ValueError("one of: prefix; messages; or audio, text and segments")
        if self.text is not None and self.segments is not None:
            raise ValueError("text or segments, not both")
        if self.silent and not self.audio:
            raise ValueError("audio, which silent takes its length from")
        if self.tools is not None and self.messages is None:
            raise ValueError("messages beside tools")
        for number, message in enumerate(self.messages or []):
            if not isinstance(message.get("role"), str):
                raise ValueError(f"a role in messages.{number}")
            if not isinstance(message.get("content"), str | None):
                raise ValueError(f"text in messages.{number}.content (audio goes into audio)")
        if taken := sorted(RESERVED.intersection(self.names())):
            raise ValueError(f"other names than {', '.join(taken)}, which the experiment gives")
        return self

    @property
    def asked(self) -> list[tuple[str, str]] | None:
        """Named parts of an audio model's instruction."""
        return [("text", self.text)] if self.text is not None else self.segments

    def names(self) -> list[str]:
        """Names of its segments, in order."""
        if self.messages is not None:
            return [str(m.get("segment", m["role"])) for m in self.messages if m.get("content")]
        return [name for name, _ in self.prefix or self.segments or []]


class PrefixItem(LineRecord):
    """One continuation and its prefixes."""

    group: Name
    continuation: Text
    labels: tuple[Text, ...] = ()
    conditions: dict[Name, Condition] = Field(min_length=2)


def read_items(file: str | Path) -> list[PrefixItem]:
    """The items of a file, in its order.

    Raises:
        InputError: all that is wrong with it, by file, line and field.
    """
    return read_records("items", file, PrefixItem, _together)


def _together(items: Sequence[PrefixItem]) -> list[str]:
    first = items[0]
    return repeated_ids(items) + [
        f"{item.where}: conditions: got {', '.join(item.conditions)}, expected those of "
        f"{first.where}: {', '.join(first.conditions)}"
        for item in items
        if {*item.conditions} != {*first.conditions}
    ]
