"""Recordings whose voice carries a label: an emotion, or whatever a column of their table says.

A clip is known by its line in a manifest, or by its OB1 name (``zh_cheerful_strong.wav``). All
faults of a folder are reported at once, by file, line and column, before anything is computed.

Source: seed 000; M-000-1, C28.
"""

import csv
import io
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from pydantic import ConfigDict

from hooked_alm.audio import READABLE_SUFFIXES, UNREADABLE_SUFFIXES
from hooked_alm.errors import InputError
from hooked_alm.storage import expanded

from ..workbench.files import OwnFiles, is_folder
from ..workbench.inert import for_sheet
from .clips import (
    MANIFEST,
    MEASURED,
    ClipFile,
    ClipLine,
    check_clips,
    open_clip,
    read_clips,
    table_of,
)
from .ob1 import ClipName, Emotion, Intensity, Language, ob1_clip_names, parse_clip_name
from .records import File, LineRecord, as_label, collect, raise_all, read_records
from .sources import shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording(ClipFile):
    """One clip, and the label that its voice carries."""

    label_column: str = "emotion"

    @property
    def label(self) -> str:
        """What the voice carries."""
        return self.cells[self.label_column]

    @property
    def language(self) -> str:
        """Language that is spoken; empty where the table does not say."""
        return self.cells.get("language", "")

    @property
    def intensity(self) -> str:
        """How strongly the label is expressed; empty where the table does not say."""
        return self.cells.get("intensity", "")

    @property
    def targets(self) -> tuple[str, ...]:
        """Labels that instructions name against it, by the column ``target``; none are the set's.

        Several are separated by ``|``.
        """
        return tuple(one.strip() for one in self.cells.get("target", "").split("|") if one.strip())


def load_recordings(
    source: str | Path, declared_n: int | None = None, *, label_column: str | None = "emotion"
) -> list[Recording]:
    """The recordings of a table or folder, in its order.

    Args:
        source: a table (see `clips`; columns ``path`` and ``label_column``; ``language``,
            ``intensity``, ``speaker``, ``sentence``, ``target`` mean what they say), a folder with
            a ``manifest.csv``, or a folder of clips with OB1 names, of which any subset will do.
        declared_n: how many there must be. Without it, a strong neutral among OB1 names is refused:
            OB1's neutral has one level, and 20 clips instead of 18 are usually a mistake.
        label_column: names the label that the voice carries; None asks for no one label.

    Raises:
        InputError: all that is wrong with it.

    Warns:
        UserWarning: files of a folder that are no recordings by their names.
    """
    if table := table_of(source):
        make = partial(_of_line, label_column=label_column)
        found = read_clips("recordings", table, ClipLine, make)
    elif is_folder(source := expanded(source)):
        found = _named_recordings(source, declared_n)
    else:
        raise InputError(
            f"loading recordings: got {source}, expected a folder or a table. Give the folder that "
            f"holds the clips, or the table that lists them."
        )
    if declared_n is not None and len(found) != declared_n:
        raise InputError(
            f"loading recordings from {shown(source)}: got {len(found)} recordings, expected the "
            f"{declared_n} declared. Add the missing ones, or correct the number."
        )
    return found


def load_clips(source: str | Path) -> list[ClipFile]:
    """The clips of a table or folder, in its order, whatever they are; a table's columns are kept.

    Raises:
        InputError: all that is wrong with it.
    """
    if table := table_of(source):
        return read_clips("clips", table, ClipLine, _any_line)
    folder, doing = expanded(source), f"loading clips from {source}"
    files = audio_files(folder) if is_folder(folder) else []
    if not files:
        raise InputError(
            f"{doing}: got no audio files, expected a table of clips or a folder of them. Check "
            "the path."
        )

    def opened(path: Path) -> ClipFile:
        return open_clip(ClipFile, path, path.name, {})

    return check_clips(doing, collect(doing, opened, files, lambda path: path.name))


def _any_line(line: ClipLine) -> ClipFile:
    return open_clip(ClipFile, line.path, line.where, line.cells, column="path", sha256=line.sha256)


def _of_line(line: ClipLine, label_column: str | None) -> Recording:
    cells = line.cells
    if label_column is not None:
        check_label(cells, label_column)
    return open_clip(
        Recording, line.path, line.where, cells,
        column="path", sha256=line.sha256, label_column=label_column or "",
    )  # fmt: skip


def check_label(cells: Mapping[str, str], column: str) -> None:
    """Refuse a clip without a label, or with one that results cannot be named by.

    Raises:
        InputError: by column.
    """
    if not cells.get(column):
        raise InputError(
            f"{column}: missing, expected the label that the voice carries"
            + (
                ""
                if column in cells
                else f"; columns are path, {', '.join(cells) or 'and no other'}"
            )
        )
    try:
        as_label(label := cells[column])
    except ValueError as error:
        raise InputError(f"{column}: got {label[:80]!r}, expected {error}") from None


def _named_recordings(folder: Path, declared_n: int | None) -> list[Recording]:
    """The clips of a folder that have OB1 names, in the order of OB1."""
    doing = f"loading recordings from {folder}"
    files = audio_files(folder)
    if not files:
        raise InputError(
            f"{doing}: got no audio files, expected clips named like zh_cheerful_strong.wav, or a "
            f"{MANIFEST}. Copy the recordings there; `hooked-alm rename` gives them their names, "
            "`hooked-alm manifest --from` writes a table of a published corpus."
        )
    order = {name: i for i, name in enumerate(ob1_clip_names())}

    def opened(path: Path) -> Recording:
        return open_clip(Recording, path, path.name, asdict(parse_clip_name(path)))

    found = check_clips(doing, collect(doing, opened, files, lambda path: path.name))
    strong = [r.path.name for r in found if (r.label, r.intensity) == ("neutral", "strong")]
    if strong and declared_n is None:
        raise InputError(
            f"{doing}: got {len(files)} recordings with a strong neutral ({', '.join(strong)}), "
            "expected at most the 18 of OB1, whose neutral has one level, 'normal'. Leave it out, "
            f"or declare the number of recordings (-s n_clips={len(files)})."
        )
    return sorted(found, key=lambda r: order.get(parse_clip_name(r.path), len(order)))


