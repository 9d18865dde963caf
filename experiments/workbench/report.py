"""What a report says, without how it looks; kept as ``report.json``."""

from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hooked_alm.errors import InputError

from .run_folder import RunFolder

MAX_ROWS = 30
"""Rows of a table that a page shows."""


@dataclass(frozen=True)
class Figure:
    """A figure of the run, by the name it was saved under."""

    name: str
    caption: str
    how_to_read: str
    controls: str = ""
    type: Literal["figure"] = "figure"


@dataclass(frozen=True)
class Table:
    """A table of the run, by name, or a few rows given here."""

    caption: str
    name: str | None = None
    rows: list[dict[str, Any]] | None = None
    max_rows: int = MAX_ROWS
    n_rows: int | None = None
    """Rows that those given here are the first of; None where they are all."""
    of: str | None = None
    """The table of the run that holds all of them."""
    type: Literal["table"] = "table"


@dataclass(frozen=True)
class Clip:
    """A recording to play (see `RunFolder.add_clip`), its own small figure, a few numbers."""

    path: str
    label: str
    figure: str | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Clips:
    """Recordings beside what the model made of them."""

    clips: list[Clip]
    caption: str = ""
    type: Literal["clips"] = "clips"


@dataclass(frozen=True)
class Note:
    """A paragraph that stands out."""

    text: str
    kind: Literal["info", "warning"] = "info"
    type: Literal["note"] = "note"


SectionItem = Annotated[Figure | Table | Clips | Note, Discriminator("type")]


@dataclass(frozen=True)
class Headline:
    """One finding: the claim, whether it is made, why not, and what was measured."""

    text: str
    established: bool
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report; a blank line in `text` begins a new paragraph."""

    title: str
    text: str = ""
    items: list[SectionItem] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The whole report."""

    title: str
    question: str
    lead: str
    is_calibration: bool
    """Whether the answer was known beforehand."""
    warnings: dict[str, dict[str, str]] = field(default_factory=dict)
    """Heading -> name -> what has to be known before the first number is read."""
    headlines: list[Headline] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def report_lines(report: Report) -> list[str]:
    """Warnings and headlines for a terminal."""
    lines = []
    for heading, reasons in report.warnings.items():
        lines += [f"{heading}:", *(f"  {name}: {text}" for name, text in reasons.items())]
    return lines + [
        f"{'' if item.established else 'not established: '}{item.text} {item.detail}".rstrip()
        for item in report.headlines
    ]


def write_report(folder: RunFolder, report: Report) -> None:
    """Writes ``report.json``."""
    folder.write_json("report.json", asdict(report))


def read_report(folder: RunFolder) -> Report:
    """Reads ``report.json`` back.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not folder.has("report.json"):
        raise InputError(
            f"reading the report of {folder.path}: got no report.json, expected a finished run. "
            f"Run the experiment to its end first."
        )
    cure = "run the experiment again; its finished units are kept"
    try:
        return TypeAdapter(Report).validate_python(folder.read_json("report.json", cure))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            f"reading {folder.path / 'report.json'}: got a damaged report "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}), expected what a run wrote. "
            f"To go on, {cure}."
        ) from None
