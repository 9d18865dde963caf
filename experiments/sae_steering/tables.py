"""The tables of a ``sae_steering`` run, and what is averaged over them."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from ..materials.clips import SOUNDS
from ..materials.kept_features import FEATURES
from ..materials.resampling import mean_of
from ..materials.transcript_tables import ERROR_COLUMNS, error_rate, error_rise
from ..workbench.intervals import prefixed
from ..workbench.results import Results, Row
from .plan import NO_OP
from .settings import SAESteeringConfig

SteeringResults = Results[SAESteeringConfig]
TABLES = {
    "chosen": "a clip on which features are chosen",
    "latents": "a feature that is taken out, and its means in the clips on which it was chosen",
    "transcripts": "a clip written down as the model is",
    "steered": "a clip written down while rows of the encoder are changed",
    **FEATURES,
    **SOUNDS,
}
ENDS = ("mean", "low", "high")
HOLDS = ("no_speech", "speech")


def summarise(run: SteeringResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    yield "steering", steering(run)
    yield "phrases", phrases(run)


def steering(run: SteeringResults) -> pd.DataFrame:
    """What each arm does at each strength, its draws together.

    ``fpr`` is the share of clips without speech of which words are written, ``words`` their mean
    number, ``removed`` by how much that share falls; ``wer`` is the error rate of speech, and
    ``wer_rise`` by how much it rises. ``moved`` is how far rows are moved, relative to their
    length, in clips of either kind.
    """
    rows = [_unsteered(run)]
    table = run["steered"]
    for (arm, alpha), _ in table[table.alpha != NO_OP].groupby(["arm", "alpha"], sort=False):
        silent, spoken = (after(run, str(arm), float(alpha), holds) for holds in HOLDS)
        rows.append({
            "arm": arm, "alpha": alpha,
            **_rates(run, silent, spoken),
            **prefixed("removed", removed(run, str(arm), float(alpha))),
            **prefixed("wer_rise", error_rise(run, before(run, "speech"), spoken)),
            "moved_no_speech": silent.moved.mean(), "moved_speech": spoken.moved.mean(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _unsteered(run: SteeringResults) -> Row:
    return {
        "arm": "nothing", "alpha": 0.0, **_rates(run, *(before(run, holds) for holds in HOLDS)),
        **{f"{name}_{end}": 0.0 for name in ("removed", "wer_rise") for end in ENDS},
        "moved_no_speech": 0.0, "moved_speech": 0.0,
    }  # fmt: skip


def _rates(run: SteeringResults, silent: pd.DataFrame, spoken: pd.DataFrame) -> Row:
    return {
        "n_no_speech": len(silent), "n_speech": len(spoken),
        **prefixed("fpr", _heard(run, silent)), "words": silent.reference_insertions.mean(),
        **prefixed("wer", error_rate(run, spoken)),
    }  # fmt: skip


def _heard(run: SteeringResults, table: pd.DataFrame) -> dict[str, Any]:
    return mean_of(run, table, "heard")


def before(run: SteeringResults, holds: str) -> pd.DataFrame:
    """Clips of one kind as the model writes them down."""
    table = run["transcripts"]
    return table[table.holds == holds].reset_index(drop=True)


def after(run: SteeringResults, arm: str, alpha: float, holds: str) -> pd.DataFrame:
    """The same clips, in the same order, under an arm; means over its draws."""
    table, own = run["steered"], before(run, holds)
    mine = table[(table.arm == arm) & (table.alpha == alpha)]
    numbers = mine.groupby("clip")[["heard", "moved", *ERROR_COLUMNS]].mean()
    return own[["clip", "speaker", "holds"]].join(numbers, on="clip", validate="one_to_one")


def fall(run: SteeringResults, arm: str, alpha: float) -> pd.DataFrame:
    """Clips without speech, and by how much words are less often written of them under an arm."""
    own = before(run, "no_speech")
    return own.assign(fall=own.heard - after(run, arm, alpha, "no_speech").heard)


def removed(run: SteeringResults, arm: str, alpha: float) -> dict[str, Any]:
    """By how much the false positive rate falls under an arm."""
    return mean_of(run, fall(run, arm, alpha), "fall")


def phrases(run: SteeringResults) -> pd.DataFrame:
    """What is written of clips without speech, as the model is and steered, the commonest first."""
    table = run["steered"]
    mine = table[(table.arm == "features") & (table.alpha == run.config.alpha)]
    parts = [run["transcripts"].assign(when="as it is"), mine.assign(when="features taken out")]
    both = pd.concat([part[part.holds == "no_speech"] for part in parts])
    counts = both.groupby(["when", "text"], sort=True).size().rename("clips").reset_index()
    return counts.sort_values(["when", "clips"], ascending=[True, False], kind="stable")


def of_arm(run: SteeringResults, arm: str) -> pd.Series:
    """An arm's row at the strength at which claims are judged."""
    table = run["steering"]
    alpha = 1.0 if arm == "reconstruction" else run.config.alpha
    found: pd.Series = table[(table.arm == arm) & (table.alpha == alpha)].iloc[0]
    return found
