"""Multiple-choice questions in ARC's format, from JSONL, or from a Hugging Face cache.

One JSON object a line (UTF-8); empty lines are skipped::

    {"id": "Mercury_7220990", "question": "Which property of a mineral ...?",
     "choices": {"text": ["color", "hardness", "luster", "streak"], "label": ["A", "B", "C", "D"]},
     "answerKey": "D", "audio": "clip.wav"}

Labels and key are letters, or the numbers 1 to 5, which become A to E. Questions of other than 4 or
5 options are left out, and counted. ``audio``, which ARC does not have, is a file, relative to this
one, or a list of them. Any other field is kept as ``meta``.

Source: seed document 004; methods card M-004-5.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hooked_alm.errors import InputError

from ..materials.bundled import ASSETS, PREFIX
from ..materials.clip_table import collect, raise_all

LETTERS = "ABCDE"
NEEDED = ("id", "question", "choices", "answerKey")
FIELDS = (*NEEDED, "audio")
N_OPTIONS = (4, 5)
BUNDLED = "multiple_choice*.jsonl"
FILE_NAMES = ("test.jsonl", "ARC-Challenge-test.jsonl")
SourceLine = tuple[str, str | dict[str, Any]]
"""Where it is, and a line of JSON or a row that was read already."""


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
    """Its file and line; leads the errors about it."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What a file holds."""

    file: Path
    read: list[Question]
    skipped: list[dict[str, Any]]
    """Questions that were left out: ``id``, ``where``, ``reason``."""


def read_questions(data: str) -> Questions:
    """The questions of a file, in its order.

    Args:
        data: ``bundled:NAME``; a JSONL, arrow or parquet file; or a folder with one of them.

    Raises:
        InputError: no such file, or all that is wrong with it, by line and field.
    """
    file = find_file(data)
    doing = f"reading questions from {file}"
    lines = list(_jsonl(file) if file.suffix in (".jsonl", ".json") else _rows(file))
    if not lines:
        raise InputError(f"{doing}: got an empty file, expected a question a line.")
    found = collect(doing, lambda line: _question(file, line), lines, lambda line: line[0])
    first: dict[str, Question] = {}
    doubles = [(first.setdefault(one.id, one), one) for one in found]
    raise_all(
        doing,
        [f"{b.where}: id: got {b.id!r}, which {a.where} has" for a, b in doubles if a is not b],
    )
    skipped = [
        {"id": one.id, "where": one.where, "reason": f"{len(one.option_labels)} options"}
        for one in found
        if len(one.option_labels) not in N_OPTIONS
    ]
    read = [one for one in found if len(one.option_labels) in N_OPTIONS]
    if not read:
        raise InputError(
            f"{doing}: none of its {len(found)} questions has {N_OPTIONS[0]} or {N_OPTIONS[1]} "
            "options. Give others."
        )
    return Questions(file=file, read=read, skipped=skipped)


def find_file(data: str) -> Path:
    """The file that ``data`` names, or that its folder holds.

    Raises:
        InputError: none, or several.
    """
    if data.startswith(PREFIX):
        bundled = {PREFIX + path.stem: path for path in sorted(ASSETS.glob(BUNDLED))}
        if data not in bundled:
            known = ", ".join(bundled)
            raise InputError(f"looking for questions {data!r}: the package carries {known}.")
        return bundled[data]
    path = Path(data)
    if path.is_file():
        return path
    found = [path / name for name in FILE_NAMES if (path / name).is_file()]
    # Where `datasets` keeps what it downloaded, and how the hub stores it.
    found = found or sorted(
        p for kind in ("arrow", "parquet") for p in path.rglob(f"*test*.{kind}")
    )
    if len(found) != 1:
        got = ", ".join(str(one) for one in found[:5]) if path.is_dir() else "no such path"
        raise InputError(
            f"looking for questions in {data}: got {got or 'none of them'}, expected one of "
            f"{', '.join(FILE_NAMES)}, or one *test*.arrow or *test*.parquet. Give the file itself."
        )
    return found[0]


