"""What a ``semantic_vs_prosody`` run says: findings in words, made from its tables.

A claim that rests on a failed control, or on a measurement with a known defect, is not established.

Source: seed document 001, its conclusions; methods cards M-001-2 to M-001-8.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.bootstrap import bootstrap_mean, resampled_means

from ..workbench.controls import FAIL
from ..workbench.experiment import Tables
from ..workbench.findings import MIN_ITEMS, Finding, judged, shown
from .controls import ProsodyEvidence
from .flips import margin, readable_depth
from .settings import SemanticVsProsodyConfig
from .tables import cluster_labels, label_index, lens_scores

DEFECTS_OF: dict[ProsodyEvidence, tuple[str, ...]] = {
    "lens": ("C6", "C32", "M-001-2"),
    "patching": ("C7", "C31", "M-001-5", "M-001-8"),
}
MOST_UNDEFINED = 0.05
"""Share of the replicates that may lack a depth before its interval means nothing."""
WORDS_OF = {"semantic": "words", "prosody": "voice"}
UNITS = {"text": "sentences", "speaker": "speakers", "item": "clips"}
WHOSE = {"semantic": "words'", "prosody": "voice's"}


def findings(
    tables: Tables,
    summaries: Tables,
    controls: pd.DataFrame,
    config: SemanticVsProsodyConfig,
    n_blocks: int,
) -> dict[str, Finding]:
    """Every claim of the report, by name."""
    types = list(dict.fromkeys(tables["pairs"].type))
    found: dict[str, tuple[Finding, tuple[ProsodyEvidence, ...]]] = {
        "decides": (_decides(tables["runs"], config), ()),
        "readable_from": (_readable(tables, config, n_blocks), ("lens",)),
    }
    if len(types) > 1:
        found["moves_the_answer"] = (_moves(tables["pairs"], config), ())
    for which in types:
        found[f"handoff_{which}"] = (_handoff(summaries, which, n_blocks, config), ("patching",))
    return {name: _checked(one, parts, controls, config) for name, (one, parts) in found.items()}


def _checked(
    one: Finding,
    parts: Sequence[ProsodyEvidence],
    controls: pd.DataFrame,
    config: SemanticVsProsodyConfig,
) -> Finding:
    """The claim, taken back if one of its controls failed or a defect touches it."""
    failed = controls[controls.part.isin(parts) & (controls.verdict == FAIL)].control
    touching = {defect for part in parts for defect in DEFECTS_OF[part]}
    defects = [defect for defect in config.known_defects() if defect in touching]
    reasons = [f"the control '{name}' failed" for name in failed]
    reasons += [f"known defects {', '.join(defects)}"] if defects else []
    return one.doubted(*reasons)


def _gap(
    values: np.ndarray, table: pd.DataFrame, config: SemanticVsProsodyConfig
) -> dict[str, float]:
    clusters = cluster_labels(table, config)
    found = bootstrap_mean(
        values, seed=config.seed, n_resamples=config.n_resamples, clusters=clusters
    )
    ends = {"mean": float(found.mean), "low": float(found.low), "high": float(found.high)}
    return {**ends, "n": found.n, "n_clusters": len(set(clusters))}


def _few(numbers: Mapping[str, Any], config: SemanticVsProsodyConfig) -> dict[str, bool]:
    n = int(numbers["n_clusters"])
    return {f"only {n} {UNITS[config.cluster]}": n < MIN_ITEMS}


def _decides(runs: pd.DataFrame, config: SemanticVsProsodyConfig) -> Finding:
    """Which label the final answer is, by the model's own logits."""
    words, voice = ((runs.prediction == runs[which]).to_numpy(float) for which in WORDS_OF)
    gap = _gap(words - voice, runs, config)
    side = "voice decides" if gap["mean"] < 0 else "words decide"
    facts = (
        f"The answer is the words' emotion in {words.mean():.2f} of the clips, the voice's in "
        f"{voice.mean():.2f}, another in {1 - words.mean() - voice.mean():.2f}; difference "
        f"{shown(gap)}, {len(runs)} clips of {gap['n_clusters']} {UNITS[config.cluster]}"
    )
    undecided = not (gap["low"] > 0 or gap["high"] < 0)
    why_not = {**_few(gap, config), "the interval includes 0": undecided}
    return judged(f"The {side} where the two disagree", facts, why_not, numbers=gap, unit="rate")


def _readable(tables: Tables, config: SemanticVsProsodyConfig, n_blocks: int) -> Finding:
    """From which depth on the lens leans as the output does, and reads the output (C32)."""
    lens = tables["lens"]
    who, depths, scores = lens_scores(lens, config)
    values = margin(scores, label_index(who.semantic, config), label_index(who.prosody, config))
    agrees = lens.agrees.to_numpy(np.float64).reshape(values.shape)
    output = tables["runs"].set_index("item").top_token.loc[who["item"]]
    outputs = pd.get_dummies(output).to_numpy(np.float64)
    every = np.concatenate([values, agrees, outputs], axis=1)
    drawn = resampled_means(
        every,
        seed=config.seed,
        n_resamples=config.n_resamples,
        clusters=cluster_labels(who, config),
    )

    def readable(means: np.ndarray) -> np.ndarray:
        margins, agreement, shares = np.split(means, [len(depths), 2 * len(depths)], axis=1)
        return depths[0] + readable_depth(margins, agreement, shares.max(axis=1))

    mean, commonest = values.mean(0), outputs.mean(0).max()
    depth, found = float(readable(every.mean(0, keepdims=True))[0]), readable(drawn)
    undefined = float(np.isnan(found).mean())
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (np.nan, np.nan)
    final = _gap(values[:, -1], who, config)
    numbers = {"mean": depth, "low": float(low), "high": float(high), "n": len(who)}
    side = "voice" if mean[-1] > 0 else "words"
    facts = (
        f"The mean margin (voice minus words) is {shown(final)} logits at the last depth. It has "
        "its sign, and the lens' top token is the output's in half of the clips or more, and in "
        f"more than have the commonest output ({commonest:.2f}), from depth "
        f"{_depth(numbers, n_blocks)} on"
    )
    why_not = {
        **_few(final, config),
        "the margin at the last depth includes 0": not (final["low"] > 0 or final["high"] < 0),
        "no such depth in some resamples": not undefined <= MOST_UNDEFINED,
    }
    claim = f"The lens reads the {side} ahead from depth {depth:.0f} on"
    if not np.isfinite(depth):
        claim = f"The lens reads the {side} ahead"
    return judged(claim, facts, why_not, numbers=numbers, unit="depth")


