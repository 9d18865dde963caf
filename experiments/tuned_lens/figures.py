"""Figures of ``tuned_lens``."""

import numpy as np
import pandas as pd

from ..workbench import figures
from ..workbench.page import Page
from .tables import LENSES

PLACE_NAMES = {"scored": "all scored positions", "readout": "the readout"}
MAX_TRAINING_CURVES = 5
DEPTH = "depth (blocks passed)"


def add_curves(page: Page, depths: pd.DataFrame, value: str, title: str, y: str, how: str) -> None:
    """Adds both lenses by depth, a panel for each of the main places."""
    parts = [
        depths.assign(
            lens=f"{lens} lens",
            mean=depths[f"{value}_{lens}"],
            low=depths[f"{value}_{lens}_low"],
            high=depths[f"{value}_{lens}_high"],
        )
        for lens in LENSES
    ]
    shown = pd.concat(parts)[["place", "depth", "lens", "mean", "low", "high"]]
    shown = shown[shown.place.isin(PLACE_NAMES)]
    drawing = figures.panels(
        figures.curves,
        [(shown[shown.place == at], {"title": f"{title}: {n}"}) for at, n in PLACE_NAMES.items()],
        height=3.2, x="depth", group="lens", x_label=DEPTH, y_label=y,
    )  # fmt: skip
    for axes in drawing.axes:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    page.figure(f"held_out_{value}", drawing, shown, title, how)


def add_places(page: Page, depths: pd.DataFrame) -> None:
    """Adds what is left of the logit lens' distance, by place."""
    below = depths[(depths.depth < depths.depth.max()) & (depths.place != "scored")]
    left = below.kl_tuned / below.kl_logit.where(below.kl_logit > 0)
    shown = below[["place", "depth", "kl_logit", "kl_tuned"]].assign(left=left)
    drawing = figures.heat_map(
        shown, "depth", "place", "left", centre=1, limits=(0, 2), decimals=2,
        title="KL(tuned) / KL(logit)", x_label=DEPTH, y_label="", value_label="share that is left",
    )  # fmt: skip
    page.figure(
        "by_place", drawing, shown, "Where in the prompt the translators help",
        "Blue: closer to the output than the logit lens; 1 is no change; red: farther away. "
        "Above 2 the colour is that of 2.",
    )  # fmt: skip


def add_training(page: Page, training: pd.DataFrame) -> None:
    """Adds the loss by step of some depths."""
    depths = sorted(training.depth.unique())
    chosen = np.linspace(0, len(depths) - 1, min(MAX_TRAINING_CURVES, len(depths))).round()
    some = training[training.depth.isin([depths[int(i)] for i in chosen])]
    shown = some[["step", "depth", "kl"]].assign(curve=[f"depth {k}" for k in some.depth])
    drawing = figures.curves(
        shown, "step", "kl", group="curve", title="Loss by step", y_label="KL (nats)"
    )
    page.figure(
        "training", drawing, shown, "Training",
        "KL(output || lens) on the prompts of each step, before the step. Every depth has a "
        "translator of its own; some are shown.",
    )  # fmt: skip
