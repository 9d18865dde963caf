"""What an ``emotion_conflict`` run establishes, in sentences made from its numbers.

A claim that rests on a failed control, or on a measurement with a known defect, is not established.

Source: seed document 000, hypotheses H1 and H2; methods card M-000-14.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.bootstrap import bootstrap_mean

from ..materials.ob1 import EMOTIONS
from ..workbench.controls import FAIL
from ..workbench.experiment import Tables
from ..workbench.findings import MIN_ITEMS, Finding, judged
from .controls import EmotionEvidence
from .hypotheses import dominance_test, late_consolidation_test
from .settings import EmotionConflictConfig
from .tables import conflict_items, rate

DEFECTS_OF: dict[EmotionEvidence, tuple[str, ...]] = {
    "lens": ("C6",),
    "patching": ("C1", "C3", "C4", "C10"),
}
MOST_UNDEFINED = 0.05
"""Share of the replicates that may lack a hand-off before its interval means nothing."""
WHAT_MOVES = {"text_swap": ("instruction", "its words"), "audio_swap": ("voice", "its audio")}


@dataclass(frozen=True)
class Claim:
    """A finding under a fixed name, so that two runs can be compared."""

    id: str
    rests_on: tuple[EmotionEvidence, ...]
    finding: Finding


def claims(
    tables: Tables,
    summaries: Tables,
    controls: pd.DataFrame,
    config: EmotionConflictConfig,
    n_blocks: int,
) -> list[Claim]:
    """All claims, in the order in which a reader wants them."""
    handoffs = summaries["handoffs"]
    found = [
        Claim("answer_follows", ("answers",), _answer_follows(summaries["ob1_flip_summary"])),
        Claim("H2_dominance", ("patching",), _dominance(tables, config)),
        Claim("H1_lens", ("lens",), _late_by_lens(tables, config, n_blocks)),
        Claim("H1_patching", ("patching",), _late_by_patching(tables, handoffs, n_blocks)),
        *(
            Claim(f"handoff_{donor}", ("patching",), _handoff(handoffs, donor, n_blocks))
            for donor in WHAT_MOVES
        ),
        Claim("naming_is_not_enough", ("answers",), _naming(tables["runs"], config)),
        Claim("voice_is_heard", ("answers",), _voice_is_heard(tables["runs"])),
    ]
    n_clips = tables["runs"]["clip"].nunique()
    return [_checked(claim, controls, config, n_clips) for claim in found]


def finding_by_id(found: Sequence[Claim]) -> dict[str, Finding]:
    """The findings under the claims' names."""
    return {claim.id: claim.finding for claim in found}


def _checked(
    claim: Claim, controls: pd.DataFrame, config: EmotionConflictConfig, n_clips: int
) -> Claim:
    """The claim, taken back if its control failed, a defect touches it, or clips are few.

    Many items of few clips are no evidence: what is sampled is clips.
    """
    concerned = controls[controls.part.isin(claim.rests_on)]
    failed = concerned[concerned.verdict == FAIL].control
    touching = {defect for part in claim.rests_on for defect in DEFECTS_OF.get(part, ())}
    defects = [defect for defect in config.known_defects() if defect in touching]
    reasons = [f"the control '{name}' failed" for name in failed]
    if n_clips < MIN_ITEMS <= claim.finding.n:
        reasons.append(f"only {n_clips} clips")
    reasons += [f"known defects {', '.join(defects)}"] if defects else []
    return replace(claim, finding=claim.finding.doubted(*reasons))


def _finding(
    claim: str,
    facts: str,
    why_not: dict[str, bool],
    *,
    numbers: tuple[float, float, float] = (np.nan, np.nan, np.nan),
    n: int = 0,
    unit: str,
) -> Finding:
    """``numbers`` are the estimate and its interval."""
    named = dict(zip(("mean", "low", "high", "n"), (*numbers, n), strict=True))
    return judged(claim, f"{facts}, n = {n}", why_not, numbers=named, unit=unit)


def _few(n: int) -> dict[str, bool]:
    return {f"only {n} items": n < MIN_ITEMS}


