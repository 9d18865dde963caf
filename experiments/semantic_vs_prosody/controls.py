"""The controls of ``semantic_vs_prosody``: what must come out if the measurements are right.

Source: methods section 2 (invariants I2 to I8, I17) and cards M-001-1, M-001-5.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..workbench.controls import ROUNDING, control_row, label_mass, labels_are_said
from ..workbench.experiment import Tables
from .settings import SemanticVsProsodyConfig

ProsodyEvidence = Literal["lens", "patching"]


def controls(
    tables: Tables, summaries: Tables, config: SemanticVsProsodyConfig, n_blocks: int
) -> pd.DataFrame:
    """One row per control: what it found, what it should find, and what it guards against."""
    rows = [
        labels_are_said(tables["runs"], "lens"),
        label_mass(tables["runs"], "lens"),
        _lens_end(tables, config, n_blocks),
        _win_sum(summaries["winrate_curve_conflict"]),
        *_exact_patches(tables, config, n_blocks),
        _all_positions(tables, config),
        _disturbance(summaries),
    ]
    return pd.DataFrame(rows)


def _lens_end(tables: Tables, config: SemanticVsProsodyConfig, n_blocks: int) -> dict[str, Any]:
    labels = [f"z_{name}" for name in config.labels]
    lens = tables["lens"]
    last = lens[lens.depth == n_blocks].set_index("item")[labels]
    real = tables["runs"].set_index("item")[labels]
    worst = float((last - real.loc[last.index]).abs().to_numpy().max())
    tolerance = ROUNDING[config.dtype]
    return control_row(
        "lens at the last depth = logits",
        "lens",
        f"at most {tolerance:g}",
        "a lens with the final norm left out or applied twice (I2)",
        found=f"largest difference {worst:.2g}",
        passed=worst <= tolerance,
    )


def _win_sum(curves: pd.DataFrame) -> dict[str, Any]:
    worst = float((curves.groupby("depth")["mean"].sum() - 1).abs().max())
    return control_row(
        "win rates of a depth sum to 1",
        "lens",
        "within 1e-12",
        "ties that are counted twice, or not at all (I17)",
        found=f"largest difference {worst:.2g}",
        passed=worst <= 1e-12,
    )


def _exact_patches(
    tables: Tables, config: SemanticVsProsodyConfig, n_blocks: int
) -> Iterator[dict[str, Any]]:
    names = list(config.labels)
    own, base, donor = ([f"{end}_{name}" for name in names] for end in ("z", "base", "donor"))
    cells = tables["patches"].merge(
        tables["pairs"][["pair_id", "len_A", "len_B", *base, *donor]], on="pair_id"
    )
    is_last, same_length = cells.depth == n_blocks, cells.len_A == cells.len_B
    blind = cells[is_last & cells.span.isin(["audio", "text", "struct"])]
    read = cells[is_last & (cells.span == "readout")]
    swapped = cells[(cells.depth == 0) & (cells.span == "audio") & same_length]
    own_run = tables.get("controls", pd.DataFrame({"control": []}))
    own_run = own_run[own_run.control == "self"]
    for control, some, ends, guards_against in (
        ("a run patched with itself changes nothing", own_run, base,
         "a donor taken at another place than where it is written (I3)"),
        ("last depth, any span without the readout: no change", blind, base,
         "an answer that is read at another position than the readout (I6)"),
        ("last depth, readout: the donor's answer", read, donor,
         "a donor state that the final norm or another block has changed (I5)"),
        ("depth 0, audio of equal length: the donor's run", swapped, donor,
         "an audio span that leaves frames out, or shifts them (I8)"),
    ):  # fmt: skip
        yield _equal(control, some, own, ends, guards_against, _patch_rounding(config))


def _patch_rounding(config: SemanticVsProsodyConfig) -> float:
    """How far a patched run may be from the whole run that it must equal."""
    return 0.0 if config.engine == "hooks" else ROUNDING[config.dtype]


def _equal(
    control: str,
    cells: pd.DataFrame,
    own: list[str],
    ends: list[str],
    guards_against: str,
    tolerance: float,
) -> dict[str, Any]:
    expected = f"within {tolerance:g} by rounding" if tolerance else "exactly"
    if not len(cells):
        return control_row(control, "patching", expected, guards_against, found="no such cells")
    worst = float(np.abs(cells[own].to_numpy() - cells[ends].to_numpy()).max())
    return control_row(
        control,
        "patching",
        expected,
        guards_against,
        found=f"largest difference {worst:.2g} logits in {len(cells)} cells",
        passed=worst <= tolerance,
    )


def _all_positions(tables: Tables, config: SemanticVsProsodyConfig) -> dict[str, Any]:
    names = list(config.labels)
    cells = tables["patches"].merge(tables["pairs"].drop(columns=["type", "target"]), on="pair_id")
    cells = cells[(cells.span == "all") & (cells.len_A == cells.len_B)]
    own, donor = [f"z_{name}" for name in names], [f"donor_{name}" for name in names]
    return _equal(
        "all positions of equal length: the donor's answer at every depth",
        cells,
        own,
        donor,
        "spans that leave positions out, or a donor of another run (I4)",
        _patch_rounding(config),
    )


def _disturbance(summaries: Tables) -> dict[str, Any]:
    """Where B's audio brings B's label, audio that does not say it should bring it less often."""
    flips, other = summaries["flip_rates"], summaries["control_flips"]
    flips = flips[(flips.span == "audio") & (flips.depth == flips.depth.min())]
    other = other[(other.depth == other.depth.min()) & other.control.isin(["silence", "noise"])]
    seen = other.merge(flips[["type", "conditional"]], on="type").dropna(subset=["conditional"])
    found = "; ".join(
        f"{row.type} pairs, {row.control}: {row.to_target:.2f} against {row.conditional:.2f}"
        for row in seen.itertuples()
    )
    return control_row(
        "silence and noise bring the target less often than B's audio",
        "patching",
        "less",
        "any disturbance being taken for what the donor says",
        found=found or "no such cells",
        passed=bool((seen.to_target < seen.conditional).all()) if len(seen) else None,
    )
