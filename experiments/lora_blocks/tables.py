"""The tables of a ``lora_blocks`` run, and what is averaged over their items."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.rank_correlation import spearman

from ..materials.clips import SOUNDS
from ..workbench.intervals import Draws
from ..workbench.results import Results, Row
from .measure import SHAPES, SWITCHES, WAYS
from .settings import LoraBlocksConfig

LoraResults = Results[LoraBlocksConfig]
TABLES = {
    "items": "a clip under an instruction: its lead with and without the adapter, and what going "
    "on from the middle block changes",
    "switched": "an item with one block's update alone on, or alone off: its lead and answer",
    "runs": "an item with the adapter, or without: what is answered",
    "depths": "an item with or without: what a lens reads at a depth",
    "drift": "an item: how far the adapter has moved the stream at a depth",
    "contributions": "an item with or without: lengths and directions of what a block adds",
    "sizes": "an update: its norms",
    "shapley": "an item: a block's share of what the adapter does, over all sets of blocks",
    **SOUNDS,
}
ALIKE = 1e-3
"""Norms that differ by less, of their mean, are as large: fp16 tells numbers apart by as much."""
MAY_LACK = {"shapley": ("item", "clip", "voice", "target", "condition", "block", "value")}


def summarise(run: LoraResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "effects", (effects := block_effects(run))
    yield "block_means", block_means(effects, run)
    yield "best_blocks", best_blocks(effects, run.draws)
    yield "size_ranks", size_ranks(effects, run)
    yield "depth_means", depth_means(run)
    yield "contribution_means", contribution_means(run)


def block_effects(run: LoraResults) -> pd.DataFrame:
    """What each block does in each item.

    ``effect`` in logits, ``total`` of the whole adapter, and ``recovery``, their ratio: NaN where
    the whole adapter moves the item by too little.
    """
    items = run["items"].set_index("item")
    found = run["switched"].copy()
    off, on = (found["item"].map(items[name]) for name in ("lead_off", "lead_on"))
    alone = found["reading"] == "denoise"
    found["effect"] = np.where(alone, found["lead"] - off, on - found["lead"])
    found["total"] = on - off
    moved = found["total"].abs() >= run.config.min_effect
    found["recovery"] = (found["effect"] / found["total"]).where(moved)
    return found


def block_means(effects: pd.DataFrame, run: LoraResults) -> pd.DataFrame:
    """Means over items of every block's recovery and size of effect, and the size of its update."""
    size = block_sizes(run)
    rows: list[Row] = []
    some = effects.assign(moved=effects["effect"].abs())
    for (condition, reading), part in some.groupby(["condition", "reading"], sort=False):
        for measure in ("recovery", "moved"):
            wide = part.pivot(index=["item", "clip"], columns="block", values=measure)
            values, clips = wide.to_numpy(np.float64), [*wide.index.get_level_values("clip")]
            for block, row in zip(wide.columns, run.draws.points(values, clips), strict=True):
                at = {"condition": condition, "reading": reading, "block": block}
                rows.append(
                    {**at, "measure": measure, "frobenius": float(size.get(block, np.nan)), **row}
                )
    return pd.DataFrame(rows)


def block_sizes(run: LoraResults) -> "pd.Series[float]":
    """Frobenius norm of each block's updates together."""
    return (
        run["sizes"].assign(square=lambda t: t["frobenius"] ** 2).groupby("block")["square"].sum()
        ** 0.5
    )


