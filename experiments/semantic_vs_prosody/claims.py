"""What a ``semantic_vs_prosody`` run may establish, in sentences made from its numbers.

Source: seed 001, its conclusions; M-001-2 to M-001-8.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.label_scores import readable_depth

from ..materials.confounds import confounded
from ..workbench.claims import (
    MIN_ITEMS,
    Claim,
    Finding,
    around_zero,
    few,
    judged,
    not_measured,
    shown,
    within_rounding,
)
from .settings import SemanticVsProsodyConfig
from .tables import (
    ProsodyResults,
    cluster_labels,
    first_depth,
    mean_of,
    over_depths,
    pair_types,
    read_lens,
    read_patches,
)

MOST_UNDEFINED = 0.05
"""Share of the replicates that may lack a depth before its interval means nothing."""
WORDS_OF = {"semantic": "words", "prosody": "voice"}
UNITS = {"text": "sentences", "speaker": "speakers", "item": "clips"}
WHOSE = {"semantic": "words'", "prosody": "voice's"}


def _few(numbers: Mapping[Any, Any], config: SemanticVsProsodyConfig) -> dict[str, bool]:
    return few(numbers["n_clusters"], UNITS[config.cluster])


def _decides(run: ProsodyResults) -> Finding:
    """Which label the final answer is, by the model's own logits."""
    runs = run["runs"]
    words, voice = ((runs.prediction == runs[which]).astype(float) for which in WORDS_OF)
    gap = mean_of(run, words - voice, runs)
    side = "voice decides" if gap["mean"] < 0 else "words decide"
    facts = (
        f"The answer is the words' label in {words.mean():.2f} of the clips, the voice's in "
        f"{voice.mean():.2f}, another in {1 - words.mean() - voice.mean():.2f}; difference "
        f"{shown(gap)}, {len(runs)} clips of {gap['n_clusters']} {UNITS[run.config.cluster]}"
    )
    why_not = _few(gap, run.config) | around_zero(gap, "difference")
    why_not |= confounded(run["confounds"], run.config) if gap["mean"] < 0 else {}
    return judged(f"The {side} where the two disagree", facts, why_not, numbers=gap, unit="rate")


def _readable(run: ProsodyResults) -> Finding:
    """From which depth on the lens leans as the output does, and reads the output (C32)."""
    lens = read_lens(run)
    who, depths = first_depth(lens), lens.depth.unique()
    values, agrees = (over_depths(lens, column) for column in ("margin", "agrees"))
    outputs = run["runs"].set_index("item").top_token.loc[who["item"]]
    shares = pd.get_dummies(outputs).to_numpy(np.float64)

    def readable(means: np.ndarray) -> np.ndarray:
        margins, agreement, share = np.split(means, [len(depths), 2 * len(depths)], axis=1)
        return depths[0] + readable_depth(margins, agreement, share.max(axis=1))

    every = np.concatenate([values, agrees, shares], axis=1)
    found = run.draws.where(every, cluster_labels(run, who), readable)
    final = mean_of(run, values[:, -1], who)
    numbers = {"mean": found.at, "low": found.low, "high": found.high, "n": len(who)}
    side = "voice" if values[:, -1].mean() > 0 else "words"
    where = _depth(numbers, f" of 0 to {run.n_blocks}")
    facts = (
        f"The mean margin (voice minus words) is {shown(final)} logits at the last depth. It has "
        "its sign, and the lens' top token is the output's in half of the clips or more, and in "
        f"more than have the commonest output ({shares.mean(0).max():.2f}), from depth {where} on"
    )
    why_not = {
        **_few(final, run.config),
        **around_zero(final, "margin at the last depth"),
        "no such depth in some resamples": not found.undefined <= MOST_UNDEFINED,
    }
    why_not |= confounded(run["confounds"], run.config) if side == "voice" else {}
    from_depth = f" from depth {found.at:.0f} on" if np.isfinite(found.at) else ""
    claim = f"The lens reads the {side} ahead{from_depth}"
    return judged(claim, facts, why_not, numbers=numbers, unit="depth")


def _depth(numbers: Mapping[Any, Any], of: str = "") -> str:
    return f"{shown(numbers, 0)}{of}" if np.isfinite(numbers["mean"]) else "none"


