"""What an ``encoder_lens`` run controls, and may establish.

Source: Beyond Transcription (arXiv 2508.15882), its Encoder Lens and saturation; M-BT-1 to M-BT-3.
"""

import numpy as np

from ..materials.resampling import mean_of, over
from ..materials.transcript_tables import hears_itself, is_greedy, likely_as_itself
from ..workbench.claims import Claim, Finding, few, judged, not_measured, shown
from ..workbench.controls import Control
from .tables import DepthResults, last_block, n_depths

CONTROLS = (
    Control(name="the last depth is what the model hears", of=("transcripts",),
            check=hears_itself,
            guards_against="a final norm that is left out or applied twice (C56)"),
    Control(name="the last depth is as likely as in the model", of=("transcripts",),
            check=likely_as_itself,
            guards_against="a depth that is heard in another's row"),
    Control(name="the transcript is what one pass finds likeliest", of=("transcripts", "tokens"),
            check=is_greedy,
            guards_against="tokens that are read at another position than the one that says them"),
)  # fmt: skip


def _stabilises(run: DepthResults) -> Finding:
    table, last = run["stabilisation"], n_depths(run)
    found = mean_of(run, table, "depth")
    n_late = int((table.depth == last).sum())
    return judged(
        "The transcript is settled before the encoder's last block",
        f"It is within {run.config.near:.0%} of the final one from depth {shown(found)} of "
        f"{last} on; in {n_late} of {len(table)} clips only at the last",
        {
            **few(found["n_clusters"], run.config.resampled),
            f"not surely before depth {last}": not found["high"] <= last - 1,
        },
        numbers=found,
        unit="depth",
    )


def _last_block(run: DepthResults) -> Finding:
    claim = "The encoder's last block makes the transcript better"
    found, last = last_block(run), n_depths(run)
    if not found["n"]:
        return not_measured(claim, "no table says what is said", "rate")
    rates = run["word_errors"].set_index("depth")["mean"]
    return judged(
        claim,
        f"Errors for a {run.config.unit}: {rates[last - 1]:.2f} at depth {last - 1}, "
        f"{rates[last]:.2f} at the last, {shown(found)} fewer",
        {
            **few(found["n_clusters"], run.config.resampled),
            "not surely fewer": not found["low"] > 0,
        },
        numbers=found,
        unit="rate",
    )


def _circles(run: DepthResults) -> Finding:
    who, going = over(run["transcripts"], "loops")
    more = going[:, :-1].max(axis=1) - going[:, -1]
    found = run.draws.row(more, run.config.clusters(who))
    return judged(
        "Read at an inner depth, the encoder has the decoder go in circles",
        f"{np.mean(going[:, :-1].max(axis=1)):.2f} of the clips at some depth before the last, "
        f"{going[:, -1].mean():.2f} at the last: {shown(found)} more",
        {
            **few(found["n_clusters"], run.config.resampled),
            "not surely more": not found["low"] > 0,
        },
        numbers=found,
        unit="rate",
    )


def _saturates(run: DepthResults) -> Finding:
    table = run["saturation"]
    found, by_chance = (mean_of(run, table, one) for one in ("depth", "random_depth"))
    gap = run.draws.row(table.random_depth - table.depth, run.config.clusters(table))
    return judged(
        "The decoder settles its tokens before its last block",
        f"A token is the likeliest for good from depth {shown(found)} of {run.n_blocks} on, the "
        f"mean of a clip's; from {shown(by_chance)} on if the depths below were random directions",
        {
            **few(found["n_clusters"], run.config.resampled),
            f"not surely before depth {run.n_blocks - 1}": not found["high"] <= run.n_blocks - 1,
            "not surely before random directions": not gap["low"] > 0,
        },
        numbers=found,
        unit="depth",
    )


CLAIMS = (
    Claim(name="stabilises", rests_on=("transcripts",), judge=_stabilises),
    Claim(name="last_block_helps", rests_on=("transcripts",), judge=_last_block),
    Claim(name="goes_in_circles", rests_on=("transcripts",), judge=_circles),
    Claim(name="saturates", rests_on=("tokens",), judge=_saturates),
)