def _depth(numbers: Mapping[str, Any], n_blocks: int) -> str:
    if not np.isfinite(numbers["mean"]):
        return "none"
    return f"{numbers['mean']:.0f} [{numbers['low']:.0f}, {numbers['high']:.0f}] of 0 to {n_blocks}"


def _moves(pairs: pd.DataFrame, config: SemanticVsProsodyConfig) -> Finding:
    """Which exchange of whole recordings brings its target: the ceiling above the base rate (C7).

    Over the sentences (speakers, clips) that are a base of both types.
    """
    unit = "A" if config.cluster == "item" else config.cluster
    gain = (pairs.donor_prediction == pairs.target).astype(float) - (
        pairs.base_prediction == pairs.target
    ).astype(float)
    wide = pairs.assign(gain=gain).pivot_table(
        index=unit, columns="type", values="gain", aggfunc="mean"
    )
    wide = wide.dropna().reset_index()
    if not len(wide):
        why = {f"no {config.cluster} is the base of both types of pairs": True}
        claim = "Exchanging the words moves the answer otherwise than exchanging the voice"
        return judged(claim, "Not measured", why, numbers={}, unit="rate")
    gap = _gap((wide.semantic - wide.prosody).to_numpy(), wide, config)
    rates = {which: _gap(wide[which].to_numpy(), wide, config) for which in WORDS_OF}
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
    undecided = not (gap["low"] > 0 or gap["high"] < 0)
    why_not = {
        **_few(gap, config),
        "the difference includes 0": undecided,
        f"the effect of the {WORDS_OF[more]} includes 0": not rates[more]["low"] > 0,
    }
    return judged(claim, facts, why_not, numbers=gap, unit="rate")


def _handoff(
    summaries: Tables, which: str, n_blocks: int, config: SemanticVsProsodyConfig
) -> Finding:
    """Where the audio lets go of what was exchanged, and who has it then (M-001-8)."""
    rows = summaries["handoffs"]
    rows = rows[rows.type == which].set_index("span")
    leaves = _numbers(rows.loc["audio"])
    claim = f"The {WHOSE[which]} emotion leaves the audio span"
    n = int(leaves["n"])
    why_not = {f"only {n} pairs whose answer the donor can move": n < MIN_ITEMS}
    facts = "It was not measured where it goes"
    if n:
        facts = f"Recovery of the audio stays below one half from depth {_depth(leaves, n_blocks)}"
    if n >= MIN_ITEMS:
        claim += f" by depth {leaves['mean']:.0f}" if np.isfinite(leaves["mean"]) else ""
        audio, heirs = rows.loc["audio"], rows[rows.index != "audio"]
        why_not |= _few({"n_clusters": audio.n_clusters}, config)
        why_not["no such depth in some resamples"] = not audio.undefined <= MOST_UNDEFINED
        why_not["the audio never has half of it"] = audio.recovery < 0.5
        why_not["no other span was patched"] = not len(heirs)
        if len(heirs) and np.isfinite(leaves["mean"]):
            taken = _taken(summaries["recovery"], which, leaves["mean"])
            facts += f", where those of the other spans add up to {taken:.2f}"
            why_not["the other spans have less than half of it there"] = taken < 0.5
        facts += "".join(f"; {_heir(span, row)}" for span, row in heirs.iterrows())
    numbers = leaves | {"n": n}
    return judged(claim, f"{facts}; {n} pairs", why_not, numbers=numbers, unit="depth")


def _taken(recovery: pd.DataFrame, which: str, depth: float) -> float:
    """What others have where the audio lets go.

    Not what one of them has at its best: at the last depth the readout has everything (I5).
    """
    there = recovery[(recovery.type == which) & (recovery.depth == depth)]
    return float(there[~there.span.isin(["audio", "all"])]["mean"].sum())


def _numbers(row: pd.Series) -> dict[str, Any]:
    return {"mean": row.depth, "low": row.low, "high": row.high, "n": row.n}


def _heir(span: Any, row: pd.Series) -> str:
    if row.recovery < 0.1:
        return f"the {span} never has more than {max(row.recovery, 0):.2f}"
    at = "none"
    if np.isfinite(row.depth):
        at = f"{row.depth:.0f} [{row.low:.0f}, {row.high:.0f}]"
    if row.event == "arrives":
        return f"that of the {span} stays at one half or above from depth {at}"
    return f"that of the {span} is largest, {row.recovery:.2f}, at depth {at}"