# --- Answers


def _answer_follows(flips: pd.DataFrame) -> Finding:
    among = flips[flips.among == "audio_only_correct"].set_index("measure")
    text, voice = among.loc["text_follow"], among.loc["audio_follow"]
    claim = "In conflict the answer follows the instruction"
    if voice.low > 0.5:
        claim = "In conflict the answer follows the voice"
    facts = (
        f"Instruction {_share(text)}, voice {_share(voice)}, among the items whose voice is "
        "recognised without an instruction"
    )
    undecided = not (text.low > 0.5 or voice.low > 0.5)
    why_not = {**_few(int(text.n)), "neither rate is surely above one half": undecided}
    numbers = (text.rate, text.low, text.high)
    return _finding(claim, facts, why_not, numbers=numbers, n=int(text.n), unit="rate")


def _voice_is_heard(runs: pd.DataFrame) -> Finding:
    alone = runs[runs.condition == "audio_only"]  # one run for each clip, however many targets
    row = pd.Series(rate(alone.prediction == alone.voice))
    chance = 1 / len(EMOTIONS)
    return _finding(
        "Without an instruction the model hears the voice's emotion",
        f"Correct in {_share(row)}",
        {**_few(int(row.n)), f"not surely above chance, {chance:g}": not row.low > chance},
        numbers=(row.rate, row.low, row.high),
        n=int(row.n),
        unit="rate",
    )


def _share(row: pd.Series) -> str:
    return f"{int(row.k)} of {int(row.n)}, {row.rate:.2f} [{row.low:.2f}, {row.high:.2f}]"


def _naming(runs: pd.DataFrame, config: EmotionConflictConfig) -> Finding:
    """Whether the instruction moves the answer more than the mere word does (C9)."""
    claim = "The instruction moves the answer, not the mere word"
    said = runs.assign(hit=(runs.prediction == runs.target).astype(float))
    hits = said[said.condition.isin(["conflict", "mention_only"])].pivot(
        index=["clip", "target"], columns="condition", values="hit"
    )
    if "mention_only" not in hits:
        return _finding(claim, "Not measured", {"no mention_only prompts": True}, unit="rate")
    gap = (hits["conflict"] - hits["mention_only"]).to_numpy()
    clips = hits.index.get_level_values("clip").tolist()
    found = bootstrap_mean(gap, seed=config.seed, n_resamples=config.n_resamples, clusters=clips)
    mean, low, high = float(found.mean), float(found.low), float(found.high)
    facts = (
        f"T is answered in {hits['conflict'].mean():.2f} when instructed and "
        f"{hits['mention_only'].mean():.2f} when only mentioned, difference {mean:.2f} "
        f"[{low:.2f}, {high:.2f}]"
    )
    why_not = {**_few(len(gap)), "the difference is not surely above 0": not low > 0}
    return _finding(claim, facts, why_not, numbers=(mean, low, high), n=len(gap), unit="rate")


# --- The two hypotheses


def _dominance(tables: Tables, config: EmotionConflictConfig) -> Finding:
    effects = total_effects(tables["patching"])
    if not {"text_swap", "audio_swap"} <= {*effects.columns}:
        return _finding(
            "The text dominates the voice",
            "TE(text) − TE(voice) was not measured",
            {"text and voice were not both swapped": True},
            unit="logits",
        )
    effects = effects.dropna(subset=["text_swap", "audio_swap"]).reset_index()
    items = conflict_items(tables["runs"])
    items = effects.merge(items, on=["clip", "target"])
    return dominance_test(
        items["text_swap"].to_numpy(np.float64),
        items["audio_swap"].to_numpy(np.float64),
        (items["audio_only"] == items["voice"]).to_numpy(bool),
        seed=config.seed,
        n_resamples=config.n_resamples,
        clusters=items["clip"].tolist(),
    )


def total_effects(patching: pd.DataFrame) -> pd.DataFrame:
    """Per item (clip, target) the total effect of every donor, positive towards its answer."""
    first = patching.drop_duplicates(["clip", "target", "donor"])
    return first.pivot(index=["clip", "target"], columns="donor", values="total_effect")


