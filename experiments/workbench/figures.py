"""Figures that read well on a phone, to colour-blind eyes, and with their numbers beside them.

Every plot takes a tidy table and column names, draws on the given axes or on a new figure, and
returns the figure for `save_figure`. Colours are those of Okabe and Ito; groups differ in line
style and marker too. What axes show is their label in words (`Axes.set_label`), for those who do
not see them.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import alt_text
from .run_folder import RunFolder

PAPER, INK, SOFT, GRID = "#ffffff", "#1c1e21", "#555555", "#e3e3e3"
DARK = {PAPER: "#1d2026", INK: "#e8eaed", SOFT: "#a2a9b4", GRID: "#333842", "#0072b2": "#3d9bd9"}
"""Colour of a figure -> its colour on a dark page; all others are the same on both."""
LIGHT_TEXT, DARK_TEXT = "#fafafa", "#111111"
"""For text on colours that mean something, which a dark page leaves as they are."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Chinese labels are drawn with the first of these that the machine has.
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Microsoft YaHei", "SimHei"),
)
WIDTH_INCHES = 6.0
DOTS_PER_INCH = 200
MAX_CELLS_WITH_NUMBERS = 120
Limits = tuple[int | float | None, int | float | None]
"""Ends of a scale; None leaves one to the data."""


def styled() -> AbstractContextManager[None]:
    """The style of all figures, for the length of a `with` block."""
    installed = set(font_manager.get_font_names())
    settings = {
        "font.family": ["DejaVu Sans", *(font for font in CJK_FONTS if font in installed)],
        # Sized for a figure of 6 inches that a phone shows at half its size.
        "font.size": 12,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": SOFT,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "lines.linewidth": 2.2,
        "lines.markersize": 5,
        "legend.frameon": False,
        "legend.handlelength": 2.2,
        "axes.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        # Names inside an SVG are then the same every time.
        "svg.hashsalt": "hooked_alm",
    }
    return matplotlib.rc_context(cast(Any, settings))


def new_axes(n: int = 1, *, width: float = WIDTH_INCHES, height: float = 3.8) -> list[Axes]:
    """`n` panels, one below the other: side by side they would be too small on a phone."""
    with styled():
        figure = Figure(figsize=(width, height * n), layout="constrained")
        return list(figure.subplots(n, 1, squeeze=False)[:, 0])


def save_figure(folder: RunFolder, name: str, figure: Figure, numbers: pd.DataFrame) -> None:
    """Writes ``figures/{name}`` as PNG and SVG and, beside them, the numbers as CSV."""
    about = {"png": {"Software": None}, "svg": {"Date": None, "Description": in_words(figure)}}
    for kind, metadata in about.items():
        picture = io.BytesIO()
        with styled(), warnings.catch_warnings():
            # Without a Chinese font a label shows boxes; the numbers beside it have the text.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(picture, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
        folder.write(f"figures/{name}.{kind}", picture.getvalue())
    folder.write_sheet(f"figures/{name}.csv", numbers)


def in_words(figure: Figure) -> str:
    """What the figure's panels show, in words and numbers."""
    labels = [str(axes.get_label()) for axes in figure.axes]
    return " ".join(label for label in labels if label and not label.startswith("<"))


def panels(
    draw: Callable[..., Figure],
    parts: Iterable[tuple[pd.DataFrame, Mapping[str, Any]]],
    *,
    height: float = 3.8,
    **options: Any,
) -> Figure:
    """One drawing below the other; those of one quantity share its scale.

    Args:
        draw: `curves`, `bars` or `heat_map`.
        parts: tables, each with the options that are its own.
        height: of each, in inches.
        options: that all share.
    """
    given = [(data, {**options, **own}) for data, own in parts]
    first: dict[Any, Axes] = {}
    for axes, (data, own) in zip(new_axes(len(given), height=height), given, strict=True):
        if "value" in own:
            alike = [part[own["value"]] for part, one in given if one["value"] == own["value"]]
            own = {"limits": ends_of(pd.concat(alike)), **own}
        elif (leader := first.setdefault((own.get("y"), own.get("y_label")), axes)) is not axes:
            axes.sharey(leader)
        figure = draw(data, **own, axes=axes)
    return figure


