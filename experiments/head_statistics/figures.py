"""Figures of ``head_statistics``, each with its numbers beside it."""

import pandas as pd

from ..workbench.figures import curves_with_band, heat_map, new_axes, save_figure
from ..workbench.report import Figure
from ..workbench.run_folder import RunFolder
from .measure import CONTRIBUTION, COSINE, OUTPUT

NAMES = {OUTPUT: "‖z‖", CONTRIBUTION: "‖W_h z‖", COSINE: "cosine"}
CAPTIONS = {
    OUTPUT: "Head output norm",
    CONTRIBUTION: "Head residual contribution norm",
    COSINE: "Cosine of each head's contribution with the attention's output",
}


def figures(folder: RunFolder, heads: pd.DataFrame, layers: pd.DataFrame) -> list[Figure]:
    """All of them, saved, in the order of the report."""
    return [
        *(head_map(folder, heads, name) for name in (CONTRIBUTION, OUTPUT, COSINE)),
        depth_curves(folder, layers),
    ]


def head_map(folder: RunFolder, heads: pd.DataFrame, quantity: str) -> Figure:
    """Layer by head: mean above, standard deviation below."""
    n_layers = int(heads["layer"].max()) + 1
    panels = new_axes(2, height=max(2.6, 1.4 + 0.3 * n_layers))
    for what, axes in zip(("mean", "std"), panels, strict=True):
        is_signed = quantity == COSINE and what == "mean"
        drawing = heat_map(
            heads, "head", "layer", f"{quantity}_{what}",
            title=f"{CAPTIONS[quantity]}: {what}" if quantity != COSINE else f"Cosine: {what}",
            value_label=NAMES[quantity], centre=0 if is_signed else None, axes=axes,
        )  # fmt: skip
        axes.invert_yaxis()
    name = f"{quantity}_heatmap"
    columns = ["layer", "head", "n", f"{quantity}_mean", f"{quantity}_std"]
    save_figure(folder, name, drawing, heads[columns])
    how = {
        OUTPUT: "How large each head's output is before it is projected.",
        CONTRIBUTION: "How much each head adds to the residual stream.",
        COSINE: "Red heads write along what their layer writes together, blue ones against it.",
    }[quantity]
    return Figure(name, CAPTIONS[quantity], f"{how} Layers from bottom to top.")


def depth_curves(folder: RunFolder, layers: pd.DataFrame) -> Figure:
    """Contribution by depth, and how much of it survives the sum over heads."""
    panels = new_axes(2)
    curves_with_band(
        layers, "layer", CONTRIBUTION, lo=f"{CONTRIBUTION}_low", hi=f"{CONTRIBUTION}_high",
        title="What heads write, by depth", y_label=NAMES[CONTRIBUTION], reference=0,
        axes=panels[0],
    )  # fmt: skip
    shown = layers.assign(
        low=layers.kept_mean - layers.kept_std, high=layers.kept_mean + layers.kept_std
    )
    drawing = curves_with_band(
        shown, "layer", "kept_mean", lo="low", hi="high", title="How much of it the sum keeps",
        y_label="share", reference=0, axes=panels[1],
    )  # fmt: skip
    save_figure(folder, "by_depth", drawing, layers)
    return Figure(
        "by_depth",
        "Contributions by depth",
        "Above, the mean over a layer's heads; the band runs from its least head to its largest. "
        "Below, the norm of the attention's output as a share of its heads' norms added up: 1 if "
        "all write in one direction, near 0 if they cancel; the band is ± one standard deviation.",
    )
