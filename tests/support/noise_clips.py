"""Tables of clips of noise, each unlike the others."""

import csv
from collections.abc import Sequence
from pathlib import Path

import soundfile

from whisper_toy import noise


def noise_table(folder: Path, seconds: Sequence[float], **columns: Sequence[str]) -> Path:
    """A table of ``c0.wav``, ``c1.wav``, ... of these durations, with further columns."""
    table = folder / "table.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", *columns])
        for n, (length, *cells) in enumerate(zip(seconds, *columns.values(), strict=True)):
            soundfile.write(folder / f"c{n}.wav", noise(length, seed=n), 16_000)
            rows.writerow([f"c{n}.wav", *cells])
    return table
