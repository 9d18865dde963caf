"""Minimal pairs from a file: prompts that differ in one thing, and the answer each calls for.

One JSON object a line (JSONL, UTF-8); empty lines are skipped::

    {"base":  {"audio": "sad.wav", "text": "Which emotion is it?"},
     "donor": {"audio": "angry.wav", "segments": [["text", "Which emotion"], ["ask", " is it?"]]},
     "answers": {"base": "sad", "donor": "angry"},
     "group": "speaker 3", "contrast": "voice", "id": "s3-01"}

``audio`` is a file, relative to the pairs file, or a list of files for one prompt; without it the
prompt is text alone. The instruction is ``text``, or ``segments`` of it with names, which become
spans. ``answers`` begin the model's answer as they stand: give " sad" if it begins with a space.
Pairs of one ``group`` share a source (a clip, a speaker) and are no independent evidence; without
it every pair stands alone. ``contrast`` names what differs, and pairs of one contrast are summed up
together. ``id`` names the pair in results; without it, its line does.

Any sweep takes what ``prepare_pairs`` makes: a base, a donor, and a token for either answer.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip

from .clip_table import collect, raise_all

SIDES = ("base", "donor")
KEYS = ("base", "donor", "answers", "group", "contrast", "id")
SIDE_KEYS = ("audio", "text", "segments")
One = TypeVar("One")
_ID = re.compile(r"[\w+=@,-][\w+=@,.-]*")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One prompt of a pair."""

    audio: tuple[Path, ...]
    segments: tuple[tuple[str, str], ...]
    """Named parts of the instruction; its plain parts are called text. Empty without one."""


def described_side(side: Side) -> dict[str, Any]:
    """What identifies a prompt, as JSON."""
    return {
        "audio": [[path.name, _sha256(path)] for path in side.audio],
        "segments": [list(part) for part in side.segments],
    }


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two prompts and their answers."""

    id: str
    base: Side
    donor: Side
    answers: tuple[str, str]
    """Of base and donor."""
    group: str
    contrast: str = "pair"
    where: str = ""
    """Its file and line; leads the errors about it."""

    def described(self) -> dict[str, Any]:
        """What identifies it, as JSON: names and hashes of clips, words, answers."""
        return {
            "id": self.id,
            "group": self.group,
            "contrast": self.contrast,
            "answers": list(self.answers),
            **{name: described_side(getattr(self, name)) for name in SIDES},
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPair:
    """A pair as a model reads it; each prompt is a batch of one row."""

    pair: Pair
    base: ALMInput
    donor: ALMInput
    answers: tuple[int, int]
    """First tokens of the answers of base and donor."""


def read_pairs(file: str | Path) -> list[Pair]:
    """The pairs of a file, in its order.

    Raises:
        InputError: all that is wrong with it, by file, line and field.
    """
    file = Path(file)
    pairs = read_lines("pairs", file, lambda number, line: _read_line(file, number, line))
    first: dict[str, Pair] = {}
    doubles = [(first.setdefault(pair.id.casefold(), pair), pair) for pair in pairs]
    raise_all(
        f"reading pairs from {file}",
        [f"{b.where}: id: got {b.id!r}, which {a.where} has" for a, b in doubles if a is not b],
    )
    return pairs


def read_lines(what: str, file: Path, read: Callable[[int, str], One]) -> list[One]:
    """``read`` of the number and text of every line of a JSONL file that is not empty.

    Raises:
        InputError: no such file, nothing in it, or what ``read`` raises, each after its line.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"reading {what} from {file}: got {error.strerror}, expected a JSONL file. Check the "
            "path."
        ) from error
    try:
        # Not splitlines, which also cuts at characters that JSON allows inside a string.
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        at = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"reading {what} from {file}: line {at}: got text that is not UTF-8 (byte "
            f"{data[error.start]:#x}), expected JSON in UTF-8. Save the file as UTF-8."
        ) from error
    numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(
            f"reading {what} from {file}: got an empty file, expected one JSON object a line."
        )
    return collect(
        f"reading {what} from {file}",
        lambda line: read(*line),
        numbered,
        lambda line: f"line {line[0]}",
    )