def limits_of(values: Any) -> tuple[float, float]:
    """A scale that holds all values, for figures that are to be compared."""
    low, high = ends_of(values)
    edge = 0.05 * (high - low) or 1.0
    return low - edge, high + edge


def ends_of(values: Any) -> tuple[float, float]:
    """Least and largest finite value, for colours that are to be compared; 0 and 1 of none."""
    cells = np.ma.masked_invalid(np.asarray(values, dtype=float))
    return (float(cells.min()), float(cells.max())) if cells.count() else (0.0, 1.0)


def curves(
    data: pd.DataFrame,
    x: str,
    y: str = "mean",
    *,
    lo: str = "low",
    hi: str = "high",
    group: str | None = None,
    title: str = "",
    x_label: str | None = None,
    y_label: str | None = None,
    y_limits: Limits = (None, None),
    reference: int | float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """One curve per group, with its interval where the table has one.

    `reference` is a horizontal line, such as 0.
    """
    with styled():
        axes = axes or new_axes()[0]
        if reference is not None:
            axes.axhline(reference, color=SOFT, linewidth=1.2)
        for index, (label, part) in enumerate(_groups(data, group)):
            part = part.sort_values(x)
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(
                part[x],
                part[y],
                color=colour,
                linestyle=LINES[index % len(LINES)],
                marker=MARKERS[index % len(MARKERS)] if len(part) <= 40 else None,
                label=label,
            )
            if {lo, hi} <= {*part}:
                axes.fill_between(part[x], part[lo], part[hi], color=colour, alpha=0.16, lw=0)
        if pd.api.types.is_integer_dtype(data[x]):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if y_limits != (None, None):
            axes.set_ylim(*y_limits)
        _finish(axes, title, x_label or x, y_label or y, labels=_labels(data, group))
        found = alt_text.of_curves(_groups(data, group), x, y)
        return _told(axes, title, f"{y_label or y} by {x_label or x}", found)


def bars(
    data: pd.DataFrame,
    x: str,
    y: str = "mean",
    *,
    lo: str = "low",
    hi: str = "high",
    group: str | None = None,
    title: str = "",
    x_label: str = "",
    y_label: str | None = None,
    y_limits: Limits = (None, None),
    reference: int | float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Bars side by side for the groups, in the table's order; whiskers where `curves` has bands."""
    with styled():
        axes = axes or new_axes()[0]
        ticks = list(dict.fromkeys(data[x]))
        groups = _groups(data, group)
        width = 0.8 / max(len(groups), 1)
        for index, (label, part) in enumerate(groups):
            part = part.set_index(x).reindex(ticks)
            at = np.arange(len(ticks)) + (index - (len(groups) - 1) / 2) * width
            axes.bar(at, part[y], width * 0.92, color=COLOURS[index % len(COLOURS)], label=label)
            if {lo, hi} <= {*part}:
                spread = np.abs([part[y] - part[lo], part[hi] - part[y]])
                axes.errorbar(at, part[y], spread, fmt="none", ecolor=INK, capsize=3, lw=1.4)
        if reference is not None:
            axes.axhline(reference, color=SOFT, linewidth=1.2)
        axes.grid(visible=False, axis="x")
        if y_limits != (None, None):
            axes.set_ylim(*y_limits)
        _name_ticks(axes, "x", ticks)
        _finish(axes, title, x_label, y_label or y, labels=_labels(data, group))
        return _told(axes, title, y_label or y, alt_text.of_bars(data, x, y, group))


def heat_map(
    data: pd.DataFrame,
    x: str,
    y: str,
    value: str,
    *,
    title: str = "",
    x_label: str | None = None,
    y_label: str | None = None,
    value_label: str | None = None,
    centre: int | float | None = None,
    limits: tuple[int | float, int | float] | None = None,
    decimals: int | None = None,
    is_upwards: bool = False,
    axes: Axes | None = None,
) -> Figure:
    """A cell per row of the table; missing cells stay grey.

    With `centre` the colours diverge from it, blue below and red above, equally far both ways.
    `decimals` is for the numbers in the cells; `is_upwards` begins with the lowest row.
    """
    columns, rows = list(dict.fromkeys(data[x])), list(dict.fromkeys(data[y]))
    table = data.pivot(index=y, columns=x, values=value).reindex(index=rows, columns=columns)
    cells = np.ma.masked_invalid(table.to_numpy(dtype=float))
    low, high = limits or ends_of(cells)
    if centre is not None:
        reach = max(abs(high - centre), abs(low - centre)) or 1.0
        low, high = centre - reach, centre + reach
    with styled():
        axes = axes or new_axes(height=max(2.6, 1.4 + 0.34 * len(rows)))[0]
        colours = matplotlib.colormaps["viridis" if centre is None else "RdBu_r"]
        colours = colours.with_extremes(bad="#CCCCCC")
        # Not resampled: an SVG then holds a dot per cell, and scales it without a blur.
        image = axes.imshow(
            cells, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none"
        )
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        _name_ticks(axes, "x", columns)
        _name_ticks(axes, "y", rows)
        if cells.size <= MAX_CELLS_WITH_NUMBERS and len(columns) <= 10:
            _write_numbers(axes, cells, image, decimals)
        if is_upwards:
            axes.invert_yaxis()
        axes.figure.colorbar(image, ax=axes, label=value_label or value, pad=0.02)
        _finish(axes, title, x_label or x, y_label or y, labels=[])
        return _told(axes, title, value_label or value, alt_text.of_map(data, x, y, value))


def _write_numbers(
    axes: Axes, cells: np.ma.MaskedArray[Any, Any], image: Any, decimals: int | None
) -> None:
    for (row, column), number in np.ndenumerate(cells):
        if np.isfinite(number):
            red, green, blue, _ = image.cmap(image.norm(number))
            is_dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            colour = LIGHT_TEXT if is_dark else DARK_TEXT
            if decimals is not None:
                number = round(float(number), decimals) + 0.0  # no minus before a zero
            text = f"{number:.2g}" if abs(number) < 100 else f"{number:.0f}"
            text = text.replace("-", "−")
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=10)


def _groups(data: pd.DataFrame, group: str | None) -> list[tuple[str | None, pd.DataFrame]]:
    if group is None:
        return [(None, data)]
    # In the order of the table: a sort would move colours when a group is missing.
    return [(str(label), part) for label, part in data.groupby(group, sort=False)]


def _labels(data: pd.DataFrame, group: str | None) -> list[str]:
    return [str(label) for label, _ in _groups(data, group)] if group else []


def _name_ticks(axes: Axes, which: str, names: Sequence[Any]) -> None:
    # Long lists show every k-th name, or none could be read.
    step = max(1, -(-len(names) // 16))
    at = list(range(0, len(names), step))
    texts = [str(names[index]) for index in at]
    if which == "y":
        axes.set_yticks(at, texts)
        return
    is_crowded = sum(len(text) + 2 for text in texts) > 44
    turned: dict[str, Any] = {"rotation": 35, "ha": "right"} if is_crowded else {}
    axes.set_xticks(at, texts, **turned)


def _finish(axes: Axes, title: str, x_label: str, y_label: str, *, labels: list[str]) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    # A legend inside the axes would hide curves: it stands above them, as wide as there is room.
    longest = max((len(label) for label in labels), default=0)
    figure = cast(Figure, axes.figure)
    n_columns = max(1, int((figure.get_size_inches()[0] - 0.9) / (0.62 + 0.095 * longest)))
    n_rows = -(-len(labels) // n_columns)
    if title:
        axes.set_title(title, pad=8 + 20 * n_rows)
    if labels:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=min(n_columns, len(labels)),
            borderpad=0.1,
            columnspacing=1.2,
        )


def _told(axes: Axes, title: str, quantity: str, found: str) -> Figure:
    axes.set_label(f"{title}: {quantity}: {found}." if title else f"{quantity}: {found}.")
    return cast(Figure, axes.figure)
