"""Acceptance: what was measured of a pair, the bound it has to keep, and the verdict.

A pair is accepted if none of its criteria fails, and none of its set's, which are judged over the
pairs that pass their own. A criterion that cannot be measured is not applicable, and says so.

Source: M-MP.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.bootstrap import wilson
from hooked_alm.methods.statistics.probing import held_out_probabilities
from hooked_alm.methods.statistics.significance import sign_flip_test

from ..workbench.controls import FAIL, PASS, SKIPPED
from ..workbench.intervals import Draws, numbers
from ..workbench.results import Row
from .pair_candidates import Candidate, PairMaterial
from .pair_settings import MOVES

EVERY = "(all)"
"""Stands for the pair where a criterion is the set's."""
LEAK_P = 0.05
SAME_DB = 0.01
"""Levels this close are the same: what rounding to 16 bits does to quiet clips."""
N_REFITS = 20
"""Fits to drawn groups, whose spread is the interval of what a probe says."""
NO_SHIFT = 0.02
"""Mean change of a probe's probability that is none, however surely it is measured."""
ACCEPTANCE = ["attribute", "pair", "criterion", "measured", "low", "high", "bound", "verdict"]
PROBES = ["column", "grouped_by", "n", "accuracy", "low", "high", "chance", "reads"]
SOUND = ("frames", "tokens", "rms_dbfs", "f0_median_hz", "f0_mean_hz", "f0_std_hz")


class ProbeReading(NamedTuple):
    """What held-out probes of a column read off every clip."""

    probabilities: Float[np.ndarray, "fit clip value"]
    names: Sequence[str]
    """Values in their order."""
    values: "pd.Series[Any]"
    """What each clip should be read as; empty where that is not known."""

    def changes(self, one: Candidate) -> Float[np.ndarray, " fit"]:
        """By how much the probability of clip a's own value changes from a to b, by every fit."""
        if not (value := self.values[one.a.name]):
            return np.full(len(self.probabilities), np.nan)
        own = self.probabilities[:, :, [*self.names].index(value)]
        a, b = (self.values.index.get_loc(clip.name) for clip in (one.a, one.b))
        return own[:, b] - own[:, a]

    def change(self, one: Candidate) -> float:
        """The change by the fit on all."""
        return float(self.changes(one)[0])


class Accepted(NamedTuple):
    """What acceptance comes to, as tables."""

    pairs: pd.DataFrame
    """A row per candidate: its clips, what was measured of both, and whether it is accepted."""
    acceptance: pd.DataFrame
    """A row per criterion of a pair or of a set."""
    probes: pd.DataFrame
    """A row per column that probes read."""


def accept(material: PairMaterial, clips: pd.DataFrame, draws: Draws) -> Accepted:
    """Accepts or rejects every candidate.

    Args:
        material: that candidates are made of.
        clips: what was measured of every version.
        draws: behind intervals.
    """
    clips = clips.set_index("clip")
    readings, probes = read_by_probes(material, clips)
    pairs = pd.DataFrame([_pair_row(one, material, clips, readings) for one in material.candidates])
    rows: list[Row] = []
    for one, pair in zip(material.candidates, pairs.to_dict("records"), strict=True):
        changes = {c: read.changes(one) for c, read in readings.items() if not _own(one, c)}
        rows += [{"pair": one.id, **row} for row in _criteria(one, pair, changes, material)]
    failed = {row["pair"] for row in rows if row["verdict"] == FAIL}
    by_id = {one.id: one for one in material.candidates}
    for attribute, some in pairs[~pairs.pair.isin(failed)].groupby("attribute", sort=False):
        of_set = [by_id[pair] for pair in some.pair]
        for row in _of_set(of_set, some, readings, draws):
            rows.append({"pair": EVERY, "attribute": attribute, **row})
            failed |= {*some.pair} if row["verdict"] == FAIL else set()
    pairs["accepted"] = ~pairs.pair.isin(failed)
    return Accepted(pairs, pd.DataFrame(rows)[ACCEPTANCE], probes)