def prepare_pairs(
    model: HookedALM, pairs: Sequence[Pair], *, truncate: bool = False
) -> list[PreparedPair]:
    """Both prompts and both answers of every pair; a clip is read, and later encoded, once.

    Raises:
        InputError: what a pair's fields make impossible on this model, by line and field.
    """
    if model.prompts is None:
        raise InputError(
            f"preparing pairs for {model.cfg.model_name!r}: it has no audio front-end, or its "
            "folder no processor files. Give an audio model with both."
        )
    clips: dict[Path, AudioClip] = {}

    def prepared(pair: Pair) -> PreparedPair:
        sides = [prepare_side(model, getattr(pair, n), n, clips, truncate) for n in SIDES]
        tokens = [_first_token(model, pair, i) for i in range(2)]
        if tokens[0] == tokens[1]:
            raise InputError(
                f"answers: got {pair.answers[0]!r} and {pair.answers[1]!r}, which begin with the "
                f"same token {tokens[0]}, expected answers that differ in their first token"
            )
        return PreparedPair(
            pair=pair, base=sides[0], donor=sides[1], answers=(tokens[0], tokens[1])
        )

    return collect("preparing pairs", prepared, pairs, lambda pair: pair.where or pair.id)


def prepare_side(
    model: HookedALM, side: Side, name: str, clips: dict[Path, AudioClip], truncate: bool
) -> ALMInput:
    """One prompt as the model reads it; clips are taken from ``clips``, or read into it.

    Raises:
        InputError: what its fields make impossible on this model, after ``name``.
    """
    try:
        for path in side.audio:
            if path not in clips:
                clips[path] = model.read_clip(path, truncate=truncate)
    except InputError as error:
        raise InputError(f"{name}.audio: {error}") from error
    audio = [[clips[path] for path in side.audio]] if side.audio else None
    try:
        return model.prepare(audio, segments=list(side.segments) or None)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _first_token(model: HookedALM, pair: Pair, index: int) -> int:
    ids = model.tokenizer(pair.answers[index], add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"answers.{SIDES[index]}: got {pair.answers[index]!r}, which has no token")
    return int(ids[0])


# --- One line


class _RepeatedKeyError(ValueError):
    """A key that an object has twice."""


def read_object(line: str, known: Sequence[str], needed: Sequence[str]) -> tuple[Any, list[str]]:
    """The JSON object of a line, and the faults of its keys.

    Raises:
        InputError: it is no object, or has a key twice.
    """
    try:
        found = json.loads(line, object_pairs_hook=_without_repeats)
    except _RepeatedKeyError as error:
        raise InputError(f"{error}: got it twice, expected it once") from None
    except ValueError as error:
        raise InputError(f"got no JSON ({error}), expected one object a line") from None
    if not isinstance(found, dict):
        raise InputError(f"got {_kind(found)}, expected an object with {', '.join(needed)}")
    return found, wrong_keys(found, known, needed=needed, prefix="")


def _read_line(file: Path, number: int, line: str) -> Pair:
    found, faults = read_object(line, KEYS, KEYS[:3])
    sides = {
        name: read_side(file, name, found.get(name), faults) for name in SIDES if name in found
    }
    answers = _answers(found["answers"], faults) if "answers" in found else ("", "")
    default = f"line{number:04d}"
    group = read_name("group", found.get("group", default), faults)
    contrast = read_name("contrast", found.get("contrast", "pair"), faults)
    pair_id = read_name("id", found.get("id", default), faults)
    if not faults and sides["base"] == sides["donor"]:
        faults.append("donor: got the same prompt as base, expected one that differs")
    if faults:
        raise InputError("; ".join(faults))
    return Pair(
        id=pair_id,
        base=sides["base"],
        donor=sides["donor"],
        answers=answers,
        group=group,
        contrast=contrast,
        where=f"{file.name} line {number}",
    )


