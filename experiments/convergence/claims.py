"""What a ``convergence`` run controls, and may establish.

Source: M-TC.
"""

import pandas as pd

from ..materials.transcript_tables import hears_itself, is_greedy
from ..workbench.claims import Claim, Finding, few, judged, not_measured, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from .tables import AgreementResults, compared, moved_by_massive, n_depths, of_rows

TURN = ("transcripts", "tokens", "streams")


def _ends_in_itself(run: AgreementResults) -> Outcome:
    """The last state is as similar to itself as can be."""
    last = run["streams"]
    last = last[last.depth == n_depths(run)]
    both = pd.concat([last.cka, last.plain_cka]).dropna() - 1
    return at_most(both, ROUNDING["nat"]["float32"])


def _centring_shortens(run: AgreementResults) -> Outcome:
    """Taking the mean out of a row never makes it longer."""
    table = run["streams"]
    return at_most((table.centred_norm / table.raw_norm - 1).clip(lower=0), 1e-9)


CONTROLS = (
    Control(name="the last depth is what the model hears", of=("transcripts",),
            check=hears_itself,
            guards_against="a final norm that is left out or applied twice (C56)"),
    Control(name="the last state is similar to itself", of=("streams",), check=_ends_in_itself,
            guards_against="similarity to another state, or between different rows"),
    Control(name="centring makes no row longer", of=("streams",), check=_centring_shortens,
            guards_against="norms of different rows"),
    Control(name="the transcript is what one pass finds likeliest", of=("transcripts", "tokens"),
            check=is_greedy,
            guards_against="tokens that are read at another position than the one that says them"),
)  # fmt: skip


def _named(run: AgreementResults) -> str:
    table = run["turning_points"].set_index(["measure", "rows"])
    return "; ".join(
        f"{measure.replace('_', ' ')} at {table.most_often[measure, rows]:g} (in "
        f"{table.share_of_it[measure, rows]:.0%} of the clips)"
        for measure in run.config.measures
        for rows in [of_rows(run, measure)]
    )


def _same_depth(run: AgreementResults) -> Finding:
    table = run["agreement"].set_index("tolerance").loc[run.config.tolerance]
    claim = "The measures turn at the same depth"
    if not table.n:
        return not_measured(claim, "no clip has a depth of every measure", "rate")
    numbers = table.to_dict()
    return judged(
        claim,
        f"Within {run.config.tolerance} of each other in {shown(numbers)} of {int(table.n)} clips; "
        f"{table.chance:.2f} if every depth were as likely. Most often of 1 to {n_depths(run)}: "
        f"{_named(run)}",
        {
            **few(table.n_clusters, run.config.resampled),
            "not surely in more than half of the clips": not table.low > 0.5,
            "not surely more often than by chance": not table.low > table.chance,
        },
        numbers=numbers,
        unit="rate",
    )


def _clip_by_clip(run: AgreementResults) -> Finding:
    table = run["agreement"].set_index("tolerance").loc[run.config.tolerance]
    claim = "Where one measure turns later in a clip, so do the others"
    if not table.n:
        return not_measured(claim, "no clip has a depth of every measure", "rate")
    _, found = compared(run)
    still = [
        measure.replace("_", " ")
        for measure, row in zip(run.config.measures, found, strict=True)
        if len({*row}) < 2
    ]
    numbers = table.to_dict()
    return judged(
        claim,
        f"They agree in {shown(numbers)} of the clips, in {table.permuted:.2f} if each measure's "
        f"depths are dealt out anew, p = {table.p:.2g}",
        {
            **few(table.n_clusters, run.config.resampled),
            f"the same depth in every clip: {', '.join(still)}": bool(still),
            "no more often than depths dealt out anew": not table.p < 0.05,
        },
        numbers=numbers,
        unit="rate",
    )


def _massive(run: AgreementResults) -> Finding:
    claim = "A few massive rows decide where the stream turns"
    table = moved_by_massive(run)
    if table.empty:
        return not_measured(claim, "no clip has enough rows", "rate")
    found = run.draws.row(table.moved.astype(float), run.config.clusters(table))
    return judged(
        claim,
        f"Without them CKA's largest step is elsewhere in {shown(found)} of {len(table)} clips",
        {
            **few(found["n_clusters"], run.config.resampled),
            "not surely in more than half of the clips": not found["low"] > 0.5,
        },
        numbers=found,
        unit="rate",
    )


CLAIMS = (
    Claim(name="same_depth", rests_on=TURN, judge=_same_depth),
    Claim(name="clip_by_clip", rests_on=TURN, judge=_clip_by_clip),
    Claim(name="massive_rows", rests_on=("streams",), judge=_massive),
)
