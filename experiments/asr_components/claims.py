"""What an ``asr_components`` run controls, and may establish.

Source: Beyond Transcription (arXiv 2508.15882), its repetition heads; Calm-Whisper (arXiv
2505.12969), its heads of non-speech; M-BT-7.
"""

from functools import partial

import numpy as np

from ..materials.resampling import mean_of
from ..materials.transcript_tables import error_rate
from ..workbench.claims import Claim, Finding, few, judged, not_measured, shown
from ..workbench.controls import Control, Outcome
from .plan import Failure
from .tables import (
    FAILS,
    MEASURE,
    ComponentResults,
    best,
    failing,
    held_out,
    spoken,
)

SAID: dict[Failure, str] = {
    "loop": "transcripts that go in circles", "hallucination": "words out of nothing",
}  # fmt: skip


# --- Controls


def _same_clips(run: ComponentResults) -> Outcome:
    """Every head is left out of the same clips, those that were written down with all."""
    every = {*run["transcripts"]["clip"]}
    nodes = run["ablated"].groupby("node")["clip"].agg(set)
    other = [str(node) for node, clips in nodes.items() if clips != every]
    expected = f"{len(every)} clips for every head"
    if nodes.empty:
        return Outcome("no head was left out", expected, None)
    return Outcome(f"other clips for {len(other)} of {len(nodes)} heads", expected, not other)


def _failures_were_screened(run: ComponentResults) -> Outcome:
    """The screen is of the clips that fail, and of no others."""
    wrong = 0
    for failure in FAILS:
        mine = run["screen"][run["screen"].of == failure]["clip"]
        wrong += len({*mine} ^ {*failing(run, failure)["clip"]})
    return Outcome(f"{wrong} clips too many or too few", "exactly those that fail", wrong == 0)


def _norms(run: ComponentResults) -> Outcome:
    """Outputs of heads have a length, and it is a number."""
    if run["screen"].empty:
        return Outcome("no clip was screened", "finite norms", None)
    wrong = int((~np.isfinite(run["screen"].norm) | (run["screen"].norm < 0)).sum())
    return Outcome(f"{wrong} of {len(run['screen'])} are none", "finite norms", wrong == 0)


CONTROLS = (
    Control(name="every head is left out of the same clips", of=("ablated",), check=_same_clips,
            guards_against="shares over different clips"),
    Control(name="those that fail are screened", of=("screen", "ablated"),
            check=_failures_were_screened,
            guards_against="heads that are chosen for other transcripts"),
    Control(name="outputs of heads have a length", of=("screen", "ablated"), check=_norms,
            guards_against="a gradient that went astray"),
)  # fmt: skip


# --- Claims


def _one_head(run: ComponentResults, failure: Failure) -> Finding:
    """Whether the best head, chosen on some clips, cures the others, and no random head does."""
    name, node = MEASURE[failure], best(run, MEASURE[failure])
    claim = f"One head carries the {SAID[failure]}"
    n = len(failing(run, failure))
    if node is None:
        why = "no clip fails so" if not n else "no head was left out"
        return not_measured(claim, why, "rate", f"With all heads {n} clips have {SAID[failure]}")
    mine = held_out(run, node, failure)
    if mine.empty:
        return not_measured(claim, "no clip is left to judge it on", "rate")
    found = mean_of(run, mine, "good")
    table = run["heads"].set_index("node")
    is_random = table.why.str.contains("random") & (table.index != node)
    by_chance = table.loc[is_random, f"{name}_mean"]
    highest = float(by_chance.max()) if len(by_chance) else np.nan
    delta = {end: table.loc[node, f"wer_delta_{end}"] for end in ("mean", "low", "high")}
    cost = "unknown" if np.isnan(delta["mean"]) else shown(delta)
    return judged(
        f"One head carries the {SAID[failure]}: {node}",
        f"Chosen on other clips, leaving it out cures {shown(found)} of {len(mine)}; of "
        f"{len(by_chance)} heads of about the same norm the best cures {highest:.2f}. Errors for a "
        f"{run.config.unit} of speech rise by {cost}",
        {
            **few(found["n_clusters"], run.config.resampled),
            "not surely more than half of the clips": not found["low"] > 0.5,
            "not surely more than random heads": not found["low"] > highest,
        },
        numbers=found,
        unit="rate",
    )


def _crossing(run: ComponentResults) -> Finding:
    """Which kind of attention carries the loops: the best head of either, on the other clips."""
    claim = "Cross-attention carries the circles, not self-attention"
    nodes = {kind: best(run, "cured", kind=kind) for kind in ("cross", "self")}
    if None in nodes.values():
        return not_measured(claim, "not both kinds were left out of clips that loop", "rate")
    both = [held_out(run, str(node), "loop").set_index("clip")["good"] for node in nodes.values()]
    gap = (both[0] - both[1]).dropna().reset_index()
    if gap.empty:
        return not_measured(claim, "no clip is left to judge it on", "rate")
    who = run["transcripts"].set_index("clip").loc[gap["clip"]].reset_index()
    found = run.draws.row(gap["good"], run.config.clusters(who))
    if found["high"] < 0:
        claim = "Self-attention carries the circles, not cross-attention"
    return judged(
        claim,
        f"The best head of cross-attention, {nodes['cross']}, cures {both[0].mean():.2f} of the "
        f"clips that it was not chosen on, that of self-attention, {nodes['self']}, "
        f"{both[1].mean():.2f}: {shown(found)} apart",
        {
            **few(found["n_clusters"], run.config.resampled),
            "the interval of the difference includes 0": bool(found["low"] <= 0 <= found["high"]),
        },
        numbers=found,
        unit="rate",
    )


def _cost(run: ComponentResults) -> Finding:
    """Whether what cures loops leaves speech as it is: both axes, always."""
    claim, node = "The head that carries the circles is not needed for speech", best(run, "cured")
    if node is None:
        return not_measured(claim, "no clip goes in circles", "rate")
    row = run["heads"].set_index("node").loc[node]
    found = {end: float(row[f"wer_delta_{end}"]) for end in ("mean", "low", "high")}
    if np.isnan(found["mean"]):
        return not_measured(claim, "no clip with known words is written down soundly", "rate")
    table = spoken(run["transcripts"], run)
    n = len({*run.config.clusters(table)})
    before = error_rate(run, table)
    return judged(
        claim,
        f"Without {node}, errors for a {run.config.unit} go from {before['mean']:.2f} to "
        f"{before['mean'] + found['mean']:.2f}: {shown(found)} more, {len(table)} clips",
        {
            **few(n, run.config.resampled),
            "errors may rise by more than 0.05": not found["high"] <= 0.05,
        },
        numbers={**found, "n": len(table)},
        unit="rate",
    )


CLAIMS = (
    Claim(name="loop_head", rests_on=("ablated",), judge=partial(_one_head, failure="loop")),
    Claim(name="loops_cross_attention", rests_on=("ablated",), judge=_crossing),
    Claim(name="loop_head_cost", rests_on=("ablated",), judge=_cost),
    Claim(name="hallucination_head", rests_on=("ablated",),
          judge=partial(_one_head, failure="hallucination")),
)  # fmt: skip
