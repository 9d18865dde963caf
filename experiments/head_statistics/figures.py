"""Figures of ``head_statistics``."""

import pandas as pd

from hooked_alm.methods.reading.head_norms import CONTRIBUTION, COSINE, OUTPUT

from ..workbench import figures
from ..workbench.page import Page

NAMES = {OUTPUT: "‖z‖", CONTRIBUTION: "‖W_h z‖", COSINE: "cosine"}
MAPS = {
    CONTRIBUTION: (
        "Head residual contribution norm", "How much each head adds to the residual stream."
    ),
    OUTPUT: ("Head output norm", "How large each head's output is before it is projected."),
    COSINE: (
        "Cosine of each head's contribution with the attention's output",
        "Red heads write along what their layer writes together, blue ones against it.",
    ),
}  # fmt: skip
"""Quantity -> caption of its map, and how to read it."""


def add_head_maps(page: Page, heads: pd.DataFrame) -> None:
    """Adds layers by heads for every quantity: mean above, standard deviation below."""
    for quantity, (caption, how) in MAPS.items():
        name = "Cosine" if quantity == COSINE else caption
        parts = [
            (heads, {"value": f"{quantity}_{what}", "title": f"{name}: {what}", "centre": centre})
            for what, centre in (("mean", 0 if quantity == COSINE else None), ("std", None))
        ]
        drawing = figures.panels(
            figures.heat_map, parts, x="head", y="layer", value_label=NAMES[quantity],
            height=max(2.6, 1.4 + 0.3 * heads.layer.nunique()), is_upwards=True,
        )  # fmt: skip
        shown = heads[["layer", "head", "n", f"{quantity}_mean", f"{quantity}_std"]]
        how = f"{how} Layers from bottom to top."
        page.figure(f"{quantity}_heatmap", drawing, shown, caption, how)


def add_depth(page: Page, layers: pd.DataFrame) -> None:
    """Adds contribution by depth, and how much of it survives the sum over heads."""
    low, high = (layers.kept_mean + sign * layers.kept_std for sign in (-1, 1))
    written = {
        "y": CONTRIBUTION, "lo": f"{CONTRIBUTION}_low", "hi": f"{CONTRIBUTION}_high",
        "title": "What heads write, by depth", "y_label": NAMES[CONTRIBUTION],
    }  # fmt: skip
    kept = {"y": "kept_mean", "title": "How much of it the sum keeps", "y_label": "share"}
    parts = [(layers, written), (layers.assign(low=low, high=high), kept)]
    page.figure(
        "by_depth", figures.panels(figures.curves, parts, x="layer", reference=0), layers,
        "Contributions by depth",
        "Above, the mean over a layer's heads; the band runs from its least head to its largest. "
        "Below, the norm of the attention's output as a share of its heads' norms added up: 1 if "
        "all write in one direction, near 0 if they cancel; the band is ± one standard deviation.",
    )  # fmt: skip
