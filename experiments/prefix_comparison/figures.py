"""Curves, bars and maps of ``prefix_comparison``; source of maps: cards M-002-7 and M-002-8."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.reading.segment_mass import LATEST

from ..workbench import figures
from ..workbench.page import Page
from .settings import PrefixComparisonConfig
from .shards import METRICS, Maps, Shard
from .tables import QUADRANTS, PrefixResults, benefit, compared
from .tokens import ANCHOR_WINDOW

DELTA, JS = "ΔNLL (nats)", "JS (nats)"
LOOKS: dict[str, Any] = {"delta": {"value_label": DELTA, "centre": 0}, "js": {"value_label": JS}}
SHOWN_ITEMS = 60
HOW = "Blue: the first prefix makes the token likelier. Depth 0 are the embeddings."
VACUOUS = 1e-3
"""Nats that left padding may move a loss by; more, and it is no rotary model (M-002-14)."""


# --- Curves and bars


def _add_curves(page: Page, name: str, shown: pd.DataFrame, *texts: str, **options: Any) -> None:
    """Adds a curve per group; the texts are caption, how to read it, and what to bear in mind."""
    page.figure(name, figures.curves(shown, reference=0, **options), shown, *texts)


def add_curves(page: Page, run: PrefixResults) -> None:
    """Adds ΔNLL and JS of every prefix against b, and the divergences of a beside each other."""
    a, b, _ = compared(run)
    curves = run["curves_summary"]
    for metric, name, how in (
        ("delta", "ΔNLL", f"Below 0: the prefix makes the continuation likelier than {b} does."),
        ("js", "JS", "0: the same predictions; ln 2 = 0.69: nothing in common."),
    ):
        _add_curves(
            page, f"curve_{metric}", curves[curves.metric == metric],
            f"{name} by depth, mean over tokens, then items; bands are 95 % intervals", how,
            "Bands hold for each depth, not for all at once.",
            x="depth", group="run", title=f"{name} against {b}", y_label=f"{name} (nats)",
        )  # fmt: skip
    names = {"js": "JS", "kl": f"KL({a}‖{b})", "kl_back": f"KL({b}‖{a})"}
    shown = curves[(curves.run == a) & curves.metric.isin(names)]
    _add_curves(
        page, "curve_kl", shown.assign(which=shown.metric.map(names)),
        "The same difference as JS and as KL",
        "KL grows without bound where one prefix rules a token out, JS does not.",
        "A jump of KL at the last depth alone is a sign that the final norm was applied twice.",
        x="depth", group="which", title="JS beside KL", y_label="nats",
    )  # fmt: skip


def add_quadrants(page: Page, quadrants: pd.DataFrame) -> None:
    """Adds ΔNLL by outcome."""
    _add_curves(
        page, "curve_quadrants",
        quadrants.assign(which=quadrants.quadrant + quadrants.n.map(" (n = {})".format)),
        "ΔNLL by depth and outcome, resampled within each group",
        "G10: only the first prefix succeeds. G10 − G01 is drawn where both have items.",
        x="depth", group="which", title="ΔNLL by outcome", y_label=DELTA,
    )  # fmt: skip


def add_coupling(page: Page, coupling: pd.DataFrame) -> None:
    """Adds the rank correlation of attention and ΔNLL, by layer."""
    if coupling["mean"].isna().all():
        page.note("No continuation has tokens enough for a correlation of attention and ΔNLL.")
        return
    names = {"rho": "as it is", "partial": "given position and class"}
    _add_curves(
        page, "coupling", coupling.assign(which=coupling.kind.map(names)),
        "Correlation over the tokens of an item, averaged over items as Fisher's z",
        "Below 0: tokens that attend to the segment more benefit more.",
        "Both drift along the continuation, which the second curve takes out.",
        x="layer", group="which", title="Attention and ΔNLL", y_label="rank correlation",
    )  # fmt: skip


def _bars(y: str, title: str, y_label: str) -> dict[str, Any]:
    """Options of bars with the interval that goes with a column."""
    return {"y": y, "lo": f"{y}_low", "hi": f"{y}_high", "title": title, "y_label": y_label}


def add_classes(page: Page, classes: pd.DataFrame) -> None:
    """Adds ΔNLL by token class."""
    drawing = figures.bars(classes, "class", reference=0, **_bars("delta", "By token class", DELTA))
    page.figure(
        "classes", drawing, classes, "ΔNLL at the output by class of token", "Means over items."
    )


def add_mass(page: Page, run: PrefixResults) -> None:
    """Adds attention by segment and layer, a panel for each of a and b."""
    both, mass = compared(run)[:2], run["mass_summary"]
    own = mass[mass.run.isin(both)]
    n_drawn = len(figures.COLOURS)
    shown = own[(own.segment != LATEST) & own["mean"].notna()]
    most = shown.groupby("segment")["mean"].mean().nlargest(n_drawn).index
    # Both panels draw the same segments, so that each has one colour.
    cells = pd.MultiIndex.from_product([most, own.layer.unique()], names=["segment", "layer"])
    parts = [shown[shown.run == name].set_index(cells.names).reindex(cells) for name in both]
    drawing = figures.panels(
        figures.curves,
        [(part.reset_index(), {"title": name}) for name, part in zip(both, parts, strict=True)],
        height=4.2, x="layer", group="segment", y_label="attention",
    )  # fmt: skip
    page.figure(
        "mass", drawing, own, "Attention of the predicting positions, by segment",
        "Means over heads, tokens and items. prior_output is the continuation so far; it grows.",
        "Attention is no evidence of use. Density (mass against even attention), mass without the "
        f"sink, and the latest tokens alone stand in the table. Drawn are the {n_drawn} "
        "segments with most attention; a prefix that lacks one has no curve.",
    )  # fmt: skip


def add_runs(page: Page, run: PrefixResults) -> None:
    """Adds what becomes of benefit and attention when the content is exchanged."""
    _, b, segment = compared(run)
    runs = run["runs_summary"]
    parts = [
        (runs[runs.role != "b"], _bars("delta", f"ΔNLL against {b}", DELTA)),
        (runs[runs.n_segment > 0], _bars("mass", f"Attention to {segment}", "attention")),
    ]
    page.figure(
        "interventions", figures.panels(figures.bars, parts, height=4.0, x="run", reference=0),
        runs, f"Every prefix: benefit, and attention to {segment}",
        "Content that matters takes the benefit with it when it goes; attention may stay.",
        "original is the content put in again, token by token; the others have as many tokens.",
    )  # fmt: skip


def add_positions(page: Page, positions: pd.DataFrame) -> None:
    """Adds ΔNLL with lengths matched, and whether left padding was a control at all."""
    if positions.empty:
        page.note("The two prefixes are of one length in every item: there is nothing to match.")
        return
    as_run = positions[["mode"]].assign(how="as run", delta=positions.as_run)
    matched = positions[["mode", "delta", "low", "high"]].assign(how="matched")
    drawing = figures.bars(
        pd.concat([as_run, matched]), "mode", "delta", group="how", title="Lengths matched",
        y_label=DELTA, reference=0,
    )  # fmt: skip
    page.figure(
        "positions", drawing, positions,
        "ΔNLL at the output with the shorter prefix lengthened, on the items it applies to",
        "gap: positions jump before the readout. filler: neutral tokens, attended, at the start.",
        "left_pad is the seed document's control. A rotary model does not see it at all.",
    )  # fmt: skip
    for change in positions.largest_nll_change[positions["mode"] == "left_pad"]:
        what = "its positions are not rotary alone, or its rounding is coarse"
        if change <= VACUOUS:
            what = (
                "as rotary embeddings imply, this model does not see it, and what it leaves "
                "unchanged is no evidence"
            )
        page.note(f"Left padding moves losses at the output by at most {change:.2g} nats: {what}.")
    page.table("Position modes", positions)


# --- Maps


def _add_maps(
    page: Page,
    name: str,
    titled: Mapping[str, pd.DataFrame],
    label: str,
    config: PrefixComparisonConfig,
    *texts: str,
) -> None:
    """Adds a map for each metric of each titled table; settings name the axis that depth is on."""
    is_upwards = config.depth_axis == "y"
    x, y = ("column", "depth") if is_upwards else ("depth", "column")
    labels = {"depth": "depth", "column": label}
    parts = [
        (cells, {"value": metric, "title": title, **LOOKS[metric]})
        for title, cells in titled.items()
        for metric in METRICS
        if metric in cells
    ]
    drawing = figures.panels(
        figures.heat_map, parts, height=_height(parts[0][0].depth.nunique()), x=x, y=y,
        x_label=labels[x], y_label=labels[y], is_upwards=is_upwards,
    )  # fmt: skip
    page.figure(name, drawing, pd.concat(titled.values()), *texts)


def _cells(maps: Float[np.ndarray, "metric depth column"], columns: Sequence[Any]) -> pd.DataFrame:
    """A row per depth and column, with the values of every map, of the first metrics."""
    depth, column = (axis.reshape(-1) for axis in np.indices(maps.shape[1:]))
    values = dict(zip(METRICS, maps.reshape(len(maps), -1).astype(np.float32), strict=False))
    return pd.DataFrame({"depth": depth, "column": np.asarray(columns)[column], **values})


def _height(n_depths: int) -> float:
    """Inches for a map of so many rows."""
    return max(2.6, min(1.4 + 0.2 * n_depths, 6.0))


def add_every_item(page: Page, run: PrefixResults) -> None:
    """Adds depth by item, means over tokens."""
    found = benefit(run).droplevel("group")
    shown = found[:SHOWN_ITEMS]
    first = f" The first {SHOWN_ITEMS} items." if len(shown) < len(found) else ""
    caption = f"Every item: ΔNLL by depth, mean over its tokens.{first}"
    cells = _cells(shown.to_numpy().T[None], list(shown.index))
    _add_maps(page, "items", {"": cells}, "item", run.config, caption, HOW)


def add_item(page: Page, shard: Shard, config: PrefixComparisonConfig) -> None:
    """Adds one item: depth by semantic token."""
    cells = _cells(shard.maps, [f"{k} {text.strip()}" for k, text in enumerate(shard.tokens.shown)])
    caption = f"Item {shard.item} ({shard.quadrant}): depth by token"
    _add_maps(page, f"heatmap__{shard.item}", {"": cells}, "semantic token", config, caption, HOW)


def add_aligned(page: Page, maps: Maps, config: PrefixComparisonConfig) -> None:
    """Adds all items together: by progress, by quadrant, first tokens, and around anchors."""
    if maps.most < 2:
        page.note("No continuation has more than one token to show: maps would be one column.")
        return
    found = {name: one.mean() for (name, group), one in maps.found.items() if group == "all"}
    edges = [f"{(i + 0.5) / config.n_bins:.0%}" for i in range(config.n_bins)]
    _add_maps(
        page, "progress", {"": _cells(found["progress"], edges)},
        "progress through the continuation", config,
        "All items, by progress through the continuation",
        f"{HOW} Means over items, each of the same weight. Grey: no item has a token there.",
    )  # fmt: skip
    _add_by_quadrant(page, maps, edges, config)
    n = min(config.first_k, maps.most)
    _add_maps(
        page, "first_tokens", {"": _cells(found["first"][..., :n], range(n))}, "semantic token",
        config, f"All items, the first {n} tokens",
        f"{HOW} Later columns are means over the longer items only.",
    )  # fmt: skip
    for anchor in (name for name, n in maps.anchored.items() if n):
        cells = _cells(found[anchor], range(*ANCHOR_WINDOW))
        caption = f"Around the {anchor.replace('_', ' ')}: {maps.anchored[anchor]} items have one"
        at = "tokens from the anchor"
        _add_maps(page, f"anchor__{anchor}", {"": cells}, at, config, caption, HOW)


def _add_by_quadrant(
    page: Page, maps: Maps, edges: Sequence[str], config: PrefixComparisonConfig
) -> None:
    titled = {}
    for quadrant in (q for q in QUADRANTS if ("progress", q) in maps.found):
        found = maps.found["progress", quadrant]
        count = found.count[0].reshape(-1).astype(int)
        cells = _cells(found.mean()[:1], edges).assign(quadrant=quadrant, items=count)
        titled[f"{quadrant}, {count.max()} items"] = cells
    _add_maps(
        page, "progress_by_quadrant", titled, "progress", config,
        "By outcome: G10 is where only the first prefix succeeds, G01 where only the second does",
        HOW, "The outcome depends on the same probabilities: a difference between the groups "
        "describes them, and explains nothing.",
    )  # fmt: skip


def add_heads(page: Page, maps: Maps, run: PrefixResults) -> None:
    """Adds layer by head: which heads read the segment."""
    a, _, segment = compared(run)
    values = maps.heads.mean()
    cells = pd.DataFrame(
        [(*at, mass) for at, mass in np.ndenumerate(values)], columns=["layer", "head", "mass"]
    )
    drawing = figures.panels(
        figures.heat_map, [(cells, {})], height=_height(len(values)), x="head", y="layer",
        value="mass", value_label="attention", is_upwards=True,
    )  # fmt: skip
    caption = f"Attention to {segment} by head, under {a}"
    page.figure("heads", drawing, cells, caption, "Mean over tokens and items.")
