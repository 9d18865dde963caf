"""Figures of ``circuits``."""

from typing import Any, cast

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..materials.exchange import DIRECTIONS, PLACES
from ..materials.head_maps import draw_head_maps
from ..workbench import figures
from ..workbench.page import Page
from .plan import EMBED, LOGITS, MLP, heads_named
from .tables import CircuitResults, nodes_of, of

# In the order of the settings, which is that of the other figures.
PLACE_COLOURS = dict(zip(map(str, PLACES), figures.COLOURS, strict=False))
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
IN_A_PROMPT = ("audio", "text", "struct", "readout")
HOW = {
    "noising": "The base's run is patched with the donor's: what is necessary for the answer.",
    "denoising": "The donor's run is patched with the base's: what is enough to bring it back.",
}
KINDS_OF_PATHS = {"edge": "edge: the residual stream alone", "ioi": "ioi: and through MLPs"}


def add_effects(page: Page, run: CircuitResults) -> None:
    """Adds the total effect of every contrast."""
    drawing = figures.bars(
        run["effects"], "contrast", title="Total effect of the exchange",
        x_label="what is exchanged", y_label=f"effect ({run.config.unit})", reference=0,
    )  # fmt: skip
    page.figure(
        "total_effects", drawing, run["effects"], "How far the exchange moves the answer",
        "The metric of the base minus that of the donor, mean over pairs; bars are 95 % intervals "
        "over groups.",
    )  # fmt: skip


def _maps(run: CircuitResults, parts: dict[str, pd.DataFrame], every: pd.Series) -> Figure:
    """Layer by head, a panel for each part, on the scale of every effect to compare with."""
    return draw_head_maps(parts, every, run.n_blocks, unit=run.config.unit)


def add_heads(page: Page, run: CircuitResults, contrast: str) -> None:
    """Adds a map of the heads' effects for each direction, a panel for each place."""
    every = run["node_means"][run["node_means"]["head"] != MLP]
    means = of(every, contrast)
    for direction in DIRECTIONS:
        some = means[means.direction == direction].sort_values(["layer", "head"])
        maps = {f"at the {at}": part for at, part in some.groupby("place", sort=False)}
        page.figure(
            f"heads__{contrast}__{direction}", _maps(run, maps, every.toward), some,
            f"Heads of {contrast}, {direction}",
            f"{HOW[direction]} Mean over all pairs of how far the patched head moves the metric "
            "towards the donor's answer; red moves it there, blue away, on one scale in all "
            "maps of heads. Layers from bottom to top.",
            "At the last layer only the readout can reach the answer.",
        )  # fmt: skip


def add_mlps(page: Page, run: CircuitResults, contrast: str) -> None:
    """Adds the effect of patching each MLP, by layer, place and direction."""
    means = of(run["node_means"], contrast)
    mlps = means[means["head"] == MLP]
    drawing = figures.panels(
        figures.curves, [(mlps[mlps.direction == one], {"title": one}) for one in DIRECTIONS],
        x="layer", y="toward", group="place", y_label=f"effect ({run.config.unit})", reference=0,
    )  # fmt: skip
    page.figure(
        f"mlps__{contrast}", drawing, mlps, f"MLPs of {contrast}",
        "As the maps of heads, for each MLP's output: mean over all pairs.",
    )  # fmt: skip


def add_direct(page: Page, run: CircuitResults, contrast: str) -> None:
    """Adds what reaches the logits from each head, directly, and through MLPs alone."""
    some = run["direct"][run["direct"].direction == "noising"]
    every = some.groupby(["contrast", "mode", "sender"], sort=False).toward.mean().reset_index()
    every = every.join(heads_named(every.sender)[["layer", "head"]])
    heads = every.dropna(subset="head").astype({"layer": int, "head": int})
    means, own = of(every, contrast), of(heads, contrast)
    maps = {title: own[own["mode"] == mode] for mode, title in KINDS_OF_PATHS.items()}
    page.figure(
        f"direct__{contrast}", _maps(run, maps, heads.toward), means,
        f"Direct effects of {contrast}, noising",
        "What each head tells the logits at the readout, heads in between frozen.",
    )  # fmt: skip


