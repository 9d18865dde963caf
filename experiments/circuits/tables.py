"""Summaries of a ``circuits`` run: which nodes and paths count, and what their circuits keep.

Nodes and paths are chosen on some groups of pairs and tested on the others. Pairs of a group are
averaged first, so that what is counted as evidence are groups. Every cell has a sign-flip test over
groups; the cells of a contrast are one family, whose false discovery rate is held by Benjamini and
Hochberg's procedure.

Source: Benjamini and Hochberg 1995; ``scipy.stats.false_discovery_control``.
"""

from collections.abc import Iterator, Sequence
from itertools import starmap

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from hooked_alm.methods.statistics.significance import Alternative, sign_flip_test

from ..materials.clips import MEASURED, SOUNDS
from ..workbench.intervals import Draws
from ..workbench.results import Results, parts_by
from .plan import MLP, CircuitNode
from .settings import CircuitsConfig

CircuitResults = Results[CircuitsConfig]
TABLES = {
    "pairs": "a pair: its answers, as given and as made, and the metric of both prompts",
    "nodes": "a head or MLP of a pair, patched at a place in a direction",
    "direct": "what a node tells the logits of a pair, in a direction, by a kind of path",
    "paths": "what a node tells a winning head of a pair at a place",
    "reads": "an input (q, k or v) of a winning head of a pair, exchanged whole at a place",
    "circuit": "a circuit on a held-out pair, alone or removed",
    **SOUNDS,
}
WHO = ("pair", "contrast", "group", "part")
MAY_LACK = {
    "paths": (*WHO, "mode", "sender", "receiver", "place", "toward", "noise"),
    "reads": (*WHO, "layer", "head", "input", "place", "toward"),
    "circuit": (*WHO, "circuit", "what", "n_edges", "value", "share"),
    "sounds": ("clip", *MEASURED),
}
"""Tables that a run without winners, or without clips, leaves empty."""
CELL = ["contrast", "direction", "place", "layer", "head"]
PATH = ["contrast", "mode", "sender", "receiver", "place"]
SIDES: dict[float, Alternative] = {0: "two-sided", 1: "greater", -1: "less"}
CONFIRMED = [
    *("held_out_mean", "held_out_noise", "held_out_p", "held_out_q", "n_held_out", "confirmed"),
]


