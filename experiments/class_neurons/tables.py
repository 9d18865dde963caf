"""The tables of a ``class_neurons`` run, and what is made of them.

Source: M-ESN-3, M-ESN-4, M-ESN-6, M-ESN-7, M-ESN-8.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd

from hooked_alm.methods.neurons.sets import NEURON_CONTROLS, SELECTORS
from hooked_alm.methods.statistics.class_neurons import Neuron
from hooked_alm.methods.statistics.neuron_sets import (
    blocks_of,
    jaccard,
    jaccard_by_chance,
    overlap,
    spread_over_blocks,
)
from hooked_alm.methods.statistics.rank_correlation import spearman

from ..materials.clips import SOUNDS
from ..workbench.intervals import Draws, prefixed
from ..workbench.results import Results, Row
from .settings import OUT, ClassNeuronsConfig

NeuronResults = Results[ClassNeuronsConfig]
TABLES = {
    "answers": "an item as asked: its class, and what is answered",
    "logs": "a file with what neurons of some items did, and its hash",
    "neurons": "a neuron of a class, by a selector, or drawn at random beside it",
    "blocks": "a block, and the mean square of its neurons",
    "doses": "an item with the neurons of a class at a strength",
    "drive": "a conflict: what another audio and another instruction do to neurons",
    **SOUNDS,
}
MAY_LACK = {
    "drive": [
        *("item", "clip", "group", "cls", "voice", "named", "chosen_by", "toward"),
        *("effect_audio", "effect_text", "share"),
    ]
}  # fmt: skip
CHANGES = {"lead": "lead of the right label, logits", "right": "accuracy"}
"""Column of what taking neurons out changes -> in words."""


def summarise(run: NeuronResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    draws = run.draws
    taken_out = run["doses"][run["doses"].alpha == OUT]
    yield "classes", classes(run["answers"])
    yield "matrix", matrix(taken_out, draws)
    yield "specificity", specificity_table(taken_out, run.config.selector, draws)
    yield "dose_means", dose_means(run, draws)
    yield "layers", layers(run)
    yield "overlaps", overlaps(run)
    yield "drive_means", drive_means(run, draws)


def classes(answers: pd.DataFrame) -> pd.DataFrame:
    """Items of every class and half: how many are right, and how many were logged."""
    found = answers.groupby(["half", "cls"], sort=True).agg(
        n_items=("item", "size"), n_groups=("group", "nunique"), n_right=("right", "sum"),
        n_logged=("logged", "sum"),
    )  # fmt: skip
    return found.reset_index().astype({"n_right": int, "n_logged": int})


def matrix(taken_out: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """What taking the neurons of a class out changes for items of every class."""
    parts = []
    for what in CHANGES:
        some = taken_out.assign(change=taken_out[what] - taken_out[f"{what}_clean"])
        for cls, part in some.groupby("cls", sort=False):
            found = _means(part, ["chosen_by", "of"], "change", draws)
            parts.append(found.assign(cls=cls, measure=what))
    return pd.concat(parts, ignore_index=True)


def _means(table: pd.DataFrame, columns: list[str], value: str, draws: Draws) -> pd.DataFrame:
    """Means over items, a row for each combination of columns; draws of a class are averaged."""
    wide = table.pivot_table(
        index=["item", "group"], columns=columns, values=value, sort=False, dropna=False
    )
    groups = wide.index.get_level_values("group").tolist()
    found = draws.points(wide.to_numpy(np.float64), groups)
    return pd.concat([wide.columns.to_frame(index=False), pd.DataFrame(found)], axis=1)


def specificity_table(taken_out: pd.DataFrame, selector: str, draws: Draws) -> pd.DataFrame:
    """Own minus other change, by who chose; of the run's selector also how far beyond random ones.

    Every class weighs the same. Intervals resample groups.
    """
    parts = []
    for what in CHANGES:
        some = taken_out.assign(change=taken_out[what] - taken_out[f"{what}_clean"])
        some["whose"] = np.where(some.of == some.cls, "own", "other")
        keys = ["item", "group", "cls", "chosen_by"]
        wide = some.pivot_table(index=keys, columns="whose", values="change", sort=False)
        wide = wide.reindex(columns=["own", "other"])
        # The mean over items is that over classes: each is weighed by how many its class has.
        n_items = wide.groupby(["cls", "chosen_by"]).own.transform("size")
        n_classes = wide.index.get_level_values("cls").nunique()
        n_each = wide.groupby("chosen_by").own.transform("size") / n_classes
        wide = wide.mul(n_each / n_items, axis=0).reset_index()
        wide["difference"] = wide.own - wide.other
        found = _means(wide, ["chosen_by"], "difference", draws).assign(measure=what)
        sides = wide.groupby("chosen_by", sort=False)[["own", "other"]].mean()
        found = found.join(sides, on="chosen_by")
        found = found.join(_beyond(wide, selector, draws), on="chosen_by")
        parts.append(found)
    return pd.concat(parts, ignore_index=True)


def _beyond(wide: pd.DataFrame, selector: str, draws: Draws) -> pd.DataFrame:
    """The selector's difference minus that of every kind of random neurons."""
    by = wide.pivot(index=["item", "group"], columns="chosen_by", values="difference")
    values = by[[selector]].to_numpy() - by[[*NEURON_CONTROLS]].to_numpy()
    found = draws.points(values, by.index.get_level_values("group").tolist())
    row: Row = {}
    for control, one in zip(NEURON_CONTROLS, found, strict=True):
        row |= prefixed(f"beyond_{control}", one, main="")
    return pd.DataFrame([row], index=pd.Index([selector], name="chosen_by"))


