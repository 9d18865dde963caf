"""Clips that a table names, each opened once; every fault at once, by line and column.

A table is a CSV sheet or JSONL (see `records`) with a column ``path``, relative to it. ``sha256``
is checked; the other computed columns (`MEASURED`) are never read back; all others are kept as what
is known of the clip. Clips are called after their files, in results too.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from pydantic import ConfigDict

from hooked_alm.audio import decode_file
from hooked_alm.errors import InputError

from ..workbench.experiment import Unit, UnitResult
from ..workbench.files import is_file, is_folder
from ..workbench.identity import file_hashes, file_sha256
from .acoustics import describe_clip
from .records import LONGEST_NAME, File, LineRecord, composed, raise_all, read_made
from .sources import is_local, local

MANIFEST = "manifest.csv"
MEASURED = (
    "duration_s", "sample_rate", "channels", "codec", "rms_dbfs", "f0_median_hz", "f0_iqr_hz",
    "voiced_fraction", "sha256",
)  # fmt: skip
"""Columns that are computed; of these only ``sha256`` is ever read back."""


class ClipLine(LineRecord):
    """A line that names a clip; further columns are kept."""

    model_config = ConfigDict(extra="allow")

    path: File
    sha256: str = ""

    @property
    def cells(self) -> dict[str, str]:
        """What the line says of the clip, as text by column: all but path and computed columns."""
        ours = {*LineRecord.model_fields, "path", *MEASURED}
        fields = [name for name in type(self).model_fields if name in self.model_fields_set]
        every = {name: getattr(self, name) for name in fields} | (self.model_extra or {})
        return {
            composed(name): composed(str(value))
            for name, value in every.items()
            if name not in ours and value is not None
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFile:
    """A recording that was opened, and what is known of it."""

    name: str
    """Names results; no two clips of a set share it."""
    path: Path
    cells: dict[str, str] = field(default_factory=dict)
    """What its table says of it, by column."""
    seconds: float
    sampling_rate: int
    channels: int
    codec: str
    """Container and coding, such as ``WAV/PCM_16``."""
    sha256: str
    notes: tuple[str, ...] = ()
    """What was odd about reading it."""
    where: str
    """Its table and line, or its file; leads the errors about it."""

    def measured(self) -> dict[str, Any]:
        """The columns `MEASURED`: what may tell clips apart before a model has heard them."""
        channels, rate, _ = decode_file(self.path)
        about = {"sample_rate": rate, "channels": self.channels, "codec": self.codec}
        sound = asdict(describe_clip(channels.mean(axis=0), rate))
        every = {**sound, **about, "sha256": self.sha256}
        return {column: every[column] for column in MEASURED}


SOUNDS = {"sounds": "a clip, as it was recorded and as it sounds"}
"""The table of what `sound_units` measure."""
CLIPS_OF_UNIT = 64


@dataclass(frozen=True)
class Sounds:
    """Clips whose sound is measured together: the payload of a unit."""

    clips: tuple[ClipFile, ...]

    def measured(self) -> UnitResult:
        """A row of `SOUNDS` for each.

        Raises:
            InputError: a recording was changed since it was opened.
        """
        for one in self.clips:
            if file_sha256(one.path) != one.sha256:
                raise InputError(
                    f"measuring {one.where}: got another file than when the run began. Put "
                    f"{one.path.name} back; finished units are kept."
                )
        return UnitResult({"sounds": [{"clip": one.name, **one.measured()} for one in self.clips]})


def sound_units(clips: Sequence[ClipFile]) -> list[Unit]:
    """Units that measure how clips sound: pitch takes about as long as a short clip's forward."""
    return [
        Unit(f"sounds__{first:06d}", Sounds(tuple(clips[first : first + CLIPS_OF_UNIT])))
        for first in range(0, len(clips), CLIPS_OF_UNIT)
    ]


def manifest(clips: Sequence[ClipFile], sounds: pd.DataFrame) -> pd.DataFrame:
    """What is said of the clips, and what was measured of them, which may give labels away."""
    said = [{"path": one.path.name, **one.cells} for one in clips]
    measured = sounds.set_index("clip").loc[[one.name for one in clips], [*MEASURED]]
    notes = ["; ".join(one.notes) for one in clips]
    return pd.DataFrame(said).join(measured.reset_index(drop=True)).assign(notes=notes)


def of_whom(clips: pd.DataFrame) -> str:
    """How many speakers and sentences the clips are of, where their table says so."""
    known = {"speaker": "speakers", "sentence": "sentences", "language": "languages"}
    clips = clips.rename(columns={} if "sentence" in clips else {"text": "sentence"})
    counts = {name: clips.get(name, pd.Series(dtype=str)).nunique() for name in known}
    said = [f"{n} {known[name] if n > 1 else name}" for name, n in counts.items() if n]
    unsaid = [known[name] for name, n in counts.items() if not n]
    parts = [f"of {', '.join(said)}"] if said else []
    return "; ".join(parts + ([f"their {' and '.join(unsaid)} are not stated"] if unsaid else []))


