"""Two runs of one experiment side by side: settings, claims with their intervals, controls."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from hooked_alm.errors import InputError

from .identity import by_name, flatten, to_json
from .report import read_report
from .run_folder import RunFolder

COLUMNS = {
    "findings": ("claim", "established", "estimate", "low", "high", "unit", "n"),
    "controls": ("control", "verdict"),
}
"""What is read of either table."""
RATES = ("rate", "share")
"""Units that turn at one half too, where their difference turns at 0."""


def compare(left: RunFolder, right: RunFolder) -> Iterator[str]:
    """Lines that say how two runs differ.

    Raises:
        InputError: a folder holds no finished run, or they are runs of different experiments.
    """
    runs = left.provenance, right.provenance
    first, second = (run["experiment"] for run in runs)
    if first != second:
        raise InputError(
            f"comparing {left.path} with {right.path}: got runs of {first} and of {second}, "
            "expected two of one experiment. Their claims have nothing in common."
        )
    for folder in (left, right):
        read_report(folder)  # refuses a run that has not ended
    yield f"{first}: {left.path} | {right.path}"
    for heading, part in (("Settings", "config"), ("Inputs", "inputs")):
        yield from ("", f"{heading} that differ")
        yield from _differences(*(flatten(by_name(run[part])) for run in runs))
    yield from ("", "Claims (reversed: intervals on opposite sides of 0, or of one half of a rate)")
    claims = _both("claim", left, right, "findings")
    width = max(map(len, claims), default=0)
    for name, (a, b) in claims.items():
        yield f"  {_relation(a, b):<10} {name:<{width}}  {_shown(a)} | {_shown(b)}"
    yield from ("", "Controls")
    for name, (a, b) in _both("control", left, right, "controls").items():
        verdicts = [row["verdict"] if row else "none" for row in (a, b)]
        yield f"  {' | '.join(verdicts)}  {name}"


def _differences(left: dict[str, Any], right: dict[str, Any]) -> Iterator[str]:
    n_same = 0
    for key in dict.fromkeys([*left, *right]):
        shown = [to_json(side[key]) if key in side else "none" for side in (left, right)]
        if shown[0] == shown[1]:
            n_same += 1
            continue
        cut = [text if len(text) <= 60 else text[:57] + "..." for text in shown]
        yield f"  {key}: {cut[0]} | {cut[1]}"
    yield f"  {n_same} are equal"


def _both(
    key: str, left: RunFolder, right: RunFolder, table: str
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of both runs by name; an empty one where a run has none."""
    sides = []
    for folder in (left, right):
        found = folder.read_table(table)
        if missing := {*COLUMNS[table]} - {*found}:
            raise InputError(
                f"comparing {folder.path}: got its table {table} without {', '.join(missing)}, "
                "expected what a run wrote. Run the experiment again; its finished units are kept."
            )
        sides.append({row[key]: row for row in found.to_dict("records")})
    return {name: (sides[0].get(name, {}), sides[1].get(name, {})) for name in sides[0] | sides[1]}


def _relation(a: dict[str, Any], b: dict[str, Any]) -> str:
    """How the intervals of a claim lie to each other."""
    if not a or not b or pd.isna([one[end] for one in (a, b) for end in ("low", "high")]).any():
        return "unknown"
    low, high = sorted((a, b), key=lambda one: float(one["low"]))
    if low["high"] >= high["low"]:
        return "overlap"
    middles = (0.0, 0.5) if a["unit"] in RATES else (0.0,)
    is_between = any(low["high"] < middle < high["low"] for middle in middles)
    return "REVERSED" if is_between else "apart"


def _shown(row: dict[str, Any]) -> str:
    if not row:
        return "no such claim"
    made = "established" if row["established"] else "not established"
    if pd.isna(row["estimate"]):
        return f"{made}, not measured"
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:.3g}, {row['high']:.3g}]"
    return f"{made}, {row['estimate']:.3g}{interval} {row['unit']}, n = {row['n']}"