def dose_means(run: NeuronResults, draws: Draws) -> pd.DataFrame:
    """What a strength does to judged items of other classes than the neurons'.

    ``said_of``: answers that are the neurons' class; ``lead_of``: its lead; ``right``: accuracy;
    ``kl_rest``: in nats; ``rank``: an item's rank correlation of the lead with the strength.
    """
    doses = run["doses"]
    ours = doses[(doses.chosen_by == run.config.selector) & (doses.cls != doses.of)]
    parts = [
        _means(ours, ["alpha"], what, draws).assign(measure=what)
        for what in ("said_of", "lead_of", "right", "kl_rest")
    ]
    curves = ours.pivot(index=["item", "group", "of"], columns="alpha", values="lead_of")
    alphas = curves.columns.to_numpy(np.float64)
    ranks = [spearman(alphas, one) for one in curves.to_numpy(np.float64)]
    found = draws.row(ranks, curves.index.get_level_values("group").tolist())
    parts.append(pd.DataFrame([{"alpha": np.nan, **found, "measure": "rank"}]))
    return pd.concat(parts, ignore_index=True)


def lists_of(neurons: pd.DataFrame) -> dict[tuple[str, str], list[Neuron]]:
    """Neurons by selector and class."""
    selected = neurons[neurons.chosen_by.isin(SELECTORS)]
    return {
        (str(chosen_by), str(cls)): [*zip(part.block.tolist(), part.neuron.tolist(), strict=True)]
        for (chosen_by, cls), part in selected.groupby(["chosen_by", "cls"], sort=False)
    }


def layers(run: NeuronResults) -> pd.DataFrame:
    """Neurons of every block, by selector, beside what both nulls have, and the p of each."""
    rows: list[Row] = []
    n_blocks = run.n_blocks
    nulls = {"uniform": np.ones(n_blocks), "activity": run["blocks"].activity.to_numpy()}
    lists = lists_of(run["neurons"])
    for selector in SELECTORS:
        chosen = sorted({at for (by, _), some in lists.items() if by == selector for at in some})
        counts = blocks_of(chosen, n_blocks)
        tests = {
            f"p_{name}": spread_over_blocks(counts, weights, seed=run.config.seed).p
            for name, weights in nulls.items()
        }
        for block in range(n_blocks):
            expected = {
                name: len(chosen) * weights[block] / weights.sum()
                for name, weights in nulls.items()
            }
            rows.append({"chosen_by": selector, "block": block, "neurons": int(counts[block]),
                         **expected, **tests})  # fmt: skip
    return pd.DataFrame(rows)


def overlaps(run: NeuronResults) -> pd.DataFrame:
    """What two selectors' neurons of a class share, and what one selector's of two classes do."""
    lists, sizes = lists_of(run["neurons"]), run.inputs["neurons"]
    n_neurons = sizes["blocks"] * sizes["each"]
    rows = []
    for a, b in combinations(lists, 2):
        if a[0] == b[0] or a[1] == b[1]:
            found = overlap(lists[a], lists[b], n_neurons)
            rows.append({
                "chosen_by": a[0], "cls": a[1], "other_chosen_by": b[0], "other_cls": b[1],
                "shared": found.shared, "expected": found.expected, "p": found.p,
                "jaccard": jaccard(lists[a], lists[b]),
                "by_chance": jaccard_by_chance(run.config.rate),
            })  # fmt: skip
    columns = ["chosen_by", "cls", "other_chosen_by", "other_cls", "shared", "expected", "p",
               "jaccard", "by_chance"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def drive_means(run: NeuronResults, draws: Draws) -> pd.DataFrame:
    """Mean effects of both exchanges and the audio's share, by who chose the neurons."""
    rows = [
        {"chosen_by": chosen_by, "measure": what, **draws.row(part[what], part.group.tolist())}
        for chosen_by, part in run["drive"].groupby("chosen_by", sort=False)
        for what in ("effect_audio", "effect_text", "share")
    ]
    columns = ["chosen_by", "measure", "mean", "low", "high", "n", "n_undefined", "n_clusters"]
    return pd.DataFrame(rows, columns=columns)