def best_blocks(effects: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """The block with the largest mean recovery in each reading, and how far it is ahead.

    ``lead`` and ``next`` are `Draws.best`'s.
    """
    rows = []
    for reading in SWITCHES:
        some = effects[(effects["reading"] == reading) & effects["recovery"].notna()]
        if some.empty:
            continue
        wide = some.pivot(index=["item", "clip"], columns="block", values="recovery")
        values, clips = wide.to_numpy(np.float64), [*wide.index.get_level_values("clip")]
        best = draws.best(values, clips)
        after = None if best.next is None else wide.columns[best.next]
        rows.append({
            "reading": reading, "block": wide.columns[best.at],
            **draws.row(values[:, best.at], clips),
            "next": after, "lead": best.lead, "lead_low": best.lead_low,
        })  # fmt: skip
    columns = [
        *("reading", "block", "mean", "low", "high", "n", "n_undefined", "n_clusters"),
        *("next", "lead", "lead_low"),
    ]
    return pd.DataFrame(rows, columns=columns)


def size_ranks(effects: pd.DataFrame, run: LoraResults) -> pd.DataFrame:
    """Rank correlation over blocks of an update's size and what it does, and how late that is.

    ``rho``: per item Spearman's of norm and size of effect; NaN if norms are `ALIKE`. ``late``: per
    item the share of what moves towards the whole adapter's answer that blocks of the upper half
    do. Means over items.
    """
    size, rows, half = block_sizes(run), [], run.n_blocks / 2
    are_alike = size.max() - size.min() < ALIKE * size.mean()

    def rho(part: pd.DataFrame) -> float:
        sizes = part["block"].map(size).to_numpy(np.float64)
        return np.nan if are_alike else spearman(sizes, part["effect"].abs().to_numpy())

    for reading in SWITCHES:
        some = effects[(effects["reading"] == reading) & effects["recovery"].notna()]
        by_item: list[Row] = []
        for (item, clip), part in some.groupby(["item", "clip"], sort=False):
            towards = part["recovery"].clip(lower=0).to_numpy()
            upper = part["block"].to_numpy() >= half
            whole = towards.sum()
            by_item.append({
                "item": item, "clip": clip,
                "rho": rho(part),
                "late": towards[upper].sum() / whole if whole > 0 else np.nan,
            })  # fmt: skip
        table = pd.DataFrame(by_item, columns=["item", "clip", "rho", "late"])
        for measure in ("rho", "late"):
            row = run.draws.row(table[measure], [*table["clip"]]) if len(table) else {"n": 0}
            rows.append({"reading": reading, "measure": measure, **row})
    return pd.DataFrame(rows)


def depth_means(run: LoraResults) -> pd.DataFrame:
    """What a lens reads with and without the adapter, and how far the stream is moved, by depth."""
    parts = []
    for way in WAYS:
        for measure in ("lead", "kl", "same"):
            table = run["depths"]
            parts.append(_by(table[table["way"] == way], "depth", measure, run, way=way))
    parts.append(_by(run["drift"], "depth", "share", run, way="adapted"))
    return pd.concat(parts, ignore_index=True)


def contribution_means(run: LoraResults) -> pd.DataFrame:
    """What blocks add, with the adapter, without, and their difference within items."""
    table, keys = run["contributions"], ["item", "clip", "condition", "block"]
    base, adapted = (table[table["way"] == way].set_index(keys)[[*SHAPES]] for way in WAYS)
    ways = {"base": base, "adapted": adapted, "difference": adapted - base}
    return pd.concat([
        _by(part.reset_index(), "block", measure, run, way=way)
        for way, part in ways.items()
        for measure in SHAPES
    ], ignore_index=True)  # fmt: skip


def _by(table: pd.DataFrame, x: str, measure: str, run: LoraResults, *, way: str) -> pd.DataFrame:
    """Means over items by condition and depth or block."""
    rows = []
    for condition, part in table.groupby("condition", sort=False):
        wide = part.pivot(index=["item", "clip"], columns=x, values=measure).astype(float)
        clips = [*wide.index.get_level_values("clip")]
        for at, row in zip(wide.columns, run.draws.points(wide.to_numpy(), clips), strict=True):
            rows.append({"condition": condition, "way": way, "measure": measure, x: at, **row})
    return pd.DataFrame(rows)