C = TypeVar("C", bound=ClipFile)
L = TypeVar("L", bound=ClipLine)


def read_clips(what: str, table: str | Path, kind: type[L], make: Callable[[L], C]) -> list[C]:
    """The clips of a table, in its order, made by ``make``, which opens them with `open_clip`.

    Raises:
        InputError: all that is wrong with its lines and with the files that they name.
    """
    return told_apart(read_made(what, table, kind, make, _repeats))


def table_of(source: str | Path) -> str | Path | None:
    """The table that a source is, or that its folder holds; None for a folder of clips alone."""
    if not is_local(source):
        return source
    table = local(source) / MANIFEST if is_folder(local(source)) else local(source)
    return table if is_file(table) else None


def described_table(source: str | Path) -> dict[str, dict[str, str]]:
    """What identifies the table that a source is or holds, for ``inputs``."""
    given = table_of(source)
    return {"files": file_hashes([table := local(given)], table.parent) if given else {}}


def told_apart(clips: Sequence[C]) -> list[C]:
    """The clips, with names of their folders where those of their files are not enough."""
    count = Counter(clip.name.casefold() for clip in clips)
    return [
        replace(clip, name=f"{file_safe(clip.path.parent.name)}-{clip.name}")
        if count[clip.name.casefold()] > 1
        else clip
        for clip in clips
    ]


def file_safe(name: str) -> str:
    """A name as files of a run can have it."""
    return re.sub(r"[^\w+=@,.-]+", "-", composed(name))


def _repeats(clips: Sequence[ClipFile]) -> list[str]:
    """Recordings that are given twice, and names that results could not tell apart."""
    faults, first = [], dict[tuple[str, str], ClipFile]()
    for clip, named in zip(clips, told_apart(clips), strict=True):
        if len(named.name.encode()) > LONGEST_NAME:
            faults.append(
                f"{clip.where}: got {named.name!r}, expected up to {LONGEST_NAME} bytes of folder "
                "and file name, since others have that file name: rename one of them"
            )
            continue
        for column, key, cure in (
            ("recording", clip.sha256, "leave one out, or replace the wrong copy"),
            ("file name", named.name.casefold(), "results are named by it; rename one file"),
        ):
            earlier = first.setdefault((column, key), clip)
            if earlier is not clip:
                faults.append(f"{clip.where}: the same {column} as {earlier.where}: {cure}")
                break
    return faults


def check_clips(doing: str, clips: Sequence[C]) -> list[C]:
    """The clips of a folder, told apart; see `read_clips`.

    Raises:
        InputError: two that are the same recording, or have the same name.
    """
    raise_all(doing, _repeats(clips))
    return told_apart(clips)


def open_clip(
    kind: type[C],
    path: Path,
    where: str,
    cells: dict[str, str],
    *,
    column: str = "",
    sha256: str = "",
    **more: Any,
) -> C:
    """A clip of some kind, read from its file.

    Args:
        kind: of clip.
        path: of the file.
        where: leads the errors about it.
        cells: what is known of it.
        column: that names the file, if a table does; leads the errors about the file.
        sha256: of the file, where it is known.
        more: fields that the kind adds.

    Raises:
        InputError: no sound that can be decoded, another file than the hash is of, or a name that
            is too long for results.
    """
    import soundfile

    name, lead = file_safe(path.stem), f"{column}: " if column else ""
    if any("\ud800" <= letter <= "\udfff" for letter in path.name):
        raise InputError(f"{lead}got a file name that is not UTF-8, expected text. Rename the file")
    if (n := len(name.encode())) > LONGEST_NAME:
        raise InputError(
            f"{lead}got a file name of {n} bytes without its suffix, expected at most "
            f"{LONGEST_NAME}: results are named by it. Rename the file"
        )
    try:
        channels, rate, notes = decode_file(path)
    except InputError as error:
        raise InputError(f"{lead}{error}") from error
    found = file_sha256(path)
    if sha256 and sha256.lower() != found:
        raise InputError(
            f"sha256: got {sha256}, expected {found} for {path.name}. The file was changed since; "
            "put the original back, or empty the cell"
        )
    about = soundfile.info(path)
    return kind(
        name=name,
        path=path,
        cells=cells,
        seconds=channels.shape[1] / rate,
        sampling_rate=rate,
        channels=len(channels),
        codec=f"{about.format}/{about.subtype}",
        sha256=found,
        notes=tuple(notes),
        where=where,
        **more,
    )
