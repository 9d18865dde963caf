"""Labels of transcripts, once these are known, and which of them can be learnt and held out.

Source: M-BT-5.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from hooked_alm.errors import InputError

from ..materials.clips import ClipFile
from ..materials.held_out_labels import HeldOutLabel, held_out_label
from ..materials.records import raise_all
from ..materials.resampling import SPEAKER
from ..workbench.experiment import UnitResult
from ..workbench.results import Row
from .settings import TranscriptLabel, TranscriptProbesConfig


@dataclass(frozen=True)
class Unread:
    """The payload of a unit: labels that cannot be learnt and held out, each with why."""

    why: tuple[tuple[str, str], ...]

    def result(self) -> UnitResult:
        """A row for each."""
        return UnitResult({"unread": [{"label": label, "why": why} for label, why in self.why]})


def value_of(label: TranscriptLabel, row: Row, wrong_rate: float) -> str:
    """What a transcript is labelled with; empty where it is left out.

    Args:
        label: which.
        row: of the table of transcripts.
        wrong_rate: errors for a word from which a transcript is wrong.
    """
    is_speech = row["holds"] == "speech"
    if label == "speech":
        return str(row["holds"])
    if label == "hallucination":
        return "" if not row["heard"] else "speech" if is_speech else "hallucination"
    if not is_speech:
        return ""
    return "right" if row["rate"] == 0 else "wrong" if row["rate"] >= wrong_rate else ""


def labels_of(
    clips: Sequence[ClipFile],
    transcripts: pd.DataFrame,
    by: str | None,
    config: TranscriptProbesConfig,
) -> tuple[list[HeldOutLabel], Unread]:
    """The labels that can be read, each with its folds; and those that cannot.

    Args:
        clips: of the run.
        transcripts: of these, in any order.
        by: column whose values are held out whole.
        config: of the run.

    Raises:
        InputError: none can be read.
    """
    rows = {row["clip"]: row for row in transcripts.to_dict("records")}
    found, why = [], []
    for label in config.labels:
        some = []
        for one in clips:
            row = {str(key): value for key, value in rows[one.name].items()}
            value = value_of(label, row, config.wrong_rate)
            some.append(replace(one, cells={**_held(one, row, by, config), label: value}))
        try:
            found.append(held_out_label(label, by, some, config))
        except InputError as error:
            why.append((label, str(error)))
    if not found:
        raise_all("probing transcripts", [f"{label}: {text}" for label, text in why])
    return found, Unread(tuple(why))


def _held(
    clip: ClipFile, row: Row, by: str | None, config: TranscriptProbesConfig
) -> dict[str, str]:
    """What a clip is held out with: where nothing is said, no one speaks, and it is by itself."""
    cells = dict(clip.cells)
    if row["holds"] == "no_speech":
        alone = [name for name in (SPEAKER, by) if name in cells and name != config.group]
        cells |= dict.fromkeys([*alone, *([by] if by and not cells.get(by) else [])], clip.name)
    return cells