def _moves(run: ProsodyResults) -> Finding | None:
    """Which exchange of whole recordings brings its target: the ceiling above the base rate (C7).

    Over the sentences (speakers, clips) that are a base of both types.
    """
    pairs, config = run["pairs"], run.config
    if len(pair_types(run)) < 2:
        return None
    unit = "A" if config.cluster == "item" else config.cluster
    base, donor = (
        (pairs[f"{end}_prediction"] == pairs.target).astype(float) for end in ("base", "donor")
    )
    wide = pairs.assign(gain=donor - base).pivot_table("gain", index=unit, columns="type")
    wide = wide.dropna().reset_index()
    if not len(wide):
        claim = "Exchanging the words moves the answer otherwise than exchanging the voice"
        return not_measured(claim, f"no {config.cluster} is the base of both types", "rate")
    gap = mean_of(run, wide.semantic - wide.prosody, wide)
    rates = {which: mean_of(run, wide[which], wide) for which in WORDS_OF}
    more, less = list(WORDS_OF)[:: -1 if gap["mean"] < 0 else 1]
    claim = (
        f"Exchanging the {WORDS_OF[more]} moves the answer, exchanging the {WORDS_OF[less]} less"
    )
    if not rates[less]["low"] > 0:  # which does not show that there is no effect at all
        claim += " or not at all"
    facts = (
        "B's own run says B's label more often than A's run does by "
        f"{shown(rates['semantic'])} where the words were exchanged and by "
        f"{shown(rates['prosody'])} where the voice was; difference {shown(gap)}, "
        f"{len(wide)} {UNITS[config.cluster]}"
    )
    why_not = {
        **_few(gap, config),
        **around_zero(gap, "difference"),
        f"the effect of the {WORDS_OF[more]} is not surely above 0": not rates[more]["low"] > 0,
    }
    why_not |= confounded(run["confounds"], run.config) if more == "prosody" else {}
    return judged(claim, facts, why_not, numbers=gap, unit="rate")


def _handoff(run: ProsodyResults, which: str) -> Finding:
    """Where the audio lets go of what was exchanged, and who has it then (M-001-8)."""
    table = run["handoffs"].rename(columns={"depth": "mean"})
    heirs = {row["span"]: row for row in table[table.type == which].to_dict("records")}
    audio = heirs.pop("audio")
    depth, n = audio["mean"], int(audio["n"])
    claim = f"The {WHOSE[which]} label leaves the audio span"
    why_not = few(n, "pairs whose answer the donor can move")
    facts = "It was not measured where it goes"
    if n:
        leaves = _depth(audio, f" of 0 to {run.n_blocks}")
        facts = f"Recovery of the audio stays below one half from depth {leaves}"
    if n >= MIN_ITEMS:
        claim += f" by depth {depth:.0f}" if np.isfinite(depth) else ""
        why_not |= _few(audio, run.config)
        why_not["no such depth in some resamples"] = not audio["undefined"] <= MOST_UNDEFINED
        why_not["the audio never has half of it"] = audio["recovery"] < 0.5
        why_not["no other span was patched"] = not heirs
        why_not |= _within_rounding(run, which)
        why_not |= confounded(run["confounds"], run.config) if which == "prosody" else {}
        if heirs and np.isfinite(depth):
            taken = _taken(run["recovery"], which, depth)
            facts += f", where those of the other spans add up to {taken:.2f}"
            why_not["the other spans have less than half of it there"] = taken < 0.5
        facts += "".join(f"; {_heir(row)}" for row in heirs.values())
    return judged(claim, f"{facts}; {n} pairs", why_not, numbers=audio, unit="depth")


def _within_rounding(run: ProsodyResults, which: str) -> dict[str, bool]:
    """A hand-off is where half of the effect has gone."""
    cells = read_patches(run)
    pairs = cells[cells.movable & (cells.type == which)].drop_duplicates("pair_id")
    return within_rounding(pairs.total, pairs.noise, "logits")


def _taken(recovery: pd.DataFrame, which: str, depth: float) -> float:
    """What other spans have where the audio lets go.

    Not what one of them has at its best: at the last depth the readout has everything (I5). Nor
    what all positions together have, which is everything at every depth (I4).
    """
    there = recovery[(recovery.type == which) & (recovery.depth == depth)]
    return float(there[~there.span.isin(["audio", "all"])]["mean"].sum())


def _heir(row: Mapping[Any, Any]) -> str:
    span, most = row["span"], row["recovery"]
    if most < 0.1:
        return f"the {span} never has more than {max(most, 0):.2f}"
    if row["event"] == "arrives":
        return f"that of the {span} stays at one half or above from depth {_depth(row)}"
    return f"that of the {span} is largest, {most:.2f}, at depth {_depth(row)}"


CLAIMS = (
    Claim(name="decides", rests_on=("runs",), judge=_decides),
    Claim(name="readable_from", rests_on=("lens",), judge=_readable),
    Claim(name="moves_the_answer", rests_on=("pairs",), judge=_moves),
    Claim(name="handoff_{}", rests_on=("patches",), judge=_handoff, per=pair_types),
)