def _without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


def wrong_keys(
    found: dict[str, Any], known: Sequence[str], *, needed: Sequence[str], prefix: str
) -> list[str]:
    """A fault for every key that is missing or unknown."""
    faults = [f"{prefix}{key}: missing" for key in needed if key not in found]
    return faults + [
        f"{prefix}{key}: got an unknown field, expected {', '.join(known)}"
        for key in found
        if key not in known
    ]


def read_side(file: Path, name: str, found: Any, faults: list[str]) -> Side:
    """A prompt from its JSON object; what is wrong with it is added to ``faults``."""
    side = Side(audio=(), segments=())
    if not isinstance(found, dict):
        faults.append(f"{name}: got {_kind(found)}, expected an object with audio and text")
        return side
    faults += wrong_keys(found, SIDE_KEYS, needed=(), prefix=f"{name}.")
    if {"text", "segments"} <= found.keys():
        faults.append(f"{name}: got text and segments, expected one of them")
    elif not found.keys() & set(SIDE_KEYS):
        faults.append(f"{name}: got no audio and no text, expected one of them or both")
    audio = _audio(file, name, found["audio"], faults) if "audio" in found else ()
    segments: tuple[tuple[str, str], ...] = ()
    if "text" in found:
        segments = (("text", _words(f"{name}.text", found["text"], faults)),)
    elif "segments" in found:
        segments = _segments(name, found["segments"], faults)
    return Side(audio=audio, segments=segments)


def _audio(file: Path, name: str, found: Any, faults: list[str]) -> tuple[Path, ...]:
    given = found if isinstance(found, list) else [found]
    field = f"{name}.audio"
    if not given or not all(isinstance(one, str) and one.strip() for one in given):
        faults.append(f"{field}: got {found!r}, expected a file name or a list of them")
        return ()
    paths = tuple(file.parent / one for one in given)
    faults += [f"{field}: got {path}, which is no file" for path in paths if not path.is_file()]
    return paths


def _segments(name: str, found: Any, faults: list[str]) -> tuple[tuple[str, str], ...]:
    is_list = isinstance(found, list) and all(
        isinstance(part, list) and len(part) == 2 and all(isinstance(x, str) for x in part)
        for part in found
    )
    if not is_list or not found or not all(part[0] and part[1] for part in found):
        faults.append(
            f'{name}.segments: got {found!r}, expected a list of [name, text], as in [["text", '
            '"Say "], ["word", "sad"]]'
        )
        return ()
    return tuple((part[0], part[1]) for part in found)


def _answers(found: Any, faults: list[str]) -> tuple[str, str]:
    if not isinstance(found, dict):
        faults.append(f"answers: got {_kind(found)}, expected an object with base and donor")
        return ("", "")
    faults += wrong_keys(found, SIDES, needed=SIDES, prefix="answers.")
    base, donor = (
        _words(f"answers.{side}", found[side], faults) if side in found else "" for side in SIDES
    )
    if base and base == donor:
        faults.append(f"answers.donor: got {donor!r}, the base's too, expected another")
    return base, donor


def _words(field: str, found: Any, faults: list[str]) -> str:
    if isinstance(found, str) and found.strip():
        return found
    faults.append(f"{field}: got {found!r}, expected text")
    return ""


def read_name(field: str, found: Any, faults: list[str]) -> str:
    """A name from JSON, numbers as text; what is wrong with it is added to ``faults``."""
    text = str(found) if isinstance(found, int) and not isinstance(found, bool) else found
    if not isinstance(text, str) or not text.strip():
        faults.append(f"{field}: got {found!r}, expected a name")
        return ""
    if field in ("id", "contrast") and not _ID.fullmatch(text):
        faults.append(f"{field}: got {text!r}, expected letters, digits and any of _ + = @ , . -")
    return text


def _kind(found: Any) -> str:
    return "null" if found is None else f"a {type(found).__name__}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
