"""The controls of ``semantic_vs_prosody``: what must come out if its measurements are right.

Source: the invariants I2 to I8 and I17; M-001-1, M-001-5.
"""

from collections.abc import Callable

import pandas as pd

from ..materials.conflict_claims import as_whole_runs
from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from .tables import ProsodyResults, beside_pairs, scores_of

MOST_OF_SUMS = 1e-12
"""What shares that add up to 1 in float64 may be off by."""


def _lens_end(run: ProsodyResults) -> Outcome:
    last = run["lens"].query("depth == @last", local_dict={"last": run.n_blocks})
    real = run["runs"].set_index("item").loc[last["item"]]
    off = scores_of(run, last) - scores_of(run, real)
    return at_most(off, ROUNDING["logit"][run.config.dtype], "logits")


def _win_sum(run: ProsodyResults) -> Outcome:
    shares = run["winrate_curve_conflict"].groupby("depth")["mean"].sum()
    return at_most(shares - 1, MOST_OF_SUMS)


def _equals(
    end: str,
    chosen: str,
    table: Callable[[ProsodyResults], pd.DataFrame] = beside_pairs,
) -> Callable[[ProsodyResults], Outcome]:
    """The check that the scores of some patches are those of the base's or the donor's run."""

    def check(run: ProsodyResults) -> Outcome:
        some = table(run).query(chosen, local_dict={"last": run.n_blocks})
        if some.empty:
            return as_whole_runs(run, [])
        return as_whole_runs(run, scores_of(run, some) - scores_of(run, some, end))

    return check


def _disturbance(run: ProsodyResults) -> Outcome:
    """Where B's audio brings B's label, audio that does not say it should bring it less often."""
    flips, other = run["flip_rates"], run["control_flips"]
    flips = flips[(flips.span == "audio") & (flips.depth == flips.depth.min())]
    other = other[(other.depth == other.depth.min()) & other.control.isin(["silence", "noise"])]
    seen = other.merge(flips[["type", "conditional"]], on="type").dropna(subset=["conditional"])
    found = "; ".join(
        f"{row.type} pairs, {row.control}: {row.to_target:.2f} against {row.conditional:.2f}"
        for row in seen.itertuples()
    )
    passed = bool((seen.to_target < seen.conditional).all()) if len(seen) else None
    return Outcome(found or "no such values", "less", passed)


CONTROLS = (
    *label_controls("runs", "lens", "pairs", "patches"),
    Control(name="lens at the last depth = logits", of=("lens",), check=_lens_end,
            guards_against="a lens with the final norm left out or applied twice (I2)"),
    Control(name="win rates of a depth sum to 1", of=("lens",), check=_win_sum,
            guards_against="ties that are counted twice, or not at all (I17)"),
    Control(name="a run patched with itself changes nothing", of=("patches", "control_patches"),
            check=_equals("base", "control == 'self'", lambda run: run["control_patches"]),
            guards_against="a donor taken at another place than where it is written (I3)"),
    Control(name="last depth, any span without the readout: no change", of=("patches",),
            check=_equals("base", "depth == @last and span in ['audio', 'text', 'struct']"),
            guards_against="an answer that is read at another position than the readout (I6)"),
    Control(name="last depth, readout: the donor's answer", of=("patches",),
            check=_equals("donor", "depth == @last and span == 'readout'"),
            guards_against="a donor state that the final norm or another block has changed (I5)"),
    Control(name="depth 0, audio of equal length: the donor's run", of=("patches", "pairs"),
            check=_equals("donor", "depth == 0 and span == 'audio' and len_A == len_B"),
            guards_against="an audio span that leaves frames out, or shifts them (I8)"),
    Control(name="all positions of equal length: the donor's answer at every depth",
            of=("patches", "pairs"), check=_equals("donor", "span == 'all' and len_A == len_B"),
            guards_against="spans that leave positions out, or a donor of another run (I4)"),
    Control(name="silence and noise bring the target less often than B's audio",
            of=("patches", "control_patches"), check=_disturbance,
            guards_against="any disturbance being taken for what the donor says"),
)  # fmt: skip
