"""Multiple-choice questions in ARC's format, from JSONL, or from a Hugging Face cache.

One JSON object a line (UTF-8); empty lines are skipped::

    {"id": "Mercury_7220990", "question": "Which property of a mineral ...?",
     "choices": {"text": ["color", "hardness", "luster", "streak"], "label": ["A", "B", "C", "D"]},
     "answerKey": "D", "audio": "clip.wav"}

Labels and key are letters, or the numbers 1 to 5, which become A to E. Questions of other than 4 or
5 options are left out, and counted. ``audio``, which ARC does not have, is a file, relative to this
one, or a list of them. Any other field is kept as ``meta``.

Source: seed 004; M-004-5.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from hooked_alm.bundled import ASSETS, PREFIX
from hooked_alm.errors import InputError

from ..materials.records import (
    Files,
    LineRecord,
    Words,
    collect,
    parsed,
    raise_all,
    read_records,
    repeated_ids,
)
from ..materials.sources import is_local, is_url, local, shown
from ..workbench.files import is_file, is_folder

LETTERS = "ABCDE"
LETTER_OF = dict(zip((*LETTERS, *"12345"), LETTERS * 2, strict=True))
FIELDS = ("id", "question", "choices", "answerKey", "audio")
N_OPTIONS = (4, 5)
BUNDLED = "multiple_choice*.jsonl"
FILE_NAMES = ("test.jsonl", "ARC-Challenge-test.jsonl")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question and its answer."""

    id: str
    question: str
    option_labels: tuple[str, ...]
    """A, B, C, ..."""
    option_texts: tuple[str, ...]
    answer: str
    """A letter of ``option_labels``."""
    audio: tuple[Path, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    """Fields that no template knows."""
    where: str = ""
    """The file and line; leads the errors about it."""


class Choices(BaseModel):
    """The options of a line."""

    model_config = ConfigDict(frozen=True)

    label: tuple[Any, ...]
    text: tuple[Words, ...]

    @model_validator(mode="after")
    def _one_letter_each(self) -> "Choices":
        if len(self.label) != len(self.text) or not self.label:
            raise ValueError("as many labels as texts, and some")
        if len(self.label) <= len(LETTERS) and "".join(self.letters) != LETTERS[: len(self.label)]:
            raise ValueError("the labels A, B, C, ... or 1, 2, 3, ...")
        return self

    @property
    def letters(self) -> tuple[str, ...]:
        """The labels as letters; ? for what is none."""
        return tuple(LETTER_OF.get(str(label), "?") for label in self.label)


class QuestionLine(LineRecord):
    """A line of the file; fields that it does not know are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: Words
    question: Words
    choices: Choices
    answerKey: Any  # noqa: N815
    audio: Files | None = None

    @model_validator(mode="after")
    def _fits(self) -> "QuestionLine":
        # A field that is there has not been misspelled: question_id beside question is another one.
        absent = [key for key in FIELDS if key not in self.model_fields_set]
        for key in self.model_extra or {}:
            if near := difflib.get_close_matches(key.lower(), absent, n=1, cutoff=0.8):
                raise ValueError(f"no field {key} (is it {near[0]}?)")
        # Of a question with more options than letters nothing more is asked: it is left out.
        letters = self.choices.letters
        if self.answer not in letters and len(letters) <= len(LETTERS):
            raise ValueError(f"an answerKey of {', '.join(letters)}, not {self.answerKey!r}")
        return self

    @property
    def answer(self) -> str:
        """The key as a letter; ? for what is none."""
        return LETTER_OF.get(str(self.answerKey), "?")

    def asked(self) -> Question:
        """The question that the line asks."""
        return Question(
            id=self.id, question=self.question, option_labels=self.choices.letters,
            option_texts=self.choices.text, answer=self.answer, audio=self.audio or (),
            meta=dict(self.model_extra or {}), where=self.where,
        )  # fmt: skip


def find_file(data: str) -> str | Path:
    """The file that ``bundled:NAME`` or a path names, or the one that its folder holds; or a URL.

    Raises:
        InputError: none, or several.
    """
    if data.startswith(PREFIX):
        bundled = {PREFIX + path.stem: path for path in sorted(ASSETS.glob(BUNDLED))}
        if data not in bundled:
            known = ", ".join(bundled)
            raise InputError(f"looking for questions {data!r}: the package carries {known}.")
        return bundled[data]
    if not is_local(data):
        return data
    path = Path(data)
    if is_file(path):
        return path
    found = [path / name for name in FILE_NAMES if is_file(path / name)]
    # Where `datasets` keeps what it downloaded, and how the hub stores it.
    found = found or sorted(
        p for kind in ("arrow", "parquet") for p in path.rglob(f"*test*.{kind}")
    )
    if len(found) != 1:
        got = ", ".join(str(one) for one in found[:5]) if is_folder(path) else "no such path"
        raise InputError(
            f"looking for questions in {data}: got {got or 'none of them'}, expected one of "
            f"{', '.join(FILE_NAMES)}, or one *test*.arrow or *test*.parquet. Give the file itself."
        )
    return found[0]


def read_questions(source: str | Path) -> list[Question]:
    """The questions of a JSONL, arrow or parquet file, in its order.

    Raises:
        InputError: all that is wrong with it, by line and field.
    """
    doing, file = f"reading questions from {shown(source)}", local(source)
    if file.suffix in (".jsonl", ".json"):
        lines = read_records("questions", source, QuestionLine)
    else:
        parse = partial(_parsed, source if is_url(source) else file.parent, file.name)
        lines = collect(doing, lambda row: parse(*row), _rows(file), lambda row: row[0])
        raise_all(doing, repeated_ids(lines))
    found = [line.asked() for line in lines]
    if not any(len(one.option_labels) in N_OPTIONS for one in found):
        expected = " or ".join(map(str, N_OPTIONS))
        raise InputError(
            f"{doing}: none of its {len(found)} questions has {expected} options. Give others."
        )
    return found


def _parsed(folder: str | Path, table: str, where: str, row: dict[str, Any]) -> QuestionLine:
    about = {"folder": folder, "line": where, "where": f"{table} {where}"}
    return parsed(QuestionLine, row, about)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a table, behind where it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            table = pq.read_table(file)
        else:
            table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"reading questions from {file}: got a damaged file ({error}), expected JSONL, or "
            "arrow or parquet as Hugging Face stores it. Download it again."
        ) from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", row
