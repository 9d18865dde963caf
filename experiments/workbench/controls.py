"""Controls: what must come out if the measurements of a run are what they claim to be."""

from typing import Any

import pandas as pd

from .report import Note

PASS, FAIL, SKIPPED = "pass", "FAIL", "not applicable"
ROUNDING = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}
"""Largest difference, in logits, between two roads to the same number; by dtype.

The fast engine is another road than whole runs: it multiplies other numbers of rows at once, by
other kernels, and attends in two parts. With ``engine="hooks"`` cells are whole runs, and what
should not change does not change by a bit.
"""


def control_row(
    name: str,
    part: str,
    expected: str,
    guards_against: str,
    *,
    found: str = "",
    passed: bool | None = None,
) -> dict[str, Any]:
    """One row of the table of controls.

    Args:
        name: of the control.
        part: of the measurements that rest on it.
        expected: what should be found.
        guards_against: the fault that it would show.
        found: what was found.
        passed: None where the control does not apply.
    """
    verdict = SKIPPED if passed is None else PASS if passed else FAIL
    return {
        "control": name,
        "verdict": verdict,
        "found": found,
        "expected": expected,
        "guards_against": guards_against,
        "part": part,
    }


def labels_are_said(runs: pd.DataFrame, part: str) -> dict[str, Any]:
    """The model's top token is a label in most runs."""
    first = runs.best_label_rank == 1
    return control_row(
        "a label is the top token",
        part,
        "in most runs",
        "reading a few labels where the model would answer something else",
        found=f"{first.sum()} of {len(runs)} runs, worst rank {runs.best_label_rank.max()}",
        passed=bool(first.mean() > 0.5),
    )


def label_mass(runs: pd.DataFrame, part: str) -> dict[str, Any]:
    """The labels have most of the probability."""
    mass = runs.label_mass
    return control_row(
        "probability of the labels together",
        part,
        "median above one half",
        "differences among labels that the model hardly considers",
        found=f"median {mass.median():.4f}, least {mass.min():.4f}",
        passed=bool(mass.median() > 0.5),
    )


def failures(checks: pd.DataFrame) -> list[Note]:
    """What a report says before anything else of controls that failed."""
    failed = checks[checks.verdict == FAIL]
    if not len(failed):
        return []
    lines = "; ".join(
        f"{row.control} (found {row.found}, expected {row.expected})" for row in failed.itertuples()
    )
    return [Note(f"Failed controls: {lines}. No claim that rests on them is made.", "warning")]