def _pair_row(
    one: Candidate, material: PairMaterial, clips: pd.DataFrame, readings: dict[str, ProbeReading]
) -> Row:
    """What is known of a pair, and what was measured of both its clips."""
    recording = one.a.recording
    own = [read.change(one) for column, read in readings.items() if _own(one, column)]
    measured = {
        f"{name}_{side}": clips.at[version.name, name]
        for name in SOUND
        for side, version in (("a", one.a), ("b", one.b))
    }
    return {
        "pair": one.id, "attribute": one.attribute, "family": one.family, "kind": one.kind,
        "group": one.group, "clip_a": one.a.name, "clip_b": one.b.name, "label_a": one.labels[0],
        "label_b": one.labels[1], "speaker": material.value(recording, "speaker"),
        "text": material.value(recording, "text"), **measured,
        "snr_db": clips.at[one.b.name, "snr_db"], "own_probe": own[0] if own else np.nan,
    }  # fmt: skip


def _criteria(
    one: Candidate, pair: Row, changes: dict[str, np.ndarray], material: PairMaterial
) -> Iterator[Row]:
    """The criteria of a pair, each with its verdict; of a probe, with the interval of its fits."""
    config, moved = material.config, MOVES.get(one.kind, ())
    f0 = [pair[f"f0_median_hz_{side}"] for side in "ab"]
    bounds: list[tuple[str, int | float, int | float]] = [
        ("frames", pair["frames_b"] - pair["frames_a"], 0),
        ("audio tokens", pair["tokens_b"] - pair["tokens_a"], 0),
        ("level", pair["rms_dbfs_b"] - pair["rms_dbfs_a"], config.max_level_db),
        ("SNR", pair["snr_db"] - config.snr_db, config.max_snr_db),
        ("F0", 12 * float(np.log2(f0[1] / f0[0])), config.max_f0_st),
    ]
    for criterion, found, bound in bounds:
        verdict = _verdict(found, bound)
        if criterion in moved or (criterion == "SNR" and one.kind != "noise"):
            verdict = SKIPPED
        yield {
            "attribute": one.attribute, "criterion": criterion, "measured": float(found),
            "low": np.nan, "high": np.nan, "bound": float(bound), "verdict": verdict,
        }  # fmt: skip
    for column, fits in changes.items():
        low, high = np.quantile(fits, [0.025, 0.975])
        nearest = max(low, -high, 0.0)  # to no change, of what the fits say
        yield {
            "attribute": one.attribute, "criterion": f"probe: {column}", "measured": fits[0],
            "low": low, "high": high, "bound": config.max_probe_change,
            "verdict": _verdict(nearest, config.max_probe_change),
        }  # fmt: skip


def _verdict(found: int | float, bound: int | float) -> str:
    if np.isnan(found):
        return SKIPPED
    return PASS if abs(found) <= bound else FAIL


def _of_set(
    candidates: Sequence[Candidate],
    pairs: pd.DataFrame,
    readings: dict[str, ProbeReading],
    draws: Draws,
) -> Iterator[Row]:
    """The criteria of a set: no label goes with a level, and no probe moves all one way."""
    kind = candidates[0].kind
    p = level_leak(pairs, draws.seed)
    is_judged = "level leak" not in MOVES.get(kind, ()) and not np.isnan(p)
    leaks = {True: FAIL, False: PASS}[p < LEAK_P] if is_judged else SKIPPED
    ends = {"low": np.nan, "high": np.nan}
    yield {"criterion": "level leak", "measured": p, **ends, "bound": LEAK_P, "verdict": leaks}
    for column, read in readings.items():
        if not _own(candidates[0], column):
            changes = [read.change(one) for one in candidates]
            found = draws.row(changes, [one.group for one in candidates])
            mean, low, high = (found[name] for name in ("mean", "low", "high"))
            is_sure = not low <= 0 <= high and abs(mean) > NO_SHIFT
            verdict = SKIPPED if np.isnan(low) else FAIL if is_sure else PASS
            about = {"measured": mean, "low": low, "high": high, "bound": NO_SHIFT}
            yield {"criterion": f"probe shift: {column}", **about, "verdict": verdict}