def summarise(run: CircuitResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary, by the name of its file."""
    nodes, config = run["nodes"], run.config
    cells = node_cells(nodes, config)
    yield "effects", total_effects(run["pairs"], run.draws)
    yield "node_means", node_means(nodes)
    yield "node_cells", cells
    yield "winners", confirmed(winners(cells, config), nodes, CELL, config)
    yield "top_paths", confirmed(top_paths(run["paths"], config), run["paths"], PATH, config)
    yield "faithfulness", faithfulness(run["circuit"], run.draws)


def of(table: pd.DataFrame, contrast: str) -> pd.DataFrame:
    """The rows of one contrast."""
    return table[table.contrast == contrast].reset_index(drop=True)


def total_effects(pairs: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """How far the exchange moves the metric, and how often the answers are those given."""
    as_given = pairs[["base_as_given", "donor_as_given"]].mean(axis=1)
    rates = as_given.groupby(pairs.contrast, sort=False).mean().to_numpy()
    return _means(pairs, ["contrast"], "total_effect", draws).assign(answers_as_given=rates)


def _means(table: pd.DataFrame, keys: list[str], value: str, draws: Draws) -> pd.DataFrame:
    """Mean of a column with its 95 % interval over groups, by the keys."""
    rows = [
        names | draws.row(some[value], some.group.tolist())
        for names, some in parts_by(table, *keys)
    ]
    columns = [*keys, "mean", "low", "high", "n", "n_undefined", "n_clusters"]
    return pd.DataFrame(rows, columns=columns).rename(columns={"n_clusters": "n_groups"})


def node_means(nodes: pd.DataFrame) -> pd.DataFrame:
    """Mean over pairs of every cell, and of its recovery where that is defined."""
    cells = nodes.assign(is_undefined=nodes.recovery.isna()).groupby(CELL, sort=False)
    return cells.agg(
        toward=("toward", "mean"),
        recovery=("recovery", "mean"),
        n=("toward", "size"),
        n_undefined=("is_undefined", "sum"),
    ).reset_index()


def pair_shares(circuit: pd.DataFrame) -> pd.DataFrame:
    """What the circuit and, on average, random ones keep of the total effect of each pair."""
    some = circuit[circuit.circuit != "every edge"]
    some = some.assign(circuit=some.circuit.str.split(" ").str[0])
    keys = ["contrast", "circuit", "what", "pair", "group"]
    return some.groupby(keys, sort=False)[["share", "n_edges"]].mean().reset_index()


def faithfulness(circuit: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """Share of the total effect that a circuit keeps alone, and that is left without it."""
    shares, keys = pair_shares(circuit), ["contrast", "circuit", "what"]
    n_edges = shares.groupby(keys, sort=False).n_edges.mean().to_numpy()
    return _means(shares, keys, "share", draws).assign(n_edges=n_edges)


# --- What is chosen, and tested again


def group_means(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean effect of each group (columns) in each cell (rows, in order of appearance)."""
    means = rows.groupby([*keys, "group"], sort=False).toward.mean()
    return means.unstack("group", sort=False).sort_index(axis=1)


def cell_tests(
    rows: pd.DataFrame, keys: Sequence[str], *, seed: int, sides: pd.Series | None = None
) -> pd.DataFrame:
    """Mean, p and q of every cell.

    Args:
        rows: ``toward`` and ``noise`` by cell, pair and group; every cell with the same groups.
        keys: columns that name a cell.
        seed: of the sign flips, where they are too many to go through.
        sides: per cell, 1 or −1: the side of zero that is tested. None tests both.

    Returns:
        A row per cell: its keys, ``mean``, ``noise`` (standard error of the mean by rounding
        alone), ``share_positive`` (of groups), ``n_groups``, ``p`` and ``q``. Where all groups are
        zero p is 1: the patch cannot reach the answer, and the cell is no hypothesis, left out of
        the family (q is NaN).
    """
    means = group_means(rows, keys)
    values = means.to_numpy(np.float64)
    wanted = np.zeros(len(means)) if sides is None else sides.to_numpy()
    is_hypothesis = (values != 0).any(axis=1)
    p = np.ones(len(values))
    if values.shape[1] > 1:
        for i in np.flatnonzero(is_hypothesis):
            p[i] = sign_flip_test(values[i], seed=seed, alternative=SIDES[wanted[i]]).p
    noise = rows.assign(square=rows.noise**2).groupby([*keys], sort=False).square
    return means.index.to_frame(index=False).assign(
        mean=values.mean(axis=1),
        noise=np.sqrt(noise.mean() / noise.size()).reindex(means.index).to_numpy(),
        share_positive=(values > 0).mean(axis=1),
        n_groups=values.shape[1],
        p=p,
        q=q_values(p, is_hypothesis),
    )


def q_values(p: np.ndarray, is_hypothesis: np.ndarray) -> np.ndarray:
    """Smallest false discovery rate at which each is rejected; NaN for what is no hypothesis."""
    q = np.full(len(p), np.nan)
    if is_hypothesis.any():
        q[is_hypothesis] = false_discovery_control(p[is_hypothesis])
    return q


def node_cells(nodes: pd.DataFrame, config: CircuitsConfig) -> pd.DataFrame:
    """Every cell of every contrast on the discovery pairs: mean, p, q, and whether it is found."""
    by_contrast = nodes[nodes.part == "discovery"].groupby("contrast", sort=False)
    parts = [cell_tests(rows, CELL, seed=config.seed) for _, rows in by_contrast]
    cells = pd.concat(parts, ignore_index=True)
    enough = np.maximum(config.min_effect, 2 * cells.noise)
    cells["found"] = (cells.q <= config.fdr) & (cells["mean"].abs() >= enough)
    return cells


def winners(cells: pd.DataFrame, config: CircuitsConfig) -> pd.DataFrame:
    """The found nodes of every contrast that carry it, largest first; heads, then MLPs.

    A node stands there by its largest cell that moves the answer towards the donor's. Nodes that
    only oppose it are in ``node_cells``; a circuit of them would not bring the answer.
    """
    found = cells[cells.found & (cells["mean"] > 0)]
    order = np.lexsort((-found["mean"], found["head"] == MLP, pd.factorize(found.contrast)[0]))
    best = found.iloc[order].drop_duplicates(["contrast", "layer", "head"])
    is_mlp = best["head"] == MLP
    rank = best.groupby(["contrast", is_mlp]).cumcount()
    chosen = best[rank < np.where(is_mlp, config.n_mlps, config.n_heads)].reset_index(drop=True)
    chosen.insert(1, "node", pd.Series([x.label for x in nodes_of(chosen)], dtype=object))
    return chosen


def nodes_of(table: pd.DataFrame) -> list[CircuitNode]:
    """The nodes of a table, in its order."""
    return list(starmap(CircuitNode, table[["layer", "head"]].astype(int).to_numpy().tolist()))


def top_paths(paths: pd.DataFrame, config: CircuitsConfig) -> pd.DataFrame:
    """The paths of every contrast and mode that move the answer most on the discovery pairs."""
    found = group_means(paths[paths.part == "discovery"], PATH)
    means = found.mean(axis=1).rename("mean").reset_index()
    means = means[means["mean"] != 0]
    order = np.lexsort((-means["mean"].abs(), pd.factorize(means.contrast)[0]))
    top = means.iloc[order].groupby(["contrast", "mode"], sort=False).head(config.n_paths)
    return top.reset_index(drop=True)


def confirmed(
    chosen: pd.DataFrame, rows: pd.DataFrame, keys: Sequence[str], config: CircuitsConfig
) -> pd.DataFrame:
    """Chosen cells again, on the held-out pairs: one-sided, in the direction that was found."""
    held_out = rows[rows.part == "held-out"]
    names = {"n_groups": "n_held_out"} | {k: f"held_out_{k}" for k in ("mean", "noise", "p", "q")}
    parts = [chosen.iloc[:0].assign(**dict.fromkeys(CONFIRMED))]
    for _, some in chosen.groupby("contrast", sort=False):
        again = some[[*keys]].merge(held_out, on=list(keys), how="left", sort=False)
        tests = cell_tests(again, keys, seed=config.seed, sides=np.sign(some["mean"]))
        tests = tests.rename(columns=names)
        is_sure = tests.held_out_q <= config.fdr
        tests["confirmed"] = is_sure & (tests.held_out_mean.abs() >= 2 * tests.held_out_noise)
        parts.append(some.merge(tests[[*keys, *CONFIRMED]], on=list(keys), how="left"))
    return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
