"""A folder of recordings as a checked list: who speaks how, in which language, in which file.

A clip is known by its OB1 name (``zh_cheerful_strong.wav``) or by its line in ``manifest.csv``.
All faults of a folder are reported at once, by file, line and column, before anything is computed.

Source: seed 000; M-000-1, C28.
"""

import csv
import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from hooked_alm.audio import UNREADABLE_SUFFIXES, decode_file
from hooked_alm.errors import InputError

from .acoustics import describe_file
from .clip_table import IDENTITY, MEASURED, ClipEntry, collect, raise_all, read_clip_table, repeats
from .ob1 import Emotion, Intensity, Language, ob1_clip_names, parse_clip_name

MANIFEST = "manifest.csv"
_AUDIO = {f".{suffix}" for suffix in UNREADABLE_SUFFIXES} | {
    ".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """One clip and what is known about it."""

    path: Path
    language: Language
    emotion: Emotion
    intensity: Intensity
    seconds: float
    sampling_rate: int
    sha256: str
    notes: tuple[str, ...] = ()
    """What was odd about reading it."""
    other: dict[str, str] = field(default_factory=dict)
    """Further columns of the manifest."""

    @property
    def name(self) -> str:
        """File name without its suffix; no two recordings of a folder share it."""
        return self.path.stem


def load_recordings(folder: str | Path, declared_n: int | None = None) -> list[Recording]:
    """The recordings of a folder, in the order of its manifest, or else of the OB1 set.

    With a ``manifest.csv`` (columns path, language, emotion, intensity; others are kept; sha256 is
    checked), the files it lists; else every audio file, which must have an OB1 name. Any subset of
    the 18 OB1 clips will do. Two clips of one condition need different ``speaker`` or ``sentence``
    columns.

    Args:
        folder: of the recordings.
        declared_n: how many there must be. Without it, a strong neutral is refused: OB1's neutral
            has one level, and 20 clips instead of 18 are usually a mistake.

    Raises:
        InputError: all that is wrong with the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"loading recordings: got {folder}, expected a folder. Give the folder that holds the "
            "clips."
        )
    manifest = folder / MANIFEST
    entries = (
        read_clip_table(manifest, path_column="path", folder=folder)
        if manifest.is_file()
        else _named_entries(folder)
    )
    _check_set(folder, entries, declared_n)
    recordings = collect(f"loading recordings from {folder}", _open, entries, lambda e: e.where)
    first: dict[str, Recording] = {}
    for recording in recordings:
        twin = first.setdefault(recording.sha256, recording)
        if twin is not recording:
            raise InputError(
                f"loading recordings from {folder}: {twin.path.name} and {recording.path.name} are "
                "the same recording, expected different ones. Replace the wrong copy."
            )
    return recordings


def write_manifest(folder: str | Path, declared_n: int | None = None) -> Path:
    """Measure a folder's recordings into its ``manifest.csv``; returns that path.

    Duration, level and pitch often differ by emotion and can give the label away: report them. An
    existing manifest keeps its further columns; its hashes must still hold.

    Raises:
        InputError: as ``load_recordings``.
    """
    folder = Path(folder)
    recordings = load_recordings(folder, declared_n)
    others = dict.fromkeys(column for r in recordings for column in r.other)
    path = folder / MANIFEST
    draft = path.with_suffix(".csv.tmp")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["path", *IDENTITY, *MEASURED, *others], restval="")
        writer.writeheader()
        writer.writerows(_manifest_row(folder, recording) for recording in recordings)
    draft.replace(path)
    return path


