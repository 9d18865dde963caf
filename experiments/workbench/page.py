"""A report in the making: sections, and the figures and clips that they show."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Drawing

from .figures import save_figure
from .intervals import NOT_DRAWN
from .report import MAX_ROWS, Clip, Clips, Figure, Note, Section, SectionItem, Table
from .run_folder import CLIP_RATE_HZ, RunFolder

MAX_CLIPS = 60
"""Recordings that a page lets one hear, each with its own small figure."""
MAX_CLIP_BYTES = 4_000_000
"""Sound that a page carries; a folder of long recordings would make it too large to send."""
HOW_CHOSEN = "The labels take turns, each with its clips in an order drawn with seed {}."


@runtime_checkable
class Heard(Protocol):
    """Something that can be heard."""

    @property
    def seconds(self) -> float:
        """How long it is."""


@runtime_checkable
class Played(Heard, Protocol):
    """Something whose recording is played."""

    @property
    def name(self) -> str:
        """Names its file in the run's folder."""

    @property
    def path(self) -> Path:
        """Its recording."""


H = TypeVar("H", bound=Heard)
P = TypeVar("P", bound=Played)


@dataclass(frozen=True)
class Sample(Generic[H]):
    """The clips that a page shows."""

    clips: list[H]
    n_of: int
    """All clips."""
    how: str
    """How they were chosen, in a sentence; empty where all are shown."""

    @property
    def which(self) -> str:
        """The subject of a sentence about them."""
        return f"{len(self.clips)} of the {self.n_of} clips" if self.how else "Each clip"


class Page:
    """Sections in order; figures and clips are written into the run's folder as they are added."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.sections: list[Section] = []
        self._bytes_of_clips = 0

    def section(self, title: str, text: str = "") -> None:
        """Begins a section; what is added from here on belongs to it."""
        self.sections.append(Section(title, text))

    def _add(self, item: SectionItem) -> None:
        self.sections[-1].items.append(item)

    def figure(
        self,
        name: str,
        drawing: Drawing,
        numbers: pd.DataFrame,
        caption: str,
        how: str,
        controls: str = "",
    ) -> None:
        """Keeps a drawing with the numbers it shows, and shows it; says where it has no interval.

        Args:
            name: of its files.
            drawing: from ``figures``.
            numbers: saved beside it as CSV.
            caption: what it shows.
            how: how to read it.
            controls: what has to hold if it shows what it claims to.
        """
        save_figure(self.folder, name, drawing, numbers)
        if numbers.filter(regex="low$").isna().any(axis=None):
            how = f"{how} {NOT_DRAWN}"
        self._add(Figure(name, caption, how, controls))

    def table(
        self,
        caption: str,
        rows: pd.DataFrame | Sequence[dict[str, Any]] | str,
        max_rows: int = MAX_ROWS,
        *,
        of: str | None = None,
    ) -> None:
        """Shows a table of the run by its name, or the first of rows that are given.

        Args:
            caption: what it shows.
            rows: name of a table of the run, or rows.
            max_rows: rows that are shown; the page says how many there are.
            of: the table of the run that holds what is given, and all of its rows.
        """
        if isinstance(rows, str):
            self._add(Table(caption, name=rows, max_rows=max_rows))
            return
        first = rows[:max_rows]
        given = first.to_dict("records") if isinstance(first, pd.DataFrame) else first
        found = [{str(key): value for key, value in row.items()} for row in given]
        self._add(Table(caption, rows=found, max_rows=max_rows, n_rows=len(rows), of=of))

    def note(self, text: str, *, is_warning: bool = False) -> None:
        """Shows a paragraph that stands out."""
        self._add(Note(text, "warning" if is_warning else "info"))

    def sample(
        self,
        clips: Sequence[H],
        label: Callable[[H], Hashable],
        *,
        seed: int,
        most: int = MAX_CLIPS,
    ) -> Sample[H]:
        """The clips to show: all, if there is room on the page, else some of every label.

        Everything that is drawn clip by clip is drawn of these alone.

        Args:
            clips: the run's.
            label: clip -> what takes turns, so that every label is heard.
            seed: of the draw.
            most: clips to show.

        Returns:
            Clips in their own order. One that is too long for what is left is passed over.
        """
        order: Sequence[int] = range(len(clips))
        if len(clips) > most or self._size(clips) > MAX_CLIP_BYTES - self._bytes_of_clips:
            order = _in_turns([label(one) for one in clips], seed)
        chosen: list[int] = []
        for index in order:
            if len(chosen) == most:
                break
            size = self._size([clips[index]])
            if self._bytes_of_clips + size <= MAX_CLIP_BYTES:
                self._bytes_of_clips += size
                chosen.append(index)
        how = "" if len(chosen) == len(clips) else HOW_CHOSEN.format(seed)
        return Sample([clips[index] for index in sorted(chosen)], len(clips), how)

    @staticmethod
    def _size(clips: Sequence[Heard]) -> int:
        return sum(int(one.seconds * CLIP_RATE_HZ * 2) for one in clips)

    def play(
        self,
        sample: Sample[P],
        caption: str,
        about: Callable[[P], dict[str, Any]],
        figure: Callable[[P], str | None] = lambda one: None,
    ) -> None:
        """Shows a sample to play, by name.

        Args:
            sample: see `sample`.
            caption: what it is, before how it was chosen.
            about: clip -> what was found of it.
            figure: clip -> name of its own figure.
        """
        clips = [
            Clip(self.folder.add_clip(one.name, one.path), one.name, figure(one), about(one))
            for one in sample.clips
        ]
        self.clips(clips, f"{caption} {sample.how}".rstrip())

    def clips(self, clips: list[Clip], caption: str) -> None:
        """Shows recordings to play."""
        self._add(Clips(clips, caption))


def _in_turns(labels: Sequence[Hashable], seed: int) -> list[int]:
    """Indices in which labels take turns, each with its own in an order that is drawn."""
    place: dict[Hashable, int] = {}
    turns = []
    for index in np.random.default_rng(seed).permutation(len(labels)).tolist():
        label = labels[index]
        place[label] = place.get(label, -1) + 1
        turns.append((place[label], index))
    first = {label: rank for rank, label in enumerate(dict.fromkeys(labels))}
    return [index for _, index in sorted(turns, key=lambda at: (at[0], first[labels[at[1]]]))]
