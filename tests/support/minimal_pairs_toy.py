"""Recordings for ``minimal_pairs``: buzzes of some speakers, in two pitches and two timbres."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile

from hooked_alm.experiments.minimal_pairs.experiment import MinimalPairs
from hooked_alm.experiments.minimal_pairs.settings import MinimalPairsConfig
from hooked_alm.experiments.workbench.experiment import Unit
from hooked_alm.experiments.workbench.run_folder import RunFolder

RATE = 16_000
PITCH_HZ = {"high": 220, "low": 140}
TEXTS = {"one two": 1.0, "one six": 2.0}
"""Text -> how fast its harmonics fall."""


def buzz(hertz: float, fall: float, seconds: float = 0.4, level: float = 0.1) -> np.ndarray:
    """Harmonics at some level, whose pitch swings by a semitone."""
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(hertz * 2 ** (np.sin(30 * time) / 12)) / RATE
    sound = sum(np.sin(k * phase) / k**fall for k in range(1, 12))
    return level * sound / np.sqrt(np.mean(sound**2))


def write_recordings(
    folder: Path, *, n_speakers: int = 8, louder_db: float = 0.0, longer: int = 0
) -> Path:
    """A table of every speaker's texts, said high and low.

    Args:
        folder: of the table and its clips.
        n_speakers: a tenth of a semitone apart.
        louder_db: by which high clips are louder.
        longer: samples that high clips have more.
    """
    rows = []
    for speaker in range(n_speakers):
        for text, fall in TEXTS.items():
            for label, hertz in PITCH_HZ.items():
                is_high = label == "high"
                level = 0.1 * 10 ** (louder_db * is_high / 20)
                seconds = 0.4 + longer * is_high / RATE
                sound = buzz(hertz * 1.006**speaker, fall, seconds, level)
                name = f"{speaker}-{text.split()[1]}-{label}.wav"
                soundfile.write(folder / name, sound, RATE, subtype="FLOAT")
                rows.append([name, label, f"s{speaker}", text])
    table = folder / "clips.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "pitch_label", "speaker", "text"], *rows])
    return table


def toy(model: Path | str, audio: Path, **settings: Any) -> MinimalPairs:
    """The experiment on a table of recordings."""
    values = {
        "attribute": "pitch_label", "prompt": "What is it?", "n_resamples": 1000, "n_reference": 3,
        **settings,
    }  # fmt: skip
    return MinimalPairs(MinimalPairsConfig(model=str(model), audio=str(audio), **values))


def tables_of(experiment: MinimalPairs, out: Path) -> dict[str, pd.DataFrame]:
    """All that a run measures, without what is made of it."""
    experiment.folder = RunFolder(out)
    experiment.identify()
    experiment.load()
    found: dict[str, pd.DataFrame] = {}

    def measure(units: Sequence[Unit]) -> None:
        for unit in units:
            for name, rows in experiment.measure(unit).tables.items():
                parts = [found[name]] if name in found else []
                found[name] = pd.concat([*parts, pd.DataFrame(rows)], ignore_index=True)

    measure(experiment.units())
    measure(experiment.further_units(found))
    return found
