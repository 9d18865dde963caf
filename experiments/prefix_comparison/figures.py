"""Curves and bars of ``prefix_comparison``, each with its numbers beside it."""

import numpy as np
import pandas as pd

from ..workbench import figures
from ..workbench.figures import COLOURS, new_axes, save_figure
from ..workbench.report import Figure, Note
from ..workbench.run_folder import RunFolder
from .maps import LABELS, drawing_of, height_of
from .measure import LATEST
from .shards import Maps


def curve_figure(folder: RunFolder, curves: pd.DataFrame, a: str, b: str) -> list[Figure]:
    """ΔNLL and JS of every prefix against b, and the divergences of a beside each other."""
    drawn = []
    for metric, name in (("delta", "ΔNLL"), ("js", "JS")):
        some = curves[curves.metric == metric]
        drawing = figures.curves_with_band(
            some, "depth", "mean", lo="low", hi="high", group="run",
            title=f"{name} against {b}", y_label=LABELS[metric], reference=0,
        )  # fmt: skip
        save_figure(folder, f"curve_{metric}", drawing, some)
        how = (
            f"Below 0: the prefix makes the continuation likelier than {b} does."
            if metric == "delta"
            else "0: the same predictions; ln 2 = 0.69: nothing in common."
        )
        caption = f"{name} by depth, mean over tokens, then items; bands are 95 % intervals"
        drawn.append(
            Figure(
                f"curve_{metric}", caption, how, "Bands hold for each depth, not for all at once."
            )
        )
    some = curves[(curves.run == a) & curves.metric.isin(["js", "kl", "kl_back"])]
    names = {"js": "JS", "kl": f"KL({a}‖{b})", "kl_back": f"KL({b}‖{a})"}
    shown = some.assign(which=some.metric.map(names))
    drawing = figures.curves_with_band(
        shown, "depth", "mean", lo="low", hi="high", group="which", title="JS beside KL",
        y_label="nats", reference=0,
    )  # fmt: skip
    save_figure(folder, "curve_kl", drawing, shown)
    drawn.append(
        Figure(
            "curve_kl",
            "The same difference as JS and as KL",
            "KL grows without bound where one prefix rules a token out, JS does not.",
            "A jump of KL at the last depth alone is a sign that the final norm was applied twice.",
        )
    )
    return drawn


def quadrant_figure(folder: RunFolder, quadrants: pd.DataFrame) -> Figure:
    """ΔNLL by outcome."""
    shown = quadrants.assign(
        which=[f"{q} (n = {n})" for q, n in zip(quadrants.quadrant, quadrants.n, strict=True)]
    )
    drawing = figures.curves_with_band(
        shown, "depth", "mean", lo="low", hi="high", group="which", title="ΔNLL by outcome",
        y_label=LABELS["delta"], reference=0,
    )  # fmt: skip
    save_figure(folder, "curve_quadrants", drawing, quadrants)
    return Figure(
        "curve_quadrants",
        "ΔNLL by depth and outcome, resampled within each group",
        "G10: only the first prefix succeeds. G10 − G01 is drawn where both have items.",
    )


def mass_figure(folder: RunFolder, mass: pd.DataFrame, runs: tuple[str, str]) -> Figure:
    """Attention by segment and layer, a panel for each of a and b."""
    panels = new_axes(2, height=4.2)
    own = mass[mass.run.isin(runs)]
    shown = own[(own.segment != LATEST) & own["mean"].notna()]
    order = shown.groupby("segment")["mean"].mean().sort_values(ascending=False)
    # Both panels draw the same segments, so that each has one colour.
    segments = pd.MultiIndex.from_product([order.index[: len(COLOURS)], own.layer.unique()])
    for run, axes in zip(runs, panels, strict=True):
        some = shown[shown.run == run].set_index(["segment", "layer"]).reindex(segments)
        some = some.rename_axis(["segment", "layer"]).reset_index()
        figures.curves_with_band(
            some, "layer", "mean", lo="low", hi="high", group="segment", title=run,
            y_label="attention", axes=axes,
        )  # fmt: skip
    save_figure(folder, "mass", drawing_of(panels[0]), own)
    return Figure(
        "mass",
        "Attention of the predicting positions, by segment",
        "Means over heads, tokens and items. prior_output is the continuation so far; it grows.",
        "Attention is no evidence of use. Density (mass against even attention), mass without the "
        "sink, and the latest tokens alone stand in the table. Drawn are the "
        f"{len(COLOURS)} segments with most attention; a prefix that lacks one has no curve.",
    )


