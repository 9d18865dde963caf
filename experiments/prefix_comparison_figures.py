"""Figures of ``prefix_comparison``, each with its numbers beside it."""

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from .prefix_comparison_measures import LATEST
from .prefix_comparison_settings import PrefixComparisonConfig
from .prefix_comparison_shards import METRICS, Maps, Shard
from .prefix_comparison_tables import QUADRANTS
from .prefix_comparison_tokens import ANCHOR_WINDOW
from .workbench import figures
from .workbench.figures import COLOURS, new_axes, save_figure
from .workbench.report import Figure, Item, Note
from .workbench.run_folder import RunFolder

LABELS = {"delta": "ΔNLL (nats)", "js": "JS (nats)"}
SHOWN_ITEMS = 60
HOW = "Blue: the first prefix makes the token likelier. Depth 0 are the embeddings."


def depth_map(
    values: Float[np.ndarray, "depth column"],
    columns: list[str],
    metric: str,
    column_label: str,
    config: PrefixComparisonConfig,
    axes: Axes,
    title: str = "",
) -> pd.DataFrame:
    """Draw one map; returns its numbers, a row per cell."""
    depths = np.arange(len(values))
    cells = pd.DataFrame(
        {
            "depth": np.repeat(depths, len(columns)),
            "column": np.tile(columns, len(depths)),
            metric: values.reshape(-1).astype(np.float32),
        }
    )
    is_up = config.depth_axis == "y"
    figures.heat_map(
        cells, "column" if is_up else "depth", "depth" if is_up else "column", metric,
        x_label=column_label if is_up else "depth", y_label="depth" if is_up else column_label,
        value_label=LABELS[metric], centre=0 if metric == "delta" else None, title=title, axes=axes,
    )  # fmt: skip
    if is_up:
        axes.invert_yaxis()
    return cells


def _pair_of_maps(
    folder: RunFolder,
    name: str,
    maps: dict[str, np.ndarray],
    columns: list[str],
    label: str,
    config: PrefixComparisonConfig,
    caption: str,
    how: str,
) -> Figure:
    panels = new_axes(2, height=_height(len(maps["delta"])))
    drawn = [
        depth_map(maps[metric], columns, metric, label, config, axes)
        for metric, axes in zip(METRICS, panels, strict=True)
    ]
    numbers = drawn[0].assign(js=drawn[1]["js"])
    save_figure(folder, name, _drawing(panels[0]), numbers)
    return Figure(name, caption, how)


def _height(n_depths: int) -> float:
    return max(2.6, min(1.4 + 0.2 * n_depths, 6.0))


def item_maps(folder: RunFolder, shard: Shard, config: PrefixComparisonConfig) -> Figure:
    """One item: depth by semantic token."""
    columns = [f"{k} {text.strip()}" for k, text in enumerate(shard.tokens.shown)]
    return _pair_of_maps(
        folder, f"heatmap__{shard.item}", {"delta": shard.delta, "js": shard.js}, columns,
        "semantic token", config, f"Item {shard.item} ({shard.quadrant}): depth by token", HOW,
    )  # fmt: skip


def every_item(
    folder: RunFolder, curves: pd.DataFrame, a: str, config: PrefixComparisonConfig
) -> Figure:
    """Depth by item, means over tokens."""
    own = curves[curves.run == a]
    items = list(dict.fromkeys(own.item))[:SHOWN_ITEMS]
    table = own.pivot(index="depth", columns="item", values="delta")[items]
    axes = new_axes(height=_height(len(table)))[0]
    cells = depth_map(table.to_numpy(), items, "delta", "item", config, axes)
    save_figure(folder, "items", _drawing(axes), cells)
    shown = "" if len(items) == own.item.nunique() else f" The first {len(items)} items."
    caption = f"Every item: ΔNLL by depth, mean over its tokens.{shown}"
    return Figure("items", caption, HOW)