def audio_files(folder: Path, pattern: str = "*") -> list[Path]:
    """The files with names of sound formats, and a warning that names the others.

    Hidden files are passed over, as those are that systems leave behind.
    """
    every = [p for p in sorted(folder.glob(pattern)) if p.is_file() and p.name[0] != "."]
    known = {f".{suffix}" for suffix in READABLE_SUFFIXES | UNREADABLE_SUFFIXES}
    others = [path.name for path in every if path.suffix.lower() not in known]
    if others:
        more = f" and {len(others) - 9} more" if len(others) > 10 else ""
        shown = ", ".join(others[: 9 if more else 10])
        warnings.warn(
            f"{folder}: not read, since they have no names of sound files: {shown}{more}",
            UserWarning,
            stacklevel=2,
        )
    return [path for path in every if path.suffix.lower() in known]


def write_manifest(folder: str | Path, recordings: Sequence[ClipFile]) -> Path:
    """Measure recordings into the folder's ``manifest.csv``; returns that path.

    Duration, level and pitch often differ by label and can give it away: report them. What a table
    said of the clips is kept.
    """
    path = expanded(folder) / MANIFEST
    said = dict.fromkeys(column for clip in recordings for column in clip.cells)
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet)
    columns = ["path", *said, *MEASURED]
    rows = [_manifest_row(path.parent, clip) for clip in recordings]
    writer.writerow([for_sheet(name) for name in columns])
    for row in rows:
        writer.writerow([for_sheet(row.get(name, "")) for name in columns])
    OwnFiles(path.parent).write(path.name, sheet.getvalue())
    return path


def _manifest_row(folder: Path, clip: ClipFile) -> Mapping[str, object]:
    path, measured = clip.path, clip.measured()
    for column, value in measured.items():
        if isinstance(value, float):
            measured[column] = f"{value:.4f}" if math.isfinite(value) else ""
    relative = path.relative_to(folder) if path.is_relative_to(folder) else path
    return {"path": relative.as_posix(), **clip.cells, **measured}


class _NewName(LineRecord):
    """A file, and what its OB1 name is to say."""

    model_config = ConfigDict(extra="ignore")

    source: File
    language: Language
    emotion: Emotion
    intensity: Intensity

    @property
    def stem(self) -> str:
        """The OB1 name."""
        name = ClipName(language=self.language, emotion=self.emotion, intensity=self.intensity)
        return name.stem


def rename_recordings(folder: str | Path, mapping_csv: str | Path, out: str | Path) -> list[Path]:
    """Copy recordings to their OB1 names (the seed's rename step); returns the copies.

    Args:
        folder: of the recordings.
        mapping_csv: columns source (relative to ``folder``), language, emotion, intensity.
        out: folder of the copies, made if missing. Nothing in it is ever overwritten.

    Raises:
        InputError: all that is wrong with the mapping, before the first copy.
    """
    folder, out = expanded(folder), expanded(out)
    if out.resolve() == folder.resolve():
        raise InputError(
            f"renaming recordings: got {out} as source and target, expected another folder for the "
            "copies. Originals are never renamed."
        )
    table = expanded(mapping_csv)
    entries = read_records("names", table, _NewName, folder=folder)
    first: dict[object, _NewName] = {}
    faults = []
    for entry in entries:
        for what, key in (("source", entry.source.resolve()), ("OB1 name", entry.stem)):
            if (earlier := first.setdefault((what, key), entry)) is not entry:
                faults.append(f"{entry.where}: the same {what} as {earlier.where}")
        if taken := sorted(out.glob(f"{entry.stem}.*")):
            faults.append(f"{entry.where}: {taken[0]} exists already")
    raise_all("renaming recordings", faults)
    collect(
        "renaming recordings",
        lambda entry: open_clip(ClipFile, entry.source, entry.where, {}, column="source"),
        entries,
        lambda entry: entry.where,
    )
    out.mkdir(parents=True, exist_ok=True)
    copies = [out / f"{entry.stem}{entry.source.suffix.lower()}" for entry in entries]
    for entry, copy in zip(entries, copies, strict=True):
        with entry.source.open("rb") as source, copy.open("xb") as target:
            shutil.copyfileobj(source, target)
    return copies


def match_loudness(
    samples: Float32[np.ndarray, " sample"], target_dbfs: float
) -> Float32[np.ndarray, " sample"]:
    """The clip scaled to a level of ``target_dbfs`` (RMS relative to full scale 1.0).

    Raises:
        InputError: the clip is digital silence, or would clip.
    """
    rms = math.sqrt(np.mean(np.square(samples, dtype=np.float64)))
    peak = float(np.abs(samples).max())
    gain = 10 ** (target_dbfs / 20) / rms if rms else math.inf
    if not gain * peak <= 1:
        reach = "silent" if not rms else f"at most {20 * math.log10(rms / peak):.1f} dBFS"
        raise InputError(
            f"matching loudness: got a target of {target_dbfs} dBFS for a clip that is {reach}, "
            "expected a level it reaches without clipping. Lower the target for all clips alike."
        )
    return (samples * gain).astype(np.float32)
