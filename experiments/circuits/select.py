"""Which nodes and paths count: chosen on some groups of pairs, tested on the others.

Pairs of a group are averaged first, so that what is counted as evidence are groups. Every cell has
a sign-flip test over groups; the cells of a contrast are one family, whose false discovery rate is
held by Benjamini and Hochberg's procedure.

Source: Benjamini and Hochberg 1995; ``scipy.stats.false_discovery_control``.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from hooked_alm.methods.statistics.significance import Alternative, sign_flip_test

from .plan import CircuitNode
from .settings import CircuitsConfig

CELL = ["direction", "place", "layer", "head"]
PATH = ["mode", "sender", "receiver", "place"]


def group_means(rows: pd.DataFrame, keys: Sequence[str], value: str = "toward") -> pd.DataFrame:
    """Mean of each group (columns) in each cell (rows, in order of appearance)."""
    means = rows.groupby([*keys, "group"], sort=False)[value].mean()
    return means.unstack("group", sort=False).sort_index(axis=1)


def cell_tests(
    rows: pd.DataFrame, keys: Sequence[str], *, seed: int, sides: pd.Series | None = None
) -> pd.DataFrame:
    """Mean, p and q of every cell.

    Args:
        rows: ``toward`` by cell, pair and group; every cell with the same groups.
        keys: columns that name a cell.
        seed: of the sign flips, where they are too many to go through.
        sides: per cell, 1 or −1: the side of zero that is tested. None tests both.

    Returns:
        A row per cell: its keys, ``mean``, ``share_positive`` (of groups), ``n_groups``, ``p`` and
        ``q``. Where all groups are zero p is 1: the patch cannot reach the answer, and the cell is
        no hypothesis, left out of the family (q is NaN).
    """
    means = group_means(rows, keys)
    found = means.index.to_frame(index=False)
    values = means.to_numpy(np.float64)
    found["mean"] = values.mean(axis=1)
    found["share_positive"] = (values > 0).mean(axis=1)
    found["n_groups"] = values.shape[1]
    wanted = np.zeros(len(means)) if sides is None else sides.to_numpy()
    names: dict[float, Alternative] = {0: "two-sided", 1: "greater", -1: "less"}
    found["p"] = [
        _p(cell, seed, names[side]) for cell, side in zip(values, wanted.tolist(), strict=True)
    ]
    found["q"] = q_values(found["p"].to_numpy(), (values != 0).any(axis=1))
    return found


def _p(values: np.ndarray, seed: int, alternative: Alternative) -> float:
    if len(values) < 2 or not values.any():
        return 1.0
    return sign_flip_test(values, seed=seed, alternative=alternative).p


def q_values(p: np.ndarray, is_hypothesis: np.ndarray) -> np.ndarray:
    """Smallest false discovery rate at which each is rejected; NaN for what is no hypothesis."""
    q = np.full(len(p), np.nan)
    if is_hypothesis.any():
        q[is_hypothesis] = false_discovery_control(p[is_hypothesis])
    return q


def node_cells(nodes: pd.DataFrame, config: CircuitsConfig) -> pd.DataFrame:
    """Every cell of every contrast on the discovery pairs: mean, p, q, and whether it is found."""
    parts = []
    for contrast, rows in nodes[nodes.part == "discovery"].groupby("contrast", sort=False):
        cells = cell_tests(rows, CELL, seed=config.seed)
        cells.insert(0, "contrast", contrast)
        parts.append(cells)
    cells = pd.concat(parts, ignore_index=True)
    cells["found"] = (cells.q <= config.fdr) & (cells["mean"].abs() >= config.min_effect)
    return cells


def winners(cells: pd.DataFrame, config: CircuitsConfig) -> pd.DataFrame:
    """The found nodes of every contrast that carry it, largest first; heads, then MLPs.

    A node stands there by its largest cell that moves the answer towards the donor's. Nodes that
    only oppose it are in ``node_cells``; a circuit of them would not bring the answer.
    """
    found = cells[cells.found & (cells["mean"] > 0)]
    order = found["mean"].sort_values(ascending=False, kind="stable").index
    best = found.loc[order].drop_duplicates(["contrast", "layer", "head"])
    parts = [best.iloc[:0]]
    for contrast in cells.contrast.unique():
        of_contrast = best[best.contrast == contrast]
        parts.append(of_contrast[of_contrast["head"] >= 0].head(config.n_heads))
        parts.append(of_contrast[of_contrast["head"] < 0].head(config.n_mlps))
    chosen = pd.concat(parts, ignore_index=True)
    names = [node.label for node in nodes_of(chosen)]
    chosen.insert(1, "node", pd.Series(names, dtype=object))
    return chosen


def nodes_of(table: pd.DataFrame) -> list[CircuitNode]:
    """The nodes of a table, in its order."""
    return [
        CircuitNode(int(layer), int(head))
        for layer, head in zip(table["layer"], table["head"], strict=True)
    ]


def confirm(chosen: pd.DataFrame, rows: pd.DataFrame, config: CircuitsConfig) -> pd.DataFrame:
    """The winners again, on the held-out pairs: one-sided, in the direction that was found."""
    return _confirmed(chosen, rows, CELL, config)


def top_paths(paths: pd.DataFrame, config: CircuitsConfig) -> pd.DataFrame:
    """The paths that move the answer most on the discovery pairs, tested on the held-out ones."""
    parts = []
    for contrast, rows in paths[paths.part == "discovery"].groupby("contrast", sort=False):
        cells = group_means(rows, PATH)
        means = cells.mean(axis=1).rename("mean").reset_index()
        means.insert(0, "contrast", contrast)
        means = means[means["mean"] != 0]
        order = means["mean"].abs().sort_values(ascending=False, kind="stable").index
        parts.append(means.loc[order].groupby("mode", sort=False).head(config.n_paths))
    if not parts:
        return pd.DataFrame(columns=["contrast", *PATH, "mean", *CONFIRMED])
    return _confirmed(pd.concat(parts, ignore_index=True), paths, PATH, config)


CONFIRMED = ("held_out_mean", "held_out_p", "held_out_q", "n_held_out", "confirmed")


def _confirmed(
    chosen: pd.DataFrame, rows: pd.DataFrame, keys: Sequence[str], config: CircuitsConfig
) -> pd.DataFrame:
    held_out = rows[rows.part == "held-out"]
    parts = [chosen.iloc[:0].assign(**dict.fromkeys(CONFIRMED))]
    for contrast, some in chosen.groupby("contrast", sort=False):
        of_contrast = some[[*keys]].merge(
            held_out[held_out.contrast == contrast], on=list(keys), how="left", sort=False
        )
        again = cell_tests(of_contrast, keys, seed=config.seed, sides=np.sign(some["mean"]))
        again = again.rename(
            columns={
                "mean": "held_out_mean", "p": "held_out_p", "q": "held_out_q",
                "n_groups": "n_held_out",
            }
        )  # fmt: skip
        again["confirmed"] = again.held_out_q <= config.fdr
        parts.append(some.merge(again[[*keys, *CONFIRMED]], on=list(keys), how="left"))
    return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