def add_reads(page: Page, run: CircuitResults, contrast: str) -> None:
    """Adds where the winning heads take it from: keys and values, by place."""
    some = of(run["reads"], contrast)
    some = some[some.input.isin(["k", "v"])]
    if some.empty:
        return
    keys = ["layer", "head", "place"]
    per_pair = some.groupby([*keys, "pair"], sort=False).toward.sum().reset_index()
    means = per_pair.groupby(keys, sort=False).toward.mean().reset_index()
    means["node"] = [node.label for node in nodes_of(means)]
    drawing = figures.bars(
        means, "node", "toward", group="place", title=f"Read by the heads of {contrast}",
        y_label=f"effect ({run.config.unit})", reference=0,
    )  # fmt: skip
    page.figure(
        f"reads__{contrast}", drawing, means, f"Where the heads of {contrast} read",
        "All that a head's keys and values read at one place is exchanged (noising; the two "
        "exchanges added). Heads in the order of their effect.",
        "Attention alone would not show this: what is attended to may not matter.",
    )  # fmt: skip


def add_faithfulness(page: Page, run: CircuitResults, contrast: str) -> None:
    """Adds the circuit alone, and the model without it."""
    some = of(run["faithfulness"], contrast)
    drawing = figures.bars(
        some, "what", group="circuit", reference=0,
        title=f"Is the circuit of {contrast} enough?", y_label="share of the total effect",
    )  # fmt: skip
    drawing.axes[0].axhline(1, color=figures.SOFT, linewidth=1.0, linestyle=":")
    page.figure(
        f"faithfulness__{contrast}", drawing, some, f"Faithfulness and completeness, {contrast}",
        "alone: every edge outside the circuit comes from the donor's run; 1 is the whole model. "
        "removed: the circuit's own edges come from it; 0 is no effect left. Held-out pairs, 95 % "
        "intervals over groups.",
        "Random circuits have as many heads and MLPs.",
    )  # fmt: skip


# --- The picture


def add_circuit(page: Page, run: CircuitResults, contrast: str) -> None:
    """Adds the winning nodes, layers bottom to top, the largest paths between them, the logits."""
    edges = _edges(run, contrast)
    largest = max(float(edges.toward.abs().max()), 1e-9) if len(edges) else 1.0
    with figures.styled():
        axes = figures.new_axes(height=max(4.5, 1.8 + 0.5 * run.n_blocks))[0]
        at = _draw_nodes(axes, run, contrast, {*edges.place, "readout"})
        for edge in edges.itertuples():
            style = {
                "arrowstyle": "-|>", "shrinkA": 11, "shrinkB": 11, "mutation_scale": 11,
                "color": PLACE_COLOURS[edge.place], "lw": 0.7 + 5.0 * abs(edge.toward / largest),
                "ls": "-" if edge.toward > 0 else "--", "connectionstyle": "arc3,rad=0.08",
                "alpha": 0.75,
            }  # fmt: skip
            axes.annotate("", at[edge.stop], at[edge.start], arrowprops=style, zorder=1)
        axes.set_title(f"The circuit of {contrast}", pad=10)
        axes.set_label(_in_words(run, contrast, edges))
    page.figure(
        f"circuit__{contrast}", cast(Figure, axes.figure), edges, f"The circuit of {contrast}",
        "Nodes are the winning heads and MLPs; a full outline is confirmed on held-out pairs, a "
        "dashed one not. Lines are the largest paths into followed heads, and direct effects on "
        f"the logits; their width is the effect (widest: {largest:.2g} {run.config.unit}), their "
        "colour the position where the message is read, dashed those that move the answer the "
        "other way. Boxes below are the embeddings of each span.",
    )  # fmt: skip