def _jsonl(file: Path) -> Iterator[SourceLine]:
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "text that is not UTF-8"
        raise InputError(
            f"reading questions from {file}: got {reason}, expected a JSONL file. Check the path."
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{file.name} line {number}", line


def _rows(file: Path) -> Iterator[SourceLine]:
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
        yield f"{file.name} row {number}", row


def _question(file: Path, line: SourceLine) -> Question:
    where, found = line
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise InputError(f"got no JSON ({error}), expected one object a line") from None
    if not isinstance(found, dict):
        raise InputError(f"got {_kind(found)}, expected an object with {', '.join(NEEDED)}")
    faults = [f"{key}: missing" for key in NEEDED if key not in found]
    meta = {key: value for key, value in found.items() if key not in FIELDS}
    # A field that is there has not been misspelled: question_id beside question is another one.
    absent = [key for key in FIELDS if key not in found]
    for key in meta:
        if near := difflib.get_close_matches(key.lower(), absent, n=1, cutoff=0.8):
            faults.append(f"{key}: got an unknown field; is it {near[0]}?")
    labels, texts = _choices(found.get("choices"), faults) if "choices" in found else ((), ())
    answer = _letter(found.get("answerKey"))
    # Of a question with more options than letters nothing more is asked: it is left out.
    is_asked = "answerKey" in found and 0 < len(labels) <= len(LETTERS)
    if is_asked and answer not in labels:
        faults.append(f"answerKey: got {found['answerKey']!r}, expected one of {', '.join(labels)}")
    question = Question(
        id=_words("id", found.get("id"), faults) if "id" in found else "",
        question=_words("question", found.get("question"), faults) if "question" in found else "",
        option_labels=labels,
        option_texts=texts,
        answer=answer or "",
        audio=_audio(file, found.get("audio"), faults),
        meta=meta,
        where=where,
    )
    if faults:
        raise InputError("; ".join(faults))
    return question


def _choices(found: Any, faults: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    parts = found if isinstance(found, dict) else {}
    labels, texts = parts.get("label"), parts.get("text")
    if not isinstance(labels, list) or not isinstance(texts, list):
        faults.append(f"choices: got {found!r}, expected an object with lists label and text")
        return (), ()
    if len(labels) != len(texts) or not labels:
        faults.append(
            f"choices: got {len(labels)} labels and {len(texts)} texts, expected as many, and some"
        )
        return (), ()
    for number, text in enumerate(texts):
        _words(f"choices.text[{number}]", text, faults)
    letters = tuple(_letter(label) for label in labels)
    if letters[: len(LETTERS)] != tuple(LETTERS[: len(labels)]) and len(labels) <= len(LETTERS):
        faults.append(f"choices.label: got {labels!r}, expected A, B, C, ... or 1, 2, 3, ...")
        return (), ()
    return tuple(letter or "?" for letter in letters), tuple(str(text) for text in texts)


def _letter(label: Any) -> str | None:
    """A to E as they are, 1 to 5 as the letter they count; else None."""
    text = str(label) if isinstance(label, str | int) and not isinstance(label, bool) else ""
    if len(text) == 1 and text in LETTERS:
        return text
    return LETTERS[int(text) - 1] if text in ("1", "2", "3", "4", "5") else None


def _audio(file: Path, found: Any, faults: list[str]) -> tuple[Path, ...]:
    if found is None:
        return ()
    given = found if isinstance(found, list) else [found]
    if not given or not all(isinstance(one, str) and one.strip() for one in given):
        faults.append(f"audio: got {found!r}, expected a file name or a list of them")
        return ()
    paths = tuple(file.parent / one for one in given)
    faults += [f"audio: got {path}, which is no file" for path in paths if not path.is_file()]
    return paths


def _words(key: str, found: Any, faults: list[str]) -> str:
    if isinstance(found, str) and found.strip():
        return found
    faults.append(f"{key}: got {found!r}, expected text")
    return ""


def _kind(found: Any) -> str:
    return "null" if found is None else f"a {type(found).__name__}"