def aligned_maps(folder: RunFolder, maps: Maps, config: PrefixComparisonConfig) -> list[Item]:
    """All items together: by progress, by quadrant, first tokens, and around anchors."""
    if maps.most < 2:
        return [Note("No continuation has more than one token to show: maps would be one column.")]
    edges = [f"{(i + 0.5) / config.n_bins:.0%}" for i in range(config.n_bins)]

    def both(kind: str) -> dict[str, np.ndarray]:
        found = {metric: maps.found[kind, metric, "all"].mean() for metric in METRICS}
        return (
            {metric: values[:, : maps.most] for metric, values in found.items()}
            if (kind == "first")
            else found
        )

    first = [str(k) for k in range(min(config.first_k, maps.most))]
    drawn: list[Item] = [
        _pair_of_maps(
            folder, "progress", both("progress"), edges, "progress through the continuation",
            config, "All items, by progress through the continuation",
            f"{HOW} Means over items, each of the same weight. Grey: no item has a token there.",
        ),
        _quadrant_maps(folder, maps, edges, config),
        _pair_of_maps(
            folder, "first_tokens", both("first"), first,
            "semantic token", config, f"All items, the first {len(first)} tokens",
            f"{HOW} Later columns are means over the longer items only.",
        ),
    ]  # fmt: skip
    offsets = [str(offset) for offset in range(*ANCHOR_WINDOW)]
    for anchor, n in maps.anchored.items():
        if n:
            drawn.append(
                _pair_of_maps(
                    folder,
                    f"anchor__{anchor}",
                    both(anchor),
                    offsets,
                    "tokens from the anchor",
                    config,
                    f"Around the {anchor.replace('_', ' ')}: {n} items have one",
                    HOW,
                )
            )
    return drawn


def _quadrant_maps(
    folder: RunFolder, maps: Maps, edges: list[str], config: PrefixComparisonConfig
) -> Figure:
    present = [q for q in QUADRANTS if ("progress", "delta", q) in maps.found]
    found = [maps.found["progress", "delta", quadrant] for quadrant in present]
    panels = new_axes(len(present), height=_height(len(found[0].total)))
    parts = []
    for quadrant, part, axes in zip(present, found, panels, strict=True):
        n = int(part.count.max())
        cells = depth_map(
            part.mean(), edges, "delta", "progress", config, axes, title=f"{quadrant}, {n} items"
        )
        parts.append(cells.assign(quadrant=quadrant, items=part.count.reshape(-1).astype(int)))
    save_figure(folder, "progress_by_quadrant", _drawing(panels[0]), pd.concat(parts))
    return Figure(
        "progress_by_quadrant",
        "By outcome: G10 is where only the first prefix succeeds, G01 where only the second does",
        HOW,
        "The outcome depends on the same probabilities: a difference between the groups describes "
        "them, and explains nothing.",
    )


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
    for run, axes in zip(runs, panels, strict=True):
        some = own[(own.run == run) & (own.segment != LATEST) & own["mean"].notna()]
        order = some.groupby("segment")["mean"].mean().sort_values(ascending=False)
        some = some[some.segment.isin(order.index[: len(COLOURS)])]
        figures.curves_with_band(
            some, "layer", "mean", lo="low", hi="high", group="segment", title=run,
            y_label="attention", axes=axes,
        )  # fmt: skip
    save_figure(folder, "mass", _drawing(panels[0]), own)
    return Figure(
        "mass",
        "Attention of the predicting positions, by segment",
        "Means over heads, tokens and items. prior_output is the continuation so far; it grows.",
        "Attention is no evidence of use. Density (mass against even attention), mass without the "
        "sink, and the latest tokens alone stand in the table.",
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
    axes = new_axes(height=_height(layers))[0]
    figures.heat_map(cells, "head", "layer", "mass", value_label="attention", axes=axes)
    axes.invert_yaxis()
    save_figure(folder, "heads", _drawing(axes), cells)
    return Figure(
        "heads", f"Attention to {segment} by head, under {a}", "Mean over tokens and items."
    )


def coupling_figure(folder: RunFolder, coupling: pd.DataFrame) -> Figure:
    """Rank correlation of attention and ΔNLL, by layer."""
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
    save_figure(folder, "interventions", _drawing(panels[0]), runs)
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


def _drawing(axes: Axes) -> Drawing:
    found = axes.figure
    assert isinstance(found, Drawing)
    return found
