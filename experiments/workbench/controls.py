"""Controls: what must come out if the measurements of a run are what they claim to be."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .results import Results

PASS, FAIL, SKIPPED = "pass", "FAIL", "not applicable"
ROUNDING = {
    "logit": {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1},
    "relative": {"float32": 1e-4, "float16": 5e-3, "bfloat16": 1e-2},
    "share": {"float32": 1e-4, "float16": 1e-4, "bfloat16": 1e-4},
    "nat": {"float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-6},
}
"""Largest difference between two roads to the same number, by its unit and the model's dtype.

``logit``: the fast engine multiplies other numbers of rows at once than a whole run does, by other
kernels, and attends in two parts. ``relative``: sums of what parts of the model wrote against the
whole, which it rounds to its dtype (half a unit of bf16 is 4e-3). ``share``: attention that adds up
to 1, in fp32 over thousands of keys whatever the dtype. ``nat``: divergences, in fp32 likewise.
"""


class Outcome(NamedTuple):
    """What a control found."""

    found: str
    expected: str
    passed: bool | None
    """None where the run has nothing that the control applies to."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """One thing that must come out, whatever the answer to the experiment's question is."""

    name: str
    of: tuple[str, ...]
    """Measured tables that it vouches for, or claims by name: what rests on them falls with it."""
    guards_against: str
    """The fault that it would show."""
    check: Callable[[Results[Any]], Outcome]


def at_most(off: Any, allowed: float, unit: str = "") -> Outcome:
    """Differences, in absolute value, that must all be small; a NaN fails.

    Args:
        off: the differences; a control of an empty list does not apply.
        allowed: the largest that passes.
        unit: of the differences, in words.
    """
    values = np.abs(np.asarray(off, np.float64)).ravel()
    expected = f"at most {allowed:g}" if allowed else "exactly 0"
    if not len(values):
        return Outcome("no such values", expected, None)
    worst = float(values.max())
    found = f"largest difference {worst:.2g} {unit}".rstrip()
    return Outcome(f"{found} of {len(values)}", expected, worst <= allowed)


def same_at_the_end(
    run: Results[Any],
    lens: pd.DataFrame,
    whole: pd.DataFrame,
    *,
    on: list[str],
    column: str,
    unit: str,
) -> Outcome:
    """What a lens reads at the last depth is what the model says.

    Args:
        run: of the control.
        lens: with the columns ``depth``, ``on`` and ``column``.
        whole: what whole runs say, with the same columns but depth.
        on: what tells runs apart.
        column: that is compared.
        unit: of it, in words.
    """
    both = lens[lens.depth == run.n_blocks].merge(whole, on=on, suffixes=("", "_whole"))
    # The lens is fp32; the output is the model's precision.
    off = both[column] - both[f"{column}_whole"]
    return at_most(off, ROUNDING["logit"][run.config.dtype], unit)


def label_controls(table: str, *also: str) -> tuple[Control, Control]:
    """Controls that the labels are what the model says at all, for a table of whole runs.

    Args:
        table: with the columns ``best_label_rank`` and ``label_mass``.
        also: other tables whose meaning depends on it.
    """

    def said(run: Results[Any]) -> Outcome:
        rank = run[table].best_label_rank
        found = f"{(rank == 1).sum()} of {len(rank)} runs, worst rank {rank.max()}"
        return Outcome(found, "in most runs", bool((rank == 1).mean() > 0.5))

    def heavy(run: Results[Any]) -> Outcome:
        mass = run[table].label_mass
        found = f"median {mass.median():.4f}, least {mass.min():.4f}"
        return Outcome(found, "median above one half", bool(mass.median() > 0.5))

    of = (table, *also)
    return (
        Control(name="a label is the top token", of=of, check=said,
                guards_against="reading a few labels where the model would answer something else"),
        Control(name="probability of the labels together", of=of, check=heavy,
                guards_against="differences among labels that the model hardly considers"),
    )  # fmt: skip


def control_table(controls: Iterable[Control], run: Results[Any]) -> pd.DataFrame:
    """A row per control, in the one form that all experiments share."""
    rows = []
    for control in controls:
        found, expected, passed = control.check(run)
        rows.append(
            {
                "control": control.name,
                "verdict": SKIPPED if passed is None else PASS if passed else FAIL,
                "found": found,
                "expected": expected,
                "guards_against": control.guards_against,
                "tables": ", ".join(control.of),
            }
        )
    columns = ["control", "verdict", "found", "expected", "guards_against", "tables"]
    return pd.DataFrame(rows, columns=columns)