def _late_by_lens(tables: Tables, config: EmotionConflictConfig, n_blocks: int) -> Finding:
    runs = tables["runs"]
    runs = runs[runs.condition == "conflict"].reset_index(drop=True)
    labels = [f"z_{name}" for name in EMOTIONS]
    depths = tables["depths"].sort_values("depth")
    by_unit = {unit: part for unit, part in depths.groupby("unit")}
    scores = np.stack([by_unit[unit][labels].to_numpy(np.float64) for unit in runs.unit])
    if scores.shape[1] == n_blocks:  # the seed's lens stops before the output
        scores = np.concatenate([scores, runs[labels].to_numpy(np.float64)[:, None]], axis=1)
    order = list(EMOTIONS)
    pairs = np.stack([runs[who].map(order.index).to_numpy() for who in ("target", "voice")], 1)
    lens = "logit lens" if config.tuned_lens is None else "tuned lens"
    norm = lens if config.lens_norm == "final" else f"{lens} without the final norm"
    finding = late_consolidation_test(
        scores,
        pairs,
        seed=config.seed,
        n_resamples=config.n_resamples,
        clusters=runs["clip"].tolist(),
        readout=norm,
    ).finding
    return replace(finding, claim=f"{finding.claim}, by the lens")


def _late_by_patching(tables: Tables, handoffs: pd.DataFrame, n_blocks: int) -> Finding:
    """H1 by patching, for the side whose exchange moves the answer more."""
    claim = "The conflict is settled late, by patching"
    effects = total_effects(tables["patching"]).mean().abs().reindex([*WHAT_MOVES]).dropna()
    if effects.empty:
        return _finding(claim, "Not measured", {"neither side was exchanged": True}, unit="blocks")
    donor = str(effects.idxmax())
    what = WHAT_MOVES[donor][0]
    row = handoffs[(handoffs.donor == donor) & (handoffs.event == "leaves")].iloc[0]
    middle = (n_blocks - 1) / 2
    return _finding(
        claim,
        f"The {what}, whose exchange moves the answer most, is handed off at "
        f"{_block(row, n_blocks)}",
        {**_no_handoff(row), f"interval not past block {middle:g}": not row.low > middle},
        numbers=(row.block, row.low, row.high),
        n=int(row.n),
        unit="blocks",
    )


def _handoff(handoffs: pd.DataFrame, donor: str, n_blocks: int) -> Finding:
    what, source = WHAT_MOVES[donor]
    rows = handoffs[handoffs.donor == donor].set_index("event")
    if not {"leaves", "arrives"} <= {*rows.index}:
        claim = f"The {what} moves from {source} to the readout"
        return _finding(
            claim, "Where was not measured", {"not all of it was patched": True}, unit="blocks"
        )
    leaves, arrives = rows.loc["leaves"], rows.loc["arrives"]
    claim = f"The {what} moves from {source} to the readout"
    if np.isfinite(leaves.block):
        claim += f" by block {leaves.block:.0f}"
    return _finding(
        claim,
        f"It leaves {source} at {_block(leaves, n_blocks)} and is at the readout from "
        f"{_block(arrives, n_blocks)}",
        _no_handoff(leaves) | _no_handoff(arrives),
        numbers=(leaves.block, leaves.low, leaves.high),
        n=int(leaves.n),
        unit="blocks",
    )


def _block(row: pd.Series, n_blocks: int) -> str:
    if not np.isfinite(row.block):
        return "no block"
    return f"block {row.block:.0f} [{row.low:.0f}, {row.high:.0f}] of 0 to {n_blocks - 1}"


def _no_handoff(row: pd.Series) -> dict[str, bool]:
    n = int(row.n)
    is_unsure = n >= MIN_ITEMS and not row.undefined <= MOST_UNDEFINED
    return {
        f"only {n} items have a total effect to recover": n < MIN_ITEMS,
        "no such block in some resamples": is_unsure,
    }