def _in_words(run: CircuitResults, contrast: str, edges: pd.DataFrame) -> str:
    chosen = of(run["winners"], contrast)
    names = ", ".join(node.label for node in nodes_of(chosen))
    text = f"{names}; {chosen.confirmed.sum()} of these {len(chosen)} are confirmed."
    if edges.empty:
        return text
    edge = edges.loc[edges.toward.abs().idxmax()]
    return f"{text} The widest line, {edge.toward:.2g}, goes from {edge.start} to {edge.stop}."


def _edges(run: CircuitResults, contrast: str) -> pd.DataFrame:
    """The largest paths of the first mode that was measured, and direct effects of the winners."""
    top, direct = of(run["top_paths"], contrast), of(run["direct"], contrast)
    paths = top[top["mode"] == run.config.path_modes[0]]
    paths = paths.assign(
        start=paths.sender.where(paths.sender != EMBED, EMBED + " " + paths.place),
        stop=[head.sender for head in nodes_of(heads_named(paths.receiver))],
        toward=paths["mean"].astype(float),
    )
    senders = [node.sender for node in nodes_of(of(run["winners"], contrast))]
    own = direct[direct.sender.isin(senders) & (direct["mode"] == "edge")]
    means = own[own.direction == "noising"].groupby("sender", sort=False).toward.mean()
    told = means[means != 0].rename_axis("start").reset_index()
    told = told.assign(stop=LOGITS, receiver=LOGITS, place="readout")
    columns = ["start", "stop", "receiver", "place", "toward"]
    return pd.concat([paths, told], ignore_index=True)[columns]


def _draw_nodes(
    axes: Axes, run: CircuitResults, contrast: str, drawn: set[str]
) -> dict[str, tuple[float, float]]:
    """Draws winners, the embeddings of the places that are drawn, and logits; where each stands."""
    chosen, n_layers = of(run["winners"], contrast), run.n_blocks
    n_heads = run.inputs["model"]["heads"]
    places = [place for place in IN_A_PROMPT if place in drawn]
    boxes = [(LOGITS, (n_heads / 2, n_layers + 0.4), LOGITS, "#333333")]
    for i, place in enumerate(places):
        spot, colour = ((i + 0.5) * (n_heads + 1) / len(places) - 0.5, -1.3), PLACE_COLOURS[place]
        boxes.append((f"{EMBED} {place}", spot, place, colour))
        axes.plot([], [], color=colour, lw=3, label=f"read at the {place}")
    for _, spot, text, colour in boxes:
        box: dict[str, Any] = {"boxstyle": "square,pad=0.35", "fc": colour, "ec": "none"}
        axes.text(*spot, text, **CENTRED, fontsize=10, color=figures.LIGHT_TEXT, bbox=box)
    at = {name: spot for name, spot, _, _ in boxes}
    for node, is_confirmed in zip(nodes_of(chosen), chosen.confirmed, strict=True):
        in_row = (float(node.head), float(node.layer))
        at[node.sender] = in_row if node.is_head else (n_heads + 0.2, node.layer + 0.35)
        box = {"boxstyle": "round,pad=0.28", "ec": figures.INK, "lw": 1.8, "fc": figures.PAPER}
        box["ls"] = "-" if is_confirmed else "--"
        label = node.label.replace("MLP ", "M")
        axes.text(*at[node.sender], label, **CENTRED, fontsize=9, bbox=box)
    heads = range(0, n_heads, max(1, n_heads // 8))
    axes.set(
        xlim=(-0.9, n_heads + 0.9), ylim=(-1.9, n_layers + 0.9), xlabel="head", ylabel="layer",
        yticks=range(0, n_layers, max(1, n_layers // 16)), xticks=[*heads, n_heads + 0.2],
        xticklabels=[*map(str, heads), "MLP"],
    )  # fmt: skip
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=10)
    return at