def heads_figure(folder: RunFolder, maps: Maps, a: str, segment: str) -> Figure:
    """Layer by head: which heads read the segment."""
    values = maps.heads.mean()
    layers, heads = values.shape
    cells = pd.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), heads),
            "head": np.tile(np.arange(heads), layers),
            "mass": values.reshape(-1),
        }
    )
    axes = new_axes(height=height_of(layers))[0]
    figures.heat_map(cells, "head", "layer", "mass", value_label="attention", axes=axes)
    axes.invert_yaxis()
    save_figure(folder, "heads", drawing_of(axes), cells)
    return Figure(
        "heads", f"Attention to {segment} by head, under {a}", "Mean over tokens and items."
    )


def coupling_figure(folder: RunFolder, coupling: pd.DataFrame) -> Figure | Note:
    """Rank correlation of attention and ΔNLL, by layer."""
    if coupling["mean"].isna().all():
        return Note("No continuation has tokens enough for a correlation of attention and ΔNLL.")
    names = {"rho": "as it is", "partial": "given position and class"}
    shown = coupling.assign(which=coupling.kind.map(names))
    drawing = figures.curves_with_band(
        shown, "layer", "mean", lo="low", hi="high", group="which",
        title="Attention and ΔNLL", y_label="rank correlation", reference=0,
    )  # fmt: skip
    save_figure(folder, "coupling", drawing, shown)
    return Figure(
        "coupling",
        "Correlation over the tokens of an item, averaged over items as Fisher's z",
        "Below 0: tokens that attend to the segment more benefit more.",
        "Both drift along the continuation, which the second curve takes out.",
    )


def run_figure(folder: RunFolder, runs: pd.DataFrame, segment: str, b: str) -> Figure:
    """What becomes of benefit and attention when the content is exchanged."""
    panels = new_axes(2, height=4.0)
    figures.bars(
        runs[runs.role != "b"], "run", "delta", lo="delta_low", hi="delta_high",
        title=f"ΔNLL against {b}", y_label=LABELS["delta"], reference=0, axes=panels[0],
    )  # fmt: skip
    figures.bars(
        runs[runs.n_segment > 0], "run", "mass", lo="mass_low", hi="mass_high",
        title=f"Attention to {segment}", y_label="attention", reference=0, axes=panels[1],
    )  # fmt: skip
    save_figure(folder, "interventions", drawing_of(panels[0]), runs)
    return Figure(
        "interventions",
        f"Every prefix: benefit, and attention to {segment}",
        "Content that matters takes the benefit with it when it goes; attention may stay.",
        "original is the content put in again, token by token; the others have as many tokens.",
    )


def class_figure(folder: RunFolder, classes: pd.DataFrame) -> Figure:
    """ΔNLL by token class."""
    drawing = figures.bars(
        classes, "class", "delta", lo="delta_low", hi="delta_high", title="By token class",
        y_label=LABELS["delta"], reference=0,
    )  # fmt: skip
    save_figure(folder, "classes", drawing, classes)
    return Figure("classes", "ΔNLL at the output by class of token", "Means over items.")


def position_figure(folder: RunFolder, positions: pd.DataFrame) -> Figure:
    """ΔNLL with lengths matched."""
    shown = positions.rename(columns={"delta": "matched", "as_run": "as run"})
    long = shown.melt(
        id_vars=["mode"], value_vars=["as run", "matched"], var_name="how", value_name="delta"
    )
    long = long.merge(positions[["mode", "low", "high"]], on="mode")
    long.loc[long.how == "as run", ["low", "high"]] = np.nan
    drawing = figures.bars(
        long, "mode", "delta", lo="low", hi="high", group="how", title="Lengths matched",
        y_label=LABELS["delta"], reference=0,
    )  # fmt: skip
    save_figure(folder, "positions", drawing, positions)
    return Figure(
        "positions",
        "ΔNLL at the output with the shorter prefix lengthened, on the items it applies to",
        "gap: positions jump before the readout. filler: neutral tokens, attended, at the start.",
        "left_pad is the seed document's control. A rotary model does not see it at all.",
    )
