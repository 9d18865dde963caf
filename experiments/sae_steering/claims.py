"""What a ``sae_steering`` run controls, and may establish."""

from ..materials.transcript_tables import error_rise
from ..workbench.claims import Claim, Finding, around_zero, few, judged, not_measured, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from .plan import BESIDE, NO_OP, SHIFTS
from .tables import SteeringResults, after, before, fall, of_arm, removed

TOLERATED = 0.05
"""More errors for a word that steering may cost."""
SAID: dict[str, str] = {
    "features": "the features of non-speech",
    "random": "others nearest in activity",
    "random_shift": "a shift of equal size along others nearest in activity",
    "frequent": "the most frequent features",
    "dense": "a shift of equal size along the difference of the means",
    "reconstruction": "what the dictionary does not reconstruct",
}


def _no_op(run: SteeringResults) -> Outcome:
    """Strength 0 moves no row and changes no transcript."""
    table = run["steered"]
    mine = table[table.alpha == NO_OP].set_index("clip")
    own = run["transcripts"].set_index("clip").text
    changed = (mine.text != own.reindex(mine.index)).astype(float)
    return at_most([*mine.moved, *changed], 0.0)


def _put_together(run: SteeringResults) -> Outcome:
    """Strength 1 leaves all other features, and what the dictionary does not reconstruct."""
    off = run["steered"].off.dropna()
    return at_most(off, ROUNDING["relative"]["float32"], "of the rows' length")


def _same_size(run: SteeringResults) -> Outcome:
    """Shifts move every clip as far as the features do."""
    table = run["steered"][run["steered"].alpha != NO_OP]
    far = table[table.arm == "features"].set_index(["clip", "alpha"]).moved
    shifted = table[table.arm.isin(SHIFTS)].join(far.rename("size"), on=["clip", "alpha"])
    apart = (shifted.moved - shifted["size"]) / shifted["size"].where(shifted["size"] > 0, 1.0)
    return at_most(apart, ROUNDING["relative"]["float32"], "of it")


def _same_clips(run: SteeringResults) -> Outcome:
    """Every arm is tested on the clips that are written down as they are."""
    every = {*run["transcripts"]["clip"]}
    parts = run["steered"].groupby(["arm", "draw", "alpha"])["clip"].agg(set)
    other = sum(clips != every for clips in parts)
    return Outcome(f"other clips for {other} of {len(parts)}", f"{len(every)} clips", not other)


def _other_clips(run: SteeringResults) -> Outcome:
    """No clip on which features were chosen is among those."""
    both = {*run["chosen"]["clip"]} & {*run["transcripts"]["clip"]}
    return Outcome(f"{len(both)} clips are both", "none", not both)


CONTROLS = (
    Control(name="strength 0 changes nothing", of=("steered",), check=_no_op,
            guards_against="a splice that is not the identity by itself"),
    Control(name="strength 1 is all other features and the error", of=("steered",),
            check=_put_together, guards_against="a sign or a latent that is not the one chosen"),
    Control(name="shifts move rows as far", of=("steered",), check=_same_size,
            guards_against="a control that is weaker than what it controls"),
    Control(name="every arm has the same clips", of=("steered", "transcripts"), check=_same_clips,
            guards_against="rates over different clips"),
    Control(name="features were chosen on other clips", of=("steered", "chosen"),
            check=_other_clips, guards_against="features that fit the clips they are tested on"),
)  # fmt: skip


def _heard(run: SteeringResults) -> str | None:
    """Why nothing can be silenced; None where words are written of nothing."""
    return None if before(run, "no_speech").heard.any() else "nothing is written of non-speech"


def _silences(run: SteeringResults) -> Finding:
    """Whether fewer clips without speech have words once the features are taken out."""
    claim = "Taking the features of non-speech out stops words out of nothing"
    row, alpha = of_arm(run, "features"), run.config.alpha
    if (why := _heard(run)) is not None:
        facts = f"With them taken out words are written of {row.fpr_mean:.2f} of the clips"
        return not_measured(claim, why, "rate", facts)
    found = removed(run, "features", alpha)
    was = before(run, "no_speech").heard.mean()
    return judged(
        claim,
        f"Words are written of {was:.2f} of {int(row.n_no_speech)} clips without speech, and at "
        f"strength {alpha:g} of {row.fpr_mean:.2f}: {shown(found)} fewer",
        {
            **few(found["n_clusters"], run.config.resampled),
            "not surely fewer": not found["low"] > 0,
        },
        numbers=found,
        unit="rate",
    )


def _more_than(run: SteeringResults, arm: str) -> Finding:
    """Whether they silence more clips than a control does."""
    said = SAID[arm]
    claim = f"They silence more than {said}"
    if (why := _heard(run)) is not None:
        return not_measured(claim, why, "rate")
    row, mine = of_arm(run, arm), fall(run, "features", run.config.alpha)
    gap = mine.fall - fall(run, arm, float(row.alpha)).fall
    found = run.draws.row(gap, run.config.clusters(mine))
    return judged(
        claim,
        f"Without {said} words are written of {row.fpr_mean:.2f} of the clips: the false positive "
        f"rate falls by {row.removed_mean:.2f}, without the features by {shown(found)} more. Rows "
        f"of these clips are moved by {row.moved_no_speech:.2f} of their length, by the features "
        f"{of_arm(run, 'features').moved_no_speech:.2f}",
        {
            **few(found["n_clusters"], run.config.resampled),
            "not surely more": not found["low"] > 0,
        },
        numbers=found,
        unit="rate",
    )


def _cost(run: SteeringResults) -> Finding:
    """Whether speech is still written down, within what is tolerated."""
    row = of_arm(run, "features")
    rise = error_rise(run, before(run, "speech"), after(run, "features", row.alpha, "speech"))
    return judged(
        f"It costs at most {TOLERATED:g} more errors for a {run.config.unit} of speech",
        f"Errors for a {run.config.unit} go from {row.wer_mean - rise['mean']:.2f} to "
        f"{row.wer_mean:.2f}: {shown(rise)} more, {int(row.n_speech)} clips",
        {
            **few(rise["n_clusters"], run.config.resampled),
            f"errors may rise by more than {TOLERATED:g}": not rise["high"] <= TOLERATED,
        },
        numbers=rise,
        unit="rate",
    )


def _reconstruction(run: SteeringResults) -> Finding:
    """Whether the dictionary alone, with no feature taken out, changes what is written."""
    row, spoken = of_arm(run, "reconstruction"), before(run, "speech")
    rise = error_rise(run, spoken, after(run, "reconstruction", 1.0, "speech"))
    return judged(
        "Reconstructions in the rows' place cost words by themselves",
        f"With every row replaced by its reconstruction errors for a {run.config.unit} of speech "
        f"go from {row.wer_mean - rise['mean']:.2f} to {row.wer_mean:.2f}: {shown(rise)} more; "
        f"words are written of {row.fpr_mean:.2f} of the clips without speech",
        {
            **few(rise["n_clusters"], run.config.resampled),
            **around_zero(rise, "difference"),
            "errors become fewer": rise["mean"] < 0,
        },
        numbers=rise,
        unit="rate",
    )


RESTS_ON = ("steered", "transcripts", "chosen")
CLAIMS = (
    Claim(name="silences", rests_on=RESTS_ON, judge=_silences),
    Claim(name="more than {}", rests_on=RESTS_ON, judge=_more_than, per=lambda run: BESIDE),
    Claim(name="cost", rests_on=RESTS_ON, judge=_cost),
    Claim(name="reconstruction", rests_on=("steered", "transcripts"), judge=_reconstruction),
)
