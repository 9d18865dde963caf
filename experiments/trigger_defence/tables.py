"""The tables of a ``trigger_defence`` run, and what is averaged over them.

Source: M-SP-1 to M-SP-5.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ..materials.attack_results import ATTACK_TABLES, attacks
from ..materials.clips import SOUNDS
from ..workbench.intervals import prefixed
from ..workbench.results import Results, Row, having
from .plan import Defence, defences
from .settings import TriggerDefenceConfig

DefenceResults = Results[TriggerDefenceConfig]
TABLES = {
    "sensitivity": "a neuron that is held, or drawn beside them",
    "defences": "an attacked clip under a defence",
    "utility": "a clean clip under a defence",
    **ATTACK_TABLES,
    **SOUNDS,
}
BY = ["defence", "place", "kind", "donor", "percent", "chosen_by"]
"""What tells defences apart whose draws are averaged."""


def summarise(run: DefenceResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "attacks", attacks(run)
    yield "defended", (table := defended(run))
    yield "restored", _means(run, table, ["restored", "recovered", "alarm"])
    yield "costs", (table := costs(run))
    yield "kept_answers", _means(run, table, ["right", "lost", "alarm"])
    chosen = having(run["sensitivity"], chosen_by="sensitive").groupby(["place", "block"])
    yield "blocks", chosen.agg(neurons=("neuron", "size"), score=("score", "sum")).reset_index()


def defended(run: DefenceResults) -> pd.DataFrame:
    """Clips whose attack reached the target, under every defence; draws are averaged.

    ``restored``: the answer is the clean one; ``alarm``: it is another than without the defence;
    ``recovered``: the share of the margin's change by the attack that is undone, NaN where this is
    less than ``min_effect``.
    """
    table = run["defences"]
    table = table[(table.answer_before == table.target) & (table.answer_clean != table.target)]
    change = table.margin_clean - table.margin_before
    is_enough = change.abs() >= run.config.min_effect
    return _by_clip(table.assign(
        restored=(table.answer == table.answer_clean).astype(float),
        recovered=((table.margin - table.margin_before) / change).where(is_enough),
        alarm=(table.answer != table.answer_before).astype(float),
    ), ["restored", "recovered", "alarm"])  # fmt: skip


def costs(run: DefenceResults) -> pd.DataFrame:
    """Clean clips under every defence.

    ``right``: the answer is the clip's label; ``lost``: it was, and is no longer (-1: the other
    way); ``alarm``: it is another than without the defence, a false alarm.
    """
    table = run["utility"]
    right = (table.answer == table.label).astype(float)
    return _by_clip(table.assign(
        right=right, lost=(table.answer_before == table.label) - right,
        alarm=(table.answer != table.answer_before).astype(float),
    ), ["right", "lost", "alarm"])  # fmt: skip


def _by_clip(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return table.groupby([*BY, "clip", "group"], sort=False)[columns].mean().reset_index()


def _means(run: DefenceResults, table: pd.DataFrame, measures: list[str]) -> pd.DataFrame:
    """Means over clips, a row for each defence."""
    rows: list[Row] = []
    for key, part in table.groupby(BY, sort=False):
        rows.append(dict(zip(BY, key, strict=True)) | {"n": len(part)})
        for what in measures:
            rows[-1] |= prefixed(what, run.draws.row(part[what], part.group.tolist()))
    ends = [f"{what}_{end}" for what in measures for end in ("mean", "low", "high")]
    return pd.DataFrame(rows, columns=[*BY, "n", *ends])


def judged_defences(config: TriggerDefenceConfig, *, attacked: bool = True) -> dict[str, Defence]:
    """The defences that claims are about, by name: at the percentage of claims."""
    return {
        one.name: one
        for one in defences(config, attacked=attacked)
        if one.chosen_by == "sensitive" and one.percent in (config.percent, 0.0)
    }


def of(table: pd.DataFrame, defence: Defence) -> pd.DataFrame:
    """The rows of a defence."""
    return table[table.defence == defence.key]


def beyond(run: DefenceResults, defence: Defence, other: Defence) -> dict[str, Any]:
    """How much more one defence restores than another, clip by clip."""
    mine, theirs = (
        of(run["defended"], one).set_index(["clip", "group"]).restored for one in (defence, other)
    )
    found = (mine - theirs).dropna()
    return run.draws.row(found.to_numpy(np.float64), found.index.get_level_values("group").tolist())
