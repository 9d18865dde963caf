"""What changing units of a class, such as neurons, does to items of this class and of others.

A table of changes has a row per item and set of units: the item's class ``cls``; ``of``, the class
whose units are changed; ``chosen_by``; ``alpha``, how far; and what is measured, beside what it is
without the change: ``{measure}_clean``.

Source: M-ESN-3, M-ESN-4, M-ESN-5.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.statistics.rank_correlation import spearman

from ..workbench.intervals import Draws, prefixed
from ..workbench.results import Row

CHANGES = {"lead": "lead of the right label, logits", "right": "accuracy"}
"""Column of what a change costs -> in words."""


def change_row(
    labels: LabelSet,
    cls: str,
    of: str,
    clean: Float[np.ndarray, " value"],
    changed: Float[np.ndarray, " value"],
) -> Row:
    """What changing the units of a class does to an item, as columns of a table of changes.

    Args:
        labels: that are scored.
        cls: the item's class.
        of: class of the units.
        clean: scores of the labels without the change; further values are left alone.
        changed: with it.
    """
    (right, own), n = (labels.index(one) for one in (cls, of)), len(labels.names)
    before, after = clean[:n], changed[:n]
    return {
        "of": of, "right_clean": float(before.argmax() == right),
        "right": float(after.argmax() == right), "lead_clean": _lead(before, right),
        "lead": _lead(after, right), "said_of": float(after.argmax() == own),
        "lead_of": _lead(after, own),
    }  # fmt: skip


def _lead(scores: Float[np.ndarray, " label"], label: int) -> float:
    """A label's score minus the best other."""
    return float(scores[label] - np.delete(scores, label).max())


def _changes(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for what in CHANGES:
        yield what, table.assign(change=table[what] - table[f"{what}_clean"])


def matrix(table: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """What changing the units of a class changes for items of every class."""
    return pd.concat([
        _means(part, ["chosen_by", "of"], "change", draws).assign(cls=cls, measure=what)
        for what, some in _changes(table)
        for cls, part in some.groupby("cls", sort=False)
    ], ignore_index=True)  # fmt: skip


def _means(table: pd.DataFrame, columns: list[str], value: str, draws: Draws) -> pd.DataFrame:
    """Means over items, a row for each combination of columns; draws of a class are averaged."""
    wide = table.pivot_table(
        index=["item", "group"], columns=columns, values=value, sort=False, dropna=False
    )
    return draws.columns(wide, "group")


def specificity_table(
    table: pd.DataFrame, chosen_by: str, controls: Sequence[str], draws: Draws
) -> pd.DataFrame:
    """Own minus other change, by who chose; of one of them also how far beyond some controls.

    Every class weighs the same. Intervals resample groups.
    """
    parts = []
    for what, some in _changes(table):
        wide = some.assign(whose=np.where(some.of == some.cls, "own", "other")).pivot_table(
            index=["item", "group", "cls", "chosen_by"], columns="whose", values="change",
            sort=False,
        ).reindex(columns=["own", "other"])  # fmt: skip
        # The mean over items is that over classes: each is weighed by how many its class has.
        n_items = wide.groupby(["cls", "chosen_by"]).own.transform("size")
        n_classes = wide.index.get_level_values("cls").nunique()
        n_each = wide.groupby("chosen_by").own.transform("size") / n_classes
        wide = wide.mul(n_each / n_items, axis=0).reset_index()
        wide["difference"] = wide.own - wide.other
        found = _means(wide, ["chosen_by"], "difference", draws).assign(measure=what)
        sides = wide.groupby("chosen_by", sort=False)[["own", "other"]].mean()
        beyond = _beyond(wide, chosen_by, controls, draws)
        parts.append(found.join(sides, on="chosen_by").join(beyond, on="chosen_by"))
    return pd.concat(parts, ignore_index=True)


def _beyond(
    wide: pd.DataFrame, chosen_by: str, controls: Sequence[str], draws: Draws
) -> pd.DataFrame:
    """The difference minus that of every control."""
    by = wide.pivot(index=["item", "group"], columns="chosen_by", values="difference")
    found = draws.columns(-by[[*controls]].sub(by[chosen_by], axis=0), "group")
    row: Row = {}
    for one in found.to_dict("records"):
        row |= prefixed(f"beyond_{one['chosen_by']}", one, main="")
    return pd.DataFrame([row], index=pd.Index([chosen_by], name="chosen_by"))


def dose_means(table: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """What a strength does to items of other classes than the units'.

    ``said_of``: answers that are the units' class; ``lead_of``: its lead; ``right``: accuracy;
    ``kl_rest``: in nats; ``rank``: an item's rank correlation of the lead with the strength.
    """
    ours = table[table.cls != table.of]
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


def second_pass(table: pd.DataFrame, answers: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """What becomes of answers where the units of what was answered first are changed (M-ESN-5).

    No label is needed for it. A row per strength and measure: ``right``, of all items; ``lost``, of
    those that were right; ``won``, of those that were wrong.

    Args:
        table: changes by the units of every class.
        answers: of every ``item`` the ``prediction``.
        draws: of the intervals.
    """
    mine = table[table.of == table.item.map(answers.set_index("item").prediction)]
    if mine.empty:
        return pd.DataFrame(columns=["alpha", "mean", "low", "high", "n", "measure"])
    measures = {
        "right": mine.right,
        "lost": (1 - mine.right).where(mine.right_clean == 1),
        "won": mine.right.where(mine.right_clean == 0),
    }
    keys = {"index": ["item", "group"], "columns": "alpha", "values": "value"}
    return pd.concat([
        draws.columns(mine.assign(value=values).pivot(**keys), "group").assign(measure=name)
        for name, values in measures.items()
    ], ignore_index=True)  # fmt: skip