def rename_recordings(folder: str | Path, mapping_csv: str | Path, out: str | Path) -> list[Path]:
    """Copy recordings to their OB1 names (the seed's rename step); returns the copies.

    Args:
        folder: of the recordings.
        mapping_csv: columns source (relative to ``folder``), language, emotion, intensity.
        out: folder of the copies, made if missing. Nothing in it is ever overwritten.

    Raises:
        InputError: all that is wrong with the mapping, before the first copy.
    """
    folder, out = Path(folder), Path(out)
    if out.resolve() == folder.resolve():
        raise InputError(
            f"renaming recordings: got {out} as source and target, expected another folder for the "
            "copies. Originals are never renamed."
        )
    entries = read_clip_table(Path(mapping_csv), path_column="source", folder=folder)
    targets = [out / f"{e.name.stem}{e.path.suffix.lower()}" for e in entries]
    faults = repeats(entries, "source", lambda e: e.path.resolve())
    faults += repeats(entries, "OB1 name", lambda e: e.name.stem)
    for entry, target in zip(entries, targets, strict=True):
        taken = sorted(out.glob(f"{target.stem}.*"))
        faults += [f"{entry.where}: {taken[0]} exists already"] if taken else []
    raise_all("renaming recordings", faults)
    collect("renaming recordings", _open, entries, lambda e: e.where)
    out.mkdir(parents=True, exist_ok=True)
    for entry, target in zip(entries, targets, strict=True):
        with entry.path.open("rb") as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy)
    return targets


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


def _named_entries(folder: Path) -> list[ClipEntry]:
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in _AUDIO and not path.name.startswith(".")
    ]
    order = {name: i for i, name in enumerate(ob1_clip_names())}

    def entry(path: Path) -> ClipEntry:
        return ClipEntry(where=path.name, path=path, name=parse_clip_name(path))

    entries = collect(f"loading recordings from {folder}", entry, files, lambda p: p.name)
    return sorted(entries, key=lambda e: order.get(e.name, len(order)))


def _check_set(folder: Path, entries: Sequence[ClipEntry], declared_n: int | None) -> None:
    """The right number of clips, each condition once."""
    doing = f"loading recordings from {folder}"
    if not entries:
        raise InputError(
            f"{doing}: got no audio files, expected clips named like zh_cheerful_strong.wav, or a "
            f"{MANIFEST}. Copy the recordings there; `hooked-alm rename` gives them their names."
        )
    if declared_n is not None and len(entries) != declared_n:
        raise InputError(
            f"{doing}: got {len(entries)} recordings, expected the {declared_n} declared. Add the "
            "missing ones, or correct the number."
        )
    strong = [
        e.where for e in entries if (e.name.emotion, e.name.intensity) == ("neutral", "strong")
    ]
    if strong and declared_n is None:
        raise InputError(
            f"{doing}: got {len(entries)} recordings with a strong neutral ({', '.join(strong)}), "
            "expected at most the 18 of OB1, whose neutral has one level, 'normal'. Leave it out, "
            f"or declare the number of recordings (-s n_clips={len(entries)})."
        )
    faults = repeats(entries, "file", lambda e: e.path.resolve())
    faults += repeats(entries, "file stem", lambda e: e.path.stem)
    apart = ("speaker", "sentence")
    faults += repeats(
        entries, "condition", lambda e: (e.name.stem, *(e.other.get(column) for column in apart))
    )
    raise_all(doing, faults)


def _open(entry: ClipEntry) -> Recording:
    try:
        channels, rate, notes = decode_file(entry.path)
    except InputError as error:
        raise InputError(f"{entry.column}{error}") from error
    sha256 = hashlib.sha256(entry.path.read_bytes()).hexdigest()
    if entry.sha256 and entry.sha256.lower() != sha256:
        raise InputError(
            f"column sha256: got {entry.sha256}, expected {sha256} for {entry.path.name}. The file "
            "was changed since; put the original back, or empty the cell."
        )
    return Recording(
        path=entry.path,
        **asdict(entry.name),
        seconds=channels.shape[1] / rate,
        sampling_rate=rate,
        sha256=sha256,
        notes=tuple(notes),
        other=entry.other,
    )


def _manifest_row(folder: Path, recording: Recording) -> dict[str, object]:
    path = recording.path
    described = describe_file(path)
    numbers = {key: f"{x:.4f}" if math.isfinite(x) else "" for key, x in described.items()}
    return {
        "path": (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix(),
        **{column: getattr(recording, column) for column in IDENTITY},
        **numbers,
        "sample_rate": recording.sampling_rate,
        "sha256": recording.sha256,
        **recording.other,
    }
