"""The tables of a ``lora_blocks`` run, and what is averaged over their items."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from hooked_alm.methods.adapters.turning import DepthSimilarity
from hooked_alm.methods.statistics.rank_correlation import spearman

from ..materials.clips import SOUNDS
from ..materials.item_curves import means_by
from ..workbench.intervals import Draws
from ..workbench.results import Results, Row, having, parts_by
from .measure import SHAPES, SWITCHES, WAYS
from .settings import LoraBlocksConfig

LoraResults = Results[LoraBlocksConfig]
TABLES = {
    "items": "a clip under an instruction: its lead with and without the adapter, and what going "
    "on from the middle block changes",
    "switched": "an item with one block's update alone on, or alone off: its lead and answer",
    "erased": "an item with the whole adapter, without one block's update, or without those of a "
    "block and all below it: whether the voice is answered, how surely, and its loss",
    "runs": "an item with the adapter, or without: what is answered",
    "depths": "an item with or without: what a lens reads at a depth",
    "drift": "an item: how far the adapter has moved the stream at a depth",
    "contributions": "an item with or without: lengths and directions of what a block adds",
    "sizes": "an update: its norms",
    "spectra": "an update: how many directions of what its first factor writes are used",
    "similarity": "a depth: how alike clips are arranged with the adapter and without",
    "shapley": "an item: a block's share of what the adapter does, over all sets of blocks",
    **SOUNDS,
}
ALIKE = 1e-3
"""Norms that differ by less, of their mean, are as large: fp16 tells numbers apart by as much."""
MAY_LACK = {
    "shapley": ("item", "clip", "voice", "target", "condition", "block", "value"),
    "similarity": DepthSimilarity._fields,
}
ERASURES = {
    "accuracy": "share of items", "confidence": "probability of the answer", "loss": "loss (nats)"
}  # fmt: skip
"""Columns that are never mixed into one, in words."""


def summarise(run: LoraResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "effects", (effects := block_effects(run))
    yield "block_means", block_means(effects, run)
    yield "best_blocks", best_blocks(effects, run.draws)
    yield "size_ranks", size_ranks(effects, run)
    yield "erasure", erasure(run)
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
    found["recovery"] = found["effect"] / found["total"]
    found.loc[found["total"].abs() < run.config.min_effect, "recovery"] = np.nan
    return found


def block_means(effects: pd.DataFrame, run: LoraResults) -> pd.DataFrame:
    """Means over items of every block's recovery and size of effect, and the size of its update."""
    some, by = effects.assign(moved=effects["effect"].abs()), ["condition", "reading"]
    found = means_by(some, ("recovery", "moved"), by, "block", run.draws)
    return found.assign(frobenius=found["block"].map(block_sizes(run)))


def block_sizes(run: LoraResults) -> "pd.Series[float]":
    """Frobenius norm of each block's updates together."""
    squares = run["sizes"].assign(square=lambda t: t["frobenius"] ** 2)
    return squares.groupby("block")["square"].sum() ** 0.5


def best_blocks(effects: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """The block with the largest mean recovery in each reading, and how far it is ahead.

    ``lead`` and ``next`` are `Draws.best`'s.
    """
    rows = []
    for reading in SWITCHES:
        some = having(effects, reading=reading).dropna(subset="recovery")
        if some.empty:
            continue
        wide = some.pivot(index=["item", "clip"], columns="block", values="recovery")
        values, clips = wide.to_numpy(np.float64), [*wide.index.get_level_values("clip")]
        best = draws.best(values, clips)
        after = None if best.next is None else wide.columns[best.next]
        rows.append({
            "reading": reading, "block": wide.columns[best.at],
            **draws.row(values[:, best.at], clips), **best._asdict(), "next": after,
        })  # fmt: skip
    ends = ("mean", "low", "high", "n", "n_undefined", "n_clusters")
    return pd.DataFrame(rows, columns=["reading", "block", *ends, "next", "lead", "lead_low"])


def size_ranks(effects: pd.DataFrame, run: LoraResults) -> pd.DataFrame:
    """Rank correlation over blocks of an update's size and what it does, and how late that is.

    ``rho``: per item Spearman's of norm and size of effect; NaN if norms are `ALIKE`. ``late``: per
    item the share of what moves towards the whole adapter's answer that blocks of the upper half
    do. Means over items.
    """
    size, rows = block_sizes(run), list[Row]()
    are_alike = size.max() - size.min() < ALIKE * size.mean()
    moved = effects.dropna(subset="recovery").assign(size=lambda t: t["block"].map(size))
    for reading in SWITCHES:
        by_item: list[Row] = []
        for who, part in parts_by(having(moved, reading=reading), "item", "clip"):
            towards, upper = part["recovery"].clip(lower=0), part["block"] >= run.n_blocks / 2
            sizes, effect = (part[name].to_numpy(np.float64) for name in ("size", "effect"))
            rho = np.nan if are_alike else spearman(sizes, np.abs(effect))
            late = towards[upper].sum() / towards.sum() if towards.sum() > 0 else np.nan
            by_item.append({**who, "rho": rho, "late": late})
        table = pd.DataFrame(by_item, columns=["item", "clip", "rho", "late"])
        for measure in ("rho", "late"):
            row = run.draws.row(table[measure], [*table["clip"]]) if len(table) else {"n": 0}
            rows.append({"reading": reading, "measure": measure, **row})
    return pd.DataFrame(rows)


def erasure(run: LoraResults) -> pd.DataFrame:
    """Means over items of each column by itself, without a block, or it and all below it (M-LO-4).

    ``whole`` is the mean with the whole adapter.
    """
    found = means_by(run["erased"], [*ERASURES], ["condition", "form"], "block", run.draws)
    keys = ["condition", "measure"]
    whole = having(found, form="whole").set_index(keys)["mean"].rename("whole")
    return having(found, form=["single", "progressive"]).join(whole, on=keys)


def depth_means(run: LoraResults) -> pd.DataFrame:
    """What a lens reads with and without the adapter, and how far the stream is moved, by depth."""
    by, moved = ["condition", "way"], run["drift"].assign(way="adapted")
    read = means_by(run["depths"], ("lead", "kl", "same"), by, "depth", run.draws)
    return pd.concat([read, means_by(moved, ("share",), by, "depth", run.draws)], ignore_index=True)


def contribution_means(run: LoraResults) -> pd.DataFrame:
    """What blocks add, with the adapter, without, and their difference within items."""
    table, keys = run["contributions"], ["item", "clip", "target", "condition", "block"]
    base, adapted = (having(table, way=way).set_index(keys)[[*SHAPES]] for way in WAYS)
    ways = {"base": base, "adapted": adapted, "difference": adapted - base}
    every = pd.concat([part.assign(way=way) for way, part in ways.items()]).reset_index()
    return means_by(every, SHAPES, ["condition", "way"], "block", run.draws)
