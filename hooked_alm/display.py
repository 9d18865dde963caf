"""How objects show themselves: a few lines as text, a small self-contained panel in a notebook.

Panels take text colour and background from the notebook, dark or light; everything that they say is
text, and colour only repeats it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice

# All light: black text stands on them, whatever the notebook's colours are.
COLOURS = {
    "sink": "#d9d9d9", "struct": "#bdbdbd", "audio_struct": "#fdae6b", "audio": "#fdd0a2",
    "text": "#9ecae1", "readout": "#a1d99b", "pad": "#f7f7f7",
}  # fmt: skip
OTHER_COLOUR = "#dadaeb"
"""Colour of named segments."""
N_LINES, N_ROWS = 12, 30
"""Most lines of a table as text, and rows in a notebook."""

_LINE = "1px solid rgba(128,128,128,.5)"
_NAME = "white-space:nowrap;font-weight:normal;opacity:.75"
_TABLE = "border-collapse:collapse;background:none;color:inherit;margin:4px 0"
_CELL = "text-align:left;padding:1px 10px 1px 0;vertical-align:top"


@dataclass(frozen=True)
class Piece:
    """A part of a bar: ``name`` over so many positions, with what there is to say of it."""

    name: str
    size: int
    note: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What an object says of itself."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    """Names and texts, a line each."""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    """A table; the text has fewer of its rows."""
    bars: Sequence[tuple[str, Sequence[Piece]]] = ()
    """Names and pieces of bars, drawn in a notebook; a fact says the same in words."""

    def __str__(self) -> str:
        """The title and a line for each fact, indented."""
        lines = [self.title, *(f"  {name}: {text}" for name, text in self.facts)]
        shown = [self.columns, *self.rows[:N_LINES]] if self.rows else []
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        for row in shown:
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f"  {'  '.join(padded)}".rstrip())
        return "\n".join([*lines, *_more(self.rows, N_LINES)])

    def html(self) -> str:
        """A panel, without script, style sheet or anything from elsewhere."""
        parts = [f"<strong>{escape(self.title)}</strong>"]
        parts += [_bar(name, pieces) for name, pieces in self.bars]
        cells = "".join(
            f'<tr><th scope="row" style="{_CELL};{_NAME}">{escape(name)}'
            f'</th><td style="{_CELL}">{escape(text)}</td></tr>'
            for name, text in self.facts
        )
        parts += [_table(cells)] if cells else []
        parts += [_table(self._body())] if self.rows else []
        return f'<div style="font-size:.9em;line-height:1.5">{"".join(parts)}</div>'

    def _body(self) -> str:
        head = "".join(
            f'<th scope="col" style="{_CELL};border-bottom:{_LINE}">{escape(name)}</th>'
            for name in self.columns
        )
        rows = "".join(
            "<tr>" + "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in row) + "</tr>"
            for row in self.rows[:N_ROWS]
        )
        more = "".join(
            f'<tr><td colspan="{len(self.columns)}" style="{_CELL}">{text.strip()}</td></tr>'
            for text in _more(self.rows, N_ROWS)
        )
        return f"<tr>{head}</tr>{rows}{more}"


class Shown:
    """Mixed into what shows itself by a ``Summary``."""

    def _summary(self) -> Summary:
        raise NotImplementedError

    def __repr__(self) -> str:
        """A few lines."""
        return str(self._summary())

    def _repr_html_(self) -> str:
        return self._summary().html()


def _more(rows: Sequence[object], limit: int) -> list[str]:
    return [f"  … {len(rows) - limit} more"] if len(rows) > limit else []


def _table(cells: str) -> str:
    return f'<table style="{_TABLE}">{cells}</table>'


def _bar(name: str, pieces: Sequence[Piece]) -> str:
    said = ", ".join(f"{piece.name} {piece.note}" for piece in pieces)
    drawn = "".join(
        f'<span title="{escape(f"{piece.name} {piece.note}")}" style="flex:{piece.size} 1 0;'
        f"min-width:2px;overflow:hidden;white-space:nowrap;text-align:center;color:#000;"
        f'background:{COLOURS.get(piece.name, OTHER_COLOUR)};border-right:1px solid #666">'
        f"{escape(piece.name) if piece.size * 12 > sum(p.size for p in pieces) else ''}</span>"
        for piece in pieces
    )
    return (
        f'<div style="display:flex;align-items:center;margin:3px 0;max-width:60em">'
        f'<span style="flex:none;min-width:5em;opacity:.75">{escape(name)}</span>'
        f'<div role="img" aria-label="{escape(f"{name}: {said}")}" style="display:flex;flex:1;'
        f'border:1px solid #666;font-size:.8em">{drawn}</div></div>'
    )


def amount(n_bytes: int) -> str:
    """Bytes as a person reads them: ``3.1 MB``."""
    size, units = float(n_bytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}"


def listed(items: Sequence[object], limit: int = 6) -> str:
    """Items with commas between, the last ones counted if there are many."""
    shown = [*map(str, islice(items, limit))]
    return ", ".join(shown) + (f", … ({len(items)})" if len(items) > limit else "")
