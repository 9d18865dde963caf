"""Figures of ``circuits``, each with its numbers beside it."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D

from hooked_alm.points import hook_name

from ..workbench import figures
from ..workbench.figures import COLOURS, LINES, new_axes, save_figure, styled
from ..workbench.report import Figure
from ..workbench.run_folder import RunFolder
from .plan import EMBED, CircuitNode, Direction
from .select import nodes_of
from .settings import PLACES

# In the order of the settings, which is that of the other figures.
PLACE_COLOURS: dict[str, str] = {
    place: colour for place, colour in zip(PLACES, COLOURS, strict=False)
}
IN_A_PROMPT = ("audio", "text", "struct", "readout")
HOW: dict[Direction, str] = {
    "noising": "The base's run is patched with the donor's: what is necessary for the answer.",
    "denoising": "The donor's run is patched with the base's: what is enough to bring it back.",
}


def effects_figure(folder: RunFolder, effects: pd.DataFrame, unit: str) -> Figure:
    """Total effect of every contrast."""
    drawing = figures.bars(
        effects, "contrast", "mean", lo="low", hi="high", title="Total effect of the exchange",
        x_label="what is exchanged", y_label=unit, reference=0,
    )  # fmt: skip
    save_figure(folder, "total_effects", drawing, effects)
    return Figure(
        "total_effects",
        "How far the exchange moves the answer",
        "The metric of the base minus that of the donor, mean over pairs; bars are 95 % intervals "
        "over groups.",
    )


def node_maps(
    folder: RunFolder, means: pd.DataFrame, contrast: str, direction: Direction, unit: str
) -> Figure:
    """Layer by head, a panel for each place, the same scale in all."""
    some = means[(means.contrast == contrast) & (means.direction == direction)]
    heads = some[some["head"] >= 0].sort_values(["layer", "head"])
    places = list(dict.fromkeys(some.place))
    reach = float(heads.toward.abs().max()) or 1.0
    n_layers = int(heads.layer.max()) + 1
    panels = new_axes(len(places), height=max(2.6, 1.4 + 0.3 * n_layers))
    for place, axes in zip(places, panels, strict=True):
        figures.heat_map(
            _rounded(heads[heads.place == place]), "head", "layer", "toward", centre=0,
            limits=(-reach, reach), title=f"at the {place}", value_label=unit, axes=axes,
        )  # fmt: skip
        axes.invert_yaxis()
    name = f"heads__{contrast}__{direction}"
    save_figure(folder, name, _drawing(panels[0]), heads)
    return Figure(
        name,
        f"Heads of {contrast}, {direction}",
        f"{HOW[direction]} Mean over all pairs of how far the patched head moves the metric "
        "towards the donor's answer; red moves it there, blue away. Layers from bottom to top.",
        "At the last layer only the readout can reach the answer.",
    )


def mlp_figure(folder: RunFolder, means: pd.DataFrame, contrast: str, unit: str) -> Figure:
    """Effect of patching each MLP, by layer, place and direction."""
    some = means[(means.contrast == contrast) & (means["head"] < 0)]
    directions = list(dict.fromkeys(some.direction))
    panels = new_axes(len(directions))
    for direction, axes in zip(directions, panels, strict=True):
        figures.curves_with_band(
            some[some.direction == direction], "layer", "toward", group="place",
            title=str(direction), y_label=unit, reference=0, axes=axes,
        )  # fmt: skip
    name = f"mlps__{contrast}"
    save_figure(folder, name, _drawing(panels[0]), some)
    return Figure(
        name,
        f"MLPs of {contrast}",
        "As the maps of heads, for each MLP's output: mean over all pairs.",
    )


def direct_figure(folder: RunFolder, direct: pd.DataFrame, contrast: str, unit: str) -> Figure:
    """Layer by head: what reaches the logits directly, and through MLPs alone."""
    some = direct[(direct.contrast == contrast) & (direct.direction == "noising")]
    means = some.groupby(["mode", "sender"], sort=False).toward.mean().reset_index()
    parts = means.sender.str.extract(r"blocks\.(\d+)\.attn\.hook_z\[(\d+)\]")
    means["layer"], means["head"] = pd.to_numeric(parts[0]), pd.to_numeric(parts[1])
    heads = means.dropna(subset=["layer"]).astype({"layer": int, "head": int})
    reach = float(heads.toward.abs().max()) or 1.0
    modes = {"edge": "edge: the residual stream alone", "ioi": "ioi: and through MLPs"}
    panels = new_axes(2, height=max(2.6, 1.4 + 0.3 * (int(heads.layer.max()) + 1)))
    for (mode, title), axes in zip(modes.items(), panels, strict=True):
        figures.heat_map(
            _rounded(heads[heads["mode"] == mode]), "head", "layer", "toward", centre=0,
            limits=(-reach, reach), title=title, value_label=unit, axes=axes,
        )  # fmt: skip
        axes.invert_yaxis()
    name = f"direct__{contrast}"
    save_figure(folder, name, _drawing(panels[0]), means)
    return Figure(
        name,
        f"Direct effects of {contrast}, noising",
        "What each head tells the logits at the readout, heads in between frozen.",
    )


def reads_figure(folder: RunFolder, reads: pd.DataFrame, contrast: str, unit: str) -> Figure | None:
    """Where the winning heads take it from: keys and values, by place."""
    some = reads[(reads.contrast == contrast) & reads.input.isin(["k", "v"])]
    if some.empty:
        return None
    keys = ["layer", "head", "place"]
    per_pair = some.groupby([*keys, "pair"], sort=False).toward.sum().reset_index()
    means = per_pair.groupby(keys, sort=False).toward.mean().reset_index()
    means["node"] = [node.label for node in nodes_of(means)]
    drawing = figures.bars(
        means, "node", "toward", group="place", title=f"Read by the heads of {contrast}",
        y_label=unit, reference=0,
    )  # fmt: skip
    name = f"reads__{contrast}"
    save_figure(folder, name, drawing, means)
    return Figure(
        name,
        f"Where the heads of {contrast} read",
        "All that a head's keys and values read at one place is exchanged (noising; the two "
        "exchanges added). Heads in the order of their effect.",
        "Attention alone would not show this: what is attended to may not matter.",
    )


def faithfulness_figure(folder: RunFolder, shares: pd.DataFrame, contrast: str) -> Figure | None:
    """The circuit alone, and the model without it."""
    some = shares[shares.contrast == contrast]
    if some.empty:
        return None
    drawing = figures.bars(
        some, "what", "mean", lo="low", hi="high", group="circuit", reference=0,
        title=f"Is the circuit of {contrast} enough?", y_label="share of the total effect",
    )  # fmt: skip
    drawing.axes[0].axhline(1, color="#555555", linewidth=1.0, linestyle=":")
    name = f"faithfulness__{contrast}"
    save_figure(folder, name, drawing, some)
    return Figure(
        name,
        f"Faithfulness and completeness, {contrast}",
        "alone: every edge outside the circuit comes from the donor's run; 1 is the whole model. "
        "removed: the circuit's own edges come from it; 0 is no effect left. Held-out pairs, 95 % "
        "intervals over groups.",
        "Random circuits have as many heads and MLPs.",
    )


# --- The picture


def circuit_picture(
    folder: RunFolder,
    contrast: str,
    chosen: pd.DataFrame,
    top: pd.DataFrame,
    direct: pd.DataFrame,
    *,
    n_layers: int,
    n_heads: int,
    unit: str,
) -> Figure:
    """Layers bottom to top: the winning nodes, the largest paths between them, and the logits."""
    nodes = nodes_of(chosen)
    edges = pd.concat([_drawn_paths(top), _drawn_direct(direct, nodes, contrast)])
    at = {node.sender: _spot(node, n_heads) for node in nodes}
    drawn = {*edges.place, "readout"}
    places = [place for place in IN_A_PROMPT if place in drawn]
    for i, place in enumerate(places):
        at[f"{EMBED} {place}"] = ((i + 0.5) * (n_heads + 1) / len(places) - 0.5, -1.3)
    at["logits"] = (n_heads / 2, n_layers + 0.4)
    with styled():
        axes = new_axes(1, height=max(4.5, 1.8 + 0.5 * n_layers))[0]
        most = max(float(edges.toward.abs().max()), 1e-9) if len(edges) else 1.0
        for edge in edges.itertuples():
            _draw_edge(axes, at[edge.start], at[edge.stop], edge.toward / most, edge.place)
        for node, row in zip(nodes, chosen.itertuples(), strict=True):
            _draw_node(axes, at[node.sender], node.label, is_confirmed=bool(row.confirmed))
        for place in places:
            _draw_box(axes, at[f"{EMBED} {place}"], place, PLACE_COLOURS[place])
        _draw_box(axes, at["logits"], "logits", "#333333")
        _frame(axes, n_layers, n_heads, places)
        axes.set_title(f"The circuit of {contrast}", pad=10)
    name = f"circuit__{contrast}"
    save_figure(folder, name, _drawing(axes), edges)
    return Figure(
        name,
        f"The circuit of {contrast}",
        "Nodes are the winning heads and MLPs; a full outline is confirmed on held-out pairs, a "
        "dashed one not. Lines are the largest paths into followed heads, and direct effects on "
        f"the logits; their width is the effect (widest: {most:.2g} {unit}), their colour the "
        "position where the message is read, dashed those that move the answer the other way. "
        "Boxes below are the embeddings of each span.",
    )


def _drawn_paths(top: pd.DataFrame) -> pd.DataFrame:
    """The largest paths of the first mode that was measured."""
    some = top[top["mode"] == top["mode"].iloc[0]] if len(top) else top
    embed = some.sender == EMBED
    receivers = some.receiver.str.extract(r"blocks\.(\d+)\.attn\.hook_[qkv]_input\[(\d+)\]")
    stops = [
        f"{hook_name('z', f'blocks.{layer}')}[{head}]"
        for layer, head in zip(receivers[0], receivers[1], strict=True)
    ]
    return pd.DataFrame(
        {
            "start": some.sender.where(~embed, EMBED + " " + some.place),
            "stop": stops,
            "receiver": some.receiver,
            "place": some.place,
            "toward": some["mean"].astype(float),
        }
    )


def _drawn_direct(direct: pd.DataFrame, nodes: list[CircuitNode], contrast: str) -> pd.DataFrame:
    names = [node.sender for node in nodes]
    some = direct[(direct.contrast == contrast) & (direct.direction == "noising")]
    some = some[(some["mode"] == "edge") & some.sender.isin(names)]
    means = some.groupby("sender", sort=False).toward.mean()
    means = means[means != 0]
    return pd.DataFrame(
        {
            "start": means.index,
            "stop": "logits",
            "receiver": "logits",
            "place": "readout",
            "toward": means.to_numpy(),
        }
    )


def _spot(node: CircuitNode, n_heads: int) -> tuple[float, float]:
    if node.head < 0:
        return n_heads + 0.2, node.layer + 0.35
    return float(node.head), float(node.layer)


def _draw_edge(
    axes: Axes, start: tuple[float, float], stop: tuple[float, float], share: float, place: str
) -> None:
    axes.annotate(
        "", stop, start, zorder=1,
        arrowprops={
            "arrowstyle": "-|>", "shrinkA": 11, "shrinkB": 11, "mutation_scale": 11,
            "color": PLACE_COLOURS[place], "lw": 0.7 + 5.0 * abs(share), "alpha": 0.75,
            "linestyle": LINES[0] if share > 0 else LINES[1], "connectionstyle": "arc3,rad=0.08",
        },
    )  # fmt: skip


def _draw_node(axes: Axes, at: tuple[float, float], label: str, *, is_confirmed: bool) -> None:
    style = {"ec": "#222222", "lw": 1.8, "ls": "-" if is_confirmed else "--", "fc": "white"}
    box = {"boxstyle": "round,pad=0.28", **style}
    axes.text(*at, label.replace("MLP ", "M"), ha="center", va="center", fontsize=9, bbox=box)


def _draw_box(axes: Axes, at: tuple[float, float], label: str, colour: str) -> None:
    box = {"boxstyle": "square,pad=0.35", "fc": colour, "ec": "none"}
    axes.text(*at, label, ha="center", va="center", fontsize=10, color="white", bbox=box)


def _frame(axes: Axes, n_layers: int, n_heads: int, places: list[str]) -> None:
    axes.set_xlim(-0.9, n_heads + 0.9)
    axes.set_ylim(-1.9, n_layers + 0.9)
    step = max(1, n_layers // 16)
    axes.set_yticks(range(0, n_layers, step))
    axes.set_xticks([*range(0, n_heads, max(1, n_heads // 8)), n_heads + 0.2])
    axes.set_xticklabels([*(str(h) for h in range(0, n_heads, max(1, n_heads // 8))), "MLP"])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    lines = [Line2D([], [], color=PLACE_COLOURS[place], lw=3) for place in places]
    axes.legend(
        lines, [f"read at the {place}" for place in places],
        loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=10,
    )  # fmt: skip


def _rounded(cells: pd.DataFrame) -> pd.DataFrame:
    """For the numbers in the cells; the file beside the figure has all digits."""
    return cells.assign(toward=cells.toward.round(2) + 0.0)


def _drawing(axes: Axes) -> Drawing:
    found = axes.figure
    assert isinstance(found, Drawing)
    return found


def mean_effects(nodes: pd.DataFrame) -> pd.DataFrame:
    """Mean over pairs of every cell, and of its recovery where that is defined."""
    keys = ["contrast", "direction", "place", "layer", "head"]
    grouped = nodes.groupby(keys, sort=False)
    found = grouped.agg(
        toward=("toward", "mean"), recovery=("recovery", "mean"), n=("toward", "size")
    )
    undefined = grouped["recovery"].agg(lambda values: int(np.isnan(values).sum()))
    return found.assign(n_undefined=undefined).reset_index()
