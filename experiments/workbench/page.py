"""A report in the making: sections, and the figures and clips that they show."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure as Drawing

from .figures import save_figure
from .intervals import NOT_DRAWN
from .report import Clip, Clips, Figure, Note, Section, SectionItem, Table
from .run_folder import CLIP_RATE_HZ, RunFolder

MAX_CLIP_BYTES = 4_000_000
"""Sound that a page carries; a folder of long recordings would make it too large to send."""


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
        self, caption: str, rows: pd.DataFrame | Sequence[dict[str, Any]] | str, max_rows: int = 30
    ) -> None:
        """Shows a table of the run by its name, or rows that are given."""
        if isinstance(rows, str):
            self._add(Table(caption, name=rows, max_rows=max_rows))
            return
        given = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
        found = [{str(key): value for key, value in row.items()} for row in given]
        self._add(Table(caption, rows=found, max_rows=max_rows))

    def note(self, text: str, *, is_warning: bool = False) -> None:
        """Shows a paragraph that stands out."""
        self._add(Note(text, "warning" if is_warning else "info"))

    def has_room(self, seconds: float) -> bool:
        """Whether the page can carry another clip of this length; counts it if so."""
        size = int(seconds * CLIP_RATE_HZ * 2)
        fits = self._bytes_of_clips + size <= MAX_CLIP_BYTES
        self._bytes_of_clips += size if fits else 0
        return fits

    def clips(self, clips: list[Clip], caption: str) -> None:
        """Shows recordings to play."""
        self._add(Clips(clips, caption))