def level_leak(pairs: pd.DataFrame, seed: int) -> float:
    """The p of labels that go with the louder or the softer clip of their pairs; NaN for too few.

    Of every label, the mean over its pairs of how much louder its clip is, by group; sign-flip
    tests, of which the least p is multiplied by their number (Bonferroni). NaN where no sample of
    the size could give `LEAK_P`.
    """
    louder = (pairs.rms_dbfs_b - pairs.rms_dbfs_a).where(lambda d: d.abs() >= SAME_DB, 0.0)
    labels = [*dict.fromkeys([*pairs.label_a, *pairs.label_b])]
    found = []
    for label in labels:
        side = (pairs.label_b == label).astype(int) - (pairs.label_a == label).astype(int)
        means = (louder * side)[side != 0].groupby(pairs.group).mean().to_numpy(np.float64)
        if 2.0 ** (1 - len(means)) * len(labels) <= LEAK_P:
            found.append(sign_flip_test(means, seed=seed).p if means.any() else 1.0)
    return min(1.0, len(labels) * min(found)) if found else np.nan


# --- Probes


def _own(one: Candidate, column: str) -> bool:
    """Whether the pair is there to differ in what a probe of the column reads."""
    return column == {"word": "text", "label": one.a.recording.label_column}.get(one.kind)


def read_by_probes(
    material: PairMaterial, clips: pd.DataFrame
) -> tuple[dict[str, ProbeReading], pd.DataFrame]:
    """What held-out probes read off every clip, for the columns that they can read; and how well.

    A probe is trained on the recordings as they are. Its groups are speakers, else texts, else
    labels: the first of which every value of the column has two or more; else single recordings.
    A probe that is not surely above the share of the commonest value reads nothing.

    Returns:
        Column -> what its probe reads; and a row per probe.
    """
    config, found, rows = material.config, dict[str, ProbeReading](), []
    states = np.array(clips.state.tolist(), np.float64)
    owners = {one.name: one.recording for one in material.versions}
    for column in (*config.others, config.attribute):
        values = pd.Series({name: material.value(own, column) for name, own in owners.items()})
        values = values.loc[clips.index]
        plain = (clips.change == "") & (values != "")
        if values[plain].nunique() < 2 or values[plain].value_counts().min() < 2:
            continue
        by = _grouping(material, column, values[plain])
        groups = pd.Series({k: material.value(own, by) or own.name for k, own in owners.items()})
        groups = groups.loc[clips.index]
        codes, names = values[plain].factorize()
        known = groups.where(groups.isin({*groups[plain]}), groups[plain].iloc[0]).tolist()
        fit = partial(
            held_out_probabilities, states[plain], codes.astype(np.int64), groups[plain].tolist(),
            states, known, seed=config.seed,
        )  # fmt: skip
        is_right = fit()[0, plain].argmax(axis=1) == codes
        right = numbers(wilson(int(is_right.sum()), n := len(is_right)))
        chance = values[plain].value_counts().max() / n
        reads = bool(right["low"] > chance)
        rows.append({
            "column": column, "grouped_by": by or "recording", "n": n, "accuracy": right["mean"],
            "low": right["low"], "high": right["high"], "chance": chance, "reads": reads,
        })  # fmt: skip
        if reads:
            found[column] = ProbeReading(fit(n_refits=N_REFITS), names.tolist(), values)
    return found, pd.DataFrame(rows, columns=PROBES)


def _grouping(material: PairMaterial, column: str, values: "pd.Series[Any]") -> str:
    """The column of a probe's groups; empty where each recording is its own."""
    recordings = {one.name: one for one in material.recordings}
    for by in ("speaker", "text", material.config.attribute):
        groups = [material.value(recordings[name], by) for name in values.index]
        counts = pd.DataFrame({"value": values.to_numpy(), "group": groups}).drop_duplicates()
        if by != column and all(groups) and counts.groupby("value").size().min() >= 2:
            return by
    return ""
