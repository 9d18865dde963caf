"""Maps of ``prefix_comparison``, depth by token or by item; source: cards M-002-7 and M-002-8."""

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from ..workbench import figures
from ..workbench.figures import new_axes, save_figure
from ..workbench.report import Figure, Note, SectionItem
from ..workbench.run_folder import RunFolder
from .settings import PrefixComparisonConfig
from .shards import METRICS, Maps, Shard
from .tables import QUADRANTS
from .tokens import ANCHOR_WINDOW

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
    panels = new_axes(2, height=height_of(len(maps["delta"])))
    drawn = [
        depth_map(maps[metric], columns, metric, label, config, axes)
        for metric, axes in zip(METRICS, panels, strict=True)
    ]
    numbers = drawn[0].assign(js=drawn[1]["js"])
    save_figure(folder, name, drawing_of(panels[0]), numbers)
    return Figure(name, caption, how)


def height_of(n_depths: int) -> float:
    """Inches for a map of so many rows."""
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
    axes = new_axes(height=height_of(len(table)))[0]
    cells = depth_map(table.to_numpy(), items, "delta", "item", config, axes)
    save_figure(folder, "items", drawing_of(axes), cells)
    shown = "" if len(items) == own.item.nunique() else f" The first {len(items)} items."
    caption = f"Every item: ΔNLL by depth, mean over its tokens.{shown}"
    return Figure("items", caption, HOW)


def aligned_maps(
    folder: RunFolder, maps: Maps, config: PrefixComparisonConfig
) -> list[SectionItem]:
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
    drawn: list[SectionItem] = [
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
    panels = new_axes(len(present), height=height_of(len(found[0].total)))
    parts = []
    for quadrant, part, axes in zip(present, found, panels, strict=True):
        n = int(part.count.max())
        cells = depth_map(
            part.mean(), edges, "delta", "progress", config, axes, title=f"{quadrant}, {n} items"
        )
        parts.append(cells.assign(quadrant=quadrant, items=part.count.reshape(-1).astype(int)))
    save_figure(folder, "progress_by_quadrant", drawing_of(panels[0]), pd.concat(parts))
    return Figure(
        "progress_by_quadrant",
        "By outcome: G10 is where only the first prefix succeeds, G01 where only the second does",
        HOW,
        "The outcome depends on the same probabilities: a difference between the groups describes "
        "them, and explains nothing.",
    )


def drawing_of(axes: Axes) -> Drawing:
    """The drawing that the axes belong to."""
    found = axes.figure
    assert isinstance(found, Drawing)
    return found
