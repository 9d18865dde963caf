"""What an ``emotion_conflict`` run may establish, in sentences made from its numbers.

Source: seed 000, hypotheses H1 and H2; M-000-14.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from ..materials.conflict_claims import (
    handoff_finding,
    no_handoff,
    numbers_of,
    of_enough_clips,
    place_in_words,
)
from ..materials.conflict_runs import EXCHANGES
from ..materials.confounds import confounded
from ..workbench.claims import Claim, Finding, counted, few, shown, within_rounding
from ..workbench.intervals import rate
from .hypotheses import dominance_test, late_consolidation_test
from .tables import EmotionResults, conflict_items


def _share(row: pd.Series) -> str:
    return f"{int(row.k)} of {int(row.n)}, {row.rate:.2f} [{row.low:.2f}, {row.high:.2f}]"


# --- Answers


@of_enough_clips
def _answer_follows(run: EmotionResults) -> Finding:
    flips = run["ob1_flip_summary"]
    among = flips[flips.among == "audio_only_correct"].set_index("measure")
    text, voice = among.loc["text_follow"], among.loc["audio_follow"]
    side = "voice" if voice.low > 0.5 else "instruction"
    undecided = not (text.low > 0.5 or voice.low > 0.5)
    could_be_else = confounded(run["confounds"], run.config) if side == "voice" else {}
    return counted(
        f"In conflict the answer follows the {side}",
        f"Instruction {_share(text)}, voice {_share(voice)}, among the items whose voice is "
        "recognised without an instruction",
        {**few(text.n), "neither rate is surely above one half": undecided, **could_be_else},
        numbers_of(text, "rate"),
        "rate",
    )


@of_enough_clips
def _voice_is_heard(run: EmotionResults) -> Finding:
    runs = run["runs"]
    alone = runs[runs.condition == "audio_only"]  # one run for each clip, however many targets
    row = pd.Series(rate(alone.prediction == alone.voice))
    chance = 1 / len(run.inputs["labels"])
    return counted(
        f"Without an instruction the model hears the voice's {run.config.label_column}",
        f"Correct in {_share(row)}",
        {
            **few(row.n),
            f"not surely above chance, {chance:g}": not row.low > chance,
            **confounded(run["confounds"], run.config),
        },
        numbers_of(row, "rate"),
        "rate",
    )


@of_enough_clips
def _naming(run: EmotionResults) -> Finding:
    """Whether the instruction moves the answer more than the mere word does (C9)."""
    claim = "The instruction moves the answer, not the mere word"
    runs = run["runs"]
    said = runs.assign(hit=(runs.prediction == runs.target).astype(float))
    hits = said[said.condition.isin(["conflict", "mention_only"])].pivot(
        index=["clip", "target"], columns="condition", values="hit"
    )
    if "mention_only" not in hits:
        return counted(claim, "Not measured", {"no mention_only prompts": True}, {}, "rate")
    gap = (hits["conflict"] - hits["mention_only"]).to_numpy()
    found = run.draws.row(gap, hits.index.get_level_values("clip").tolist())
    return counted(
        claim,
        f"T is answered in {hits['conflict'].mean():.2f} when instructed and "
        f"{hits['mention_only'].mean():.2f} when only mentioned, difference {shown(found)}",
        {**few(len(gap)), "the difference is not surely above 0": not found["low"] > 0},
        found,
        "rate",
    )


# --- The two hypotheses


def total_effects(patching: pd.DataFrame) -> pd.DataFrame:
    """Per item (clip, target) the total effect of every donor, positive towards its answer."""
    first = patching.drop_duplicates(["clip", "target", "donor"])
    return first.pivot(index=["clip", "target"], columns="donor", values="total_effect")


@of_enough_clips
def _dominance(run: EmotionResults) -> Finding:
    effects = total_effects(run["patching"])
    if not {*EXCHANGES} <= {*effects.columns}:
        claim, facts = "The text dominates the voice", "TE(text) − TE(voice) was not measured"
        why_not = {"text and voice were not both swapped": True}
        return counted(claim, facts, why_not, {}, "logits")
    items = effects.dropna(subset=[*EXCHANGES]).reset_index()
    items = items.merge(conflict_items(run["runs"]), on=["clip", "target"])
    finding = dominance_test(
        items["text_swap"].to_numpy(np.float64),
        items["audio_swap"].to_numpy(np.float64),
        (items["audio_only"] == items["voice"]).to_numpy(bool),
        run.draws,
        clusters=items["clip"].tolist(),
    )
    is_voice = finding.estimate < 0
    return finding.doubted(
        *(
            why
            for why, holds in confounded(run["confounds"], run.config).items()
            if holds and is_voice
        )
    )


@of_enough_clips
def _late_by_lens(run: EmotionResults) -> Finding:
    runs = run["runs"][run["runs"].condition == "conflict"]
    names = run.inputs["labels"]
    labels = [f"z_{name}" for name in names]
    wide = run["depths"].pivot(index="unit", columns="depth", values=labels).loc[runs.unit]
    scores = wide.to_numpy(np.float64).reshape(len(runs), len(labels), -1).swapaxes(1, 2)
    if scores.shape[1] == run.n_blocks:  # the seed's lens stops before the output
        scores = np.concatenate([scores, runs[labels].to_numpy(np.float64)[:, None]], axis=1)
    pairs = np.stack([runs[who].map(names.index) for who in ("target", "voice")], axis=1)
    lens = "logit lens" if run.config.tuned_lens is None else "tuned lens"
    finding = late_consolidation_test(
        scores,
        pairs,
        run.draws,
        clusters=runs["clip"].tolist(),
        readout=lens + (" without the final norm" if run.config.lens_norm == "none" else ""),
    ).finding
    return replace(finding, claim=f"{finding.claim}, by the lens")


@of_enough_clips
def _late_by_patching(run: EmotionResults) -> Finding:
    """H1 by patching, for the side whose exchange moves the answer more."""
    claim = "The conflict is settled late, by patching"
    effects = total_effects(run["patching"]).mean().abs().reindex([*EXCHANGES]).dropna()
    if effects.empty:
        return counted(claim, "Not measured", {"neither side was exchanged": True}, {}, "blocks")
    donor = str(effects.idxmax())
    row = run["handoffs"].set_index(["donor", "event"]).loc[donor, "leaves"]
    middle = (run.n_blocks - 1) / 2
    return counted(
        claim,
        f"The {EXCHANGES[donor].what}, whose exchange moves the answer most, is handed off at "
        f"{place_in_words(row, 'block', run.n_blocks - 1)}",
        {
            **no_handoff(row, "block"),
            **_within_rounding(run, donor),
            f"interval not past block {middle:g}": not row.low > middle,
        },
        numbers_of(row, "block"),
        "blocks",
    )


@of_enough_clips
def _handoff(run: EmotionResults, donor: str) -> Finding:
    return handoff_finding(
        run["handoffs"], donor, "block", run.n_blocks - 1,
        _within_rounding(run, donor)
        | (confounded(run["confounds"], run.config) if donor == "audio_swap" else {}),
    )  # fmt: skip


def _within_rounding(run: EmotionResults, donor: str) -> dict[str, bool]:
    """A hand-off is where half of the effect has gone."""
    patching = run["patching"]
    items = patching[patching.donor == donor].drop_duplicates(["clip", "target"])
    return within_rounding(items.total_effect, items.noise, "logits")


CLAIMS = (
    Claim(name="answer_follows", rests_on=("runs",), judge=_answer_follows),
    Claim(name="H2_dominance", rests_on=("patching", "runs"), judge=_dominance),
    Claim(name="H1_lens", rests_on=("depths", "runs"), judge=_late_by_lens),
    Claim(name="H1_patching", rests_on=("patching",), judge=_late_by_patching),
    Claim(name="handoff_{}", rests_on=("patching",), judge=_handoff, per=lambda run: [*EXCHANGES]),
    Claim(name="naming_is_not_enough", rests_on=("runs",), judge=_naming),
    Claim(name="voice_is_heard", rests_on=("runs",), judge=_voice_is_heard),
)
