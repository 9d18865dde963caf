"""The tables of a ``semantic_vs_prosody`` run -> summary tables with their intervals.

Nothing here draws or writes. Intervals resample sentences, speakers or clips, as the run's settings
say. A *movable* pair is one whose donor says the target and whose base does not: only there can a
patch bring the target (correction C7).

Source: seed document 001; methods cards M-001-1 to M-001-8, blocks S-7 and S-11.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from hooked_alm.audio import decode_file
from hooked_alm.methods.statistics.bootstrap import Interval, bootstrap_mean, resampled_means

from ..materials.acoustics import describe_clip
from ..workbench.experiment import Tables
from .flips import (
    WINNERS,
    Delta,
    Labels,
    flip_rates,
    handoff_depth,
    margin,
    target_recovery,
    target_shift,
    wins,
)
from .items import SpokenItem
from .settings import SemanticVsProsodyConfig

FORMS: tuple[Delta, ...] = get_args(Delta)
FIDELITY = ("kl", "agrees", "entropy", "residual_norm", "label_mass", "best_label_rank")


class Sweeps(NamedTuple):
    """The patches of one type of pairs, as arrays over pairs, spans and depths."""

    pairs: pd.DataFrame
    spans: list[str]
    depths: list[int]
    scores: Float[np.ndarray, "pair span depth label"]
    base: Float[np.ndarray, "pair label"]
    donor: Float[np.ndarray, "pair label"]
    target: Labels

    @property
    def movable(self) -> Bool[np.ndarray, " pair"]:
        """The donor says the target, the base does not."""
        found = (self.base.argmax(1) != self.target) & (self.donor.argmax(1) == self.target)
        return np.asarray(found)


def summarise(
    tables: Tables, config: SemanticVsProsodyConfig, items: Sequence[SpokenItem]
) -> dict[str, pd.DataFrame]:
    """Every summary of a run, by the name of its file."""
    sweeps = {
        str(which): sweeps_of(tables, str(which), config)
        for which in dict.fromkeys(tables["pairs"].type)
    }
    return {
        "manifest": manifest(items),
        "answers": answers(tables["runs"], config),
        "winrate_curve_conflict": win_curves(tables["lens"], config),
        "margin_curve_conflict": margin_curve(tables["lens"], config),
        "lens_fidelity": fidelity_curves(tables["lens"], config),
        "flip_rates": pd.concat([flips(one, which, config) for which, one in sweeps.items()]),
        "delta_logits": pd.concat([shifts(one, which, config) for which, one in sweeps.items()]),
        "recovery": pd.concat([recoveries(one, which, config) for which, one in sweeps.items()]),
        "handoffs": pd.concat([handoffs(one, which, config) for which, one in sweeps.items()]),
        "control_flips": control_flips(tables, config),
    }


def manifest(items: Sequence[SpokenItem]) -> pd.DataFrame:
    """Who says what how in which file, with length, level and pitch, which may give it away."""
    rows = []
    for item in items:
        channels, rate, _ = decode_file(item.path)
        rows.append(
            {
                "path": item.path.name,
                "semantic_label": item.semantic,
                "prosody_label": item.prosody,
                "speaker": item.speaker,
                "text": item.text,
                **asdict(describe_clip(channels.mean(axis=0), rate)),
                "sha256": item.sha256,
                "notes": "; ".join(item.notes),
            }
        )
    return pd.DataFrame(rows)


# --- Lens


def label_index(labels: pd.Series, config: SemanticVsProsodyConfig) -> Labels:
    """Labels as columns of the scores."""
    return np.array([list(config.labels).index(label) for label in labels], np.int64)


def lens_scores(
    lens: pd.DataFrame, config: SemanticVsProsodyConfig
) -> tuple[pd.DataFrame, list[int], Float[np.ndarray, "item depth label"]]:
    """What the items are, the depths, and the label scores."""
    who = lens.drop_duplicates("item").reset_index(drop=True)
    depths = sorted(lens.depth.unique().tolist())
    columns = [f"z_{name}" for name in config.labels]
    scores = lens[columns].to_numpy(np.float64).reshape(len(who), len(depths), len(columns))
    return who, depths, scores


def win_curves(lens: pd.DataFrame, config: SemanticVsProsodyConfig) -> pd.DataFrame:
    """Share of items whose best label is the words', the voice's or another, by depth."""
    who, depths, scores = lens_scores(lens, config)
    sides = label_index(who.semantic, config), label_index(who.prosody, config)
    shares = wins(scores, *sides, ties=config.ties)
    clusters = cluster_labels(who, config)
    rows = [
        {"winner": winner, "depth": depth, **point}
        for w, winner in enumerate(WINNERS)
        for depth, point in zip(depths, band(shares[:, :, w], clusters, config), strict=True)
    ]
    return pd.DataFrame(rows)


def margin_curve(lens: pd.DataFrame, config: SemanticVsProsodyConfig) -> pd.DataFrame:
    """Mean z[prosody] - z[semantic] by depth."""
    who, depths, scores = lens_scores(lens, config)
    values = margin(scores, label_index(who.semantic, config), label_index(who.prosody, config))
    points = band(values, cluster_labels(who, config), config)
    return pd.DataFrame([{"depth": d, **point} for d, point in zip(depths, points, strict=True)])


def fidelity_curves(lens: pd.DataFrame, config: SemanticVsProsodyConfig) -> pd.DataFrame:
    """How far the lens is from the output, and whether it reads emotion words at all, by depth."""
    who = lens.drop_duplicates("item")
    depths = sorted(lens.depth.unique().tolist())
    rows = []
    for measure in FIDELITY:
        values = lens[measure].to_numpy(np.float64).reshape(len(who), len(depths))
        points = band(values, cluster_labels(who, config), config)
        rows += [
            {"measure": measure, "depth": d, **point}
            for d, point in zip(depths, points, strict=True)
        ]
    return pd.DataFrame(rows)


def answers(runs: pd.DataFrame, config: SemanticVsProsodyConfig) -> pd.DataFrame:
    """What the final answer follows, over all items and by the words' and the voice's emotion."""
    hits = {
        "semantic": runs.prediction == runs.semantic,
        "prosody": runs.prediction == runs.prosody,
    }
    hits["other"] = ~(hits["semantic"] | hits["prosody"])
    strata: list[tuple[str, Bool[np.ndarray, " item"]]] = [("all", np.ones(len(runs), bool))]
    for which in ("semantic", "prosody"):
        strata += [
            (f"{which}={label}", (runs[which] == label).to_numpy())
            for label in config.labels
            if (runs[which] == label).any()
        ]
    rows = []
    for stratum, chosen in strata:
        part = runs[chosen]
        for answer, hit in hits.items():
            values = hit.to_numpy(np.float64)[chosen, None]
            point = band(values, cluster_labels(part, config), config)[0]
            rows.append({"stratum": stratum, "answer": answer, **point})
    return pd.DataFrame(rows)


# --- Patching


def sweeps_of(tables: Tables, which: str, config: SemanticVsProsodyConfig) -> Sweeps:
    """The patches of all pairs of a type."""
    pairs = tables["pairs"][tables["pairs"].type == which].reset_index(drop=True)
    patches = tables["patches"]
    patches = patches[patches.type == which]
    spans, depths = list(dict.fromkeys(patches.span)), sorted(patches.depth.unique().tolist())
    names = list(config.labels)
    scores = patches[[f"z_{name}" for name in names]].to_numpy(np.float64)
    scores = scores.reshape(len(pairs), len(depths), len(spans), len(names)).swapaxes(1, 2)
    base, donor = (
        pairs[[f"{end}_{name}" for name in names]].to_numpy(np.float64) for end in ("base", "donor")
    )
    return Sweeps(pairs, spans, depths, scores, base, donor, label_index(pairs.target, config))


def flips(sweeps: Sweeps, which: str, config: SemanticVsProsodyConfig) -> pd.DataFrame:
    """Flip rates by span and depth, with what they have to be compared with (M-001-6, C7)."""
    base, donor = sweeps.base.argmax(1), sweeps.donor.argmax(1)
    patched, target = sweeps.scores.argmax(-1), sweeps.target
    clusters = cluster_labels(sweeps.pairs, config)
    hits = (patched == target[:, None, None]).astype(np.float64)
    rows = []
    for s, span in enumerate(sweeps.spans):
        every = band(hits[:, s], clusters, config)
        movable = np.where(sweeps.movable[:, None], hits[:, s], np.nan)
        conditional = band(movable, clusters, config)
        for d, depth in enumerate(sweeps.depths):
            rates = asdict(flip_rates(base, donor, patched[:, s, d], target))
            ends = {
                f"{name}_{end}": point[d][end]
                for name, point in (("to_target", every), ("conditional", conditional))
                for end in ("low", "high")
            }
            n = {"n": len(target)}
            rows.append({"type": which, "span": span, "depth": depth, **rates, **ends, **n})
    return pd.DataFrame(rows)


def shifts(sweeps: Sweeps, which: str, config: SemanticVsProsodyConfig) -> pd.DataFrame:
    """Mean shift of the target in its three forms, by span and depth (M-001-7, C31)."""
    clusters = cluster_labels(sweeps.pairs, config)
    rows = []
    for form in FORMS:
        values = target_shift(sweeps.scores, sweeps.base, sweeps.target, form)
        for s, span in enumerate(sweeps.spans):
            points = band(values[:, s], clusters, config)
            rows += [
                {"type": which, "span": span, "depth": depth, "form": form, **point}
                for depth, point in zip(sweeps.depths, points, strict=True)
            ]
    return pd.DataFrame(rows)


def recovery_of(sweeps: Sweeps, config: SemanticVsProsodyConfig) -> np.ndarray:
    """Recovery ``[pair, span, depth]`` of movable pairs; NaN throughout for the others."""
    found = target_recovery(
        sweeps.scores, sweeps.base, sweeps.donor, sweeps.target, min_effect=config.min_effect
    )
    return np.where(sweeps.movable[:, None, None], found, np.nan)


def recoveries(sweeps: Sweeps, which: str, config: SemanticVsProsodyConfig) -> pd.DataFrame:
    """Mean recovery of movable pairs by span and depth."""
    values, clusters = recovery_of(sweeps, config), cluster_labels(sweeps.pairs, config)
    return pd.DataFrame(
        [
            {"type": which, "span": span, "depth": depth, **point}
            for s, span in enumerate(sweeps.spans)
            for depth, point in zip(
                sweeps.depths, band(values[:, s], clusters, config), strict=True
            )
        ]
    )


def handoffs(sweeps: Sweeps, which: str, config: SemanticVsProsodyConfig) -> pd.DataFrame:
    """Where the audio lets go for good (S-11), and what takes over.

    ``leaves``: the first depth from which the audio's mean recovery stays below one half.
    ``arrives``: the first from which the readout's stays at one half or above. ``passes``: the
    depth at which another span's recovery is largest, and how large. ``undefined`` is the share of
    the replicates without such a depth.
    """
    values = recovery_of(sweeps, config)
    kept = np.isfinite(values).all(axis=(1, 2))
    pairs, values = sweeps.pairs[kept], values[kept]
    clusters = cluster_labels(pairs, config)
    rows = []
    for s, span in enumerate(sweeps.spans):
        if span == "all":
            continue
        event = {"audio": "leaves", "readout": "arrives"}.get(span, "passes")
        row: dict[str, Any] = {"type": which, "span": span, "event": event}
        row |= dict.fromkeys(("depth", "low", "high", "recovery"), np.nan)
        row |= {"undefined": 1.0, "n": len(pairs), "n_clusters": len(set(clusters))}
        if len(pairs):
            mean = values[:, s].mean(axis=0)
            drawn = resampled_means(
                values[:, s], seed=config.seed, n_resamples=config.n_resamples, clusters=clusters
            )
            row |= _event(mean, drawn, sweeps.depths, event)
        rows.append(row)
    return pd.DataFrame(rows)


def _event(
    mean: Float[np.ndarray, " depth"],
    drawn: Float[np.ndarray, "resample depth"],
    depths: list[int],
    event: str,
) -> dict[str, float]:
    drawn = drawn[np.isfinite(drawn).all(axis=1)]  # NaN throughout for a single cluster
    if event == "passes":
        first, found = np.array([mean.argmax()]), drawn.argmax(axis=1).astype(np.float64)
    else:
        rising = event == "arrives"
        first = handoff_depth(mean[None], rising=rising)
        found = handoff_depth(drawn, rising=rising)
    # Depths are counted from that of the first point.
    first, found = first + depths[0], found[np.isfinite(found)] + depths[0]
    low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (np.nan, np.nan)
    return {
        "depth": float(first[0]),
        "low": float(low),
        "high": float(high),
        "recovery": float(mean.max()),
        "undefined": 1 - len(found) / len(drawn) if len(drawn) else 1.0,
    }


def control_flips(tables: Tables, config: SemanticVsProsodyConfig) -> pd.DataFrame:
    """What other donors do where a pair's donor brings the target: the floor, by depth.

    Over movable pairs: how often the base's audio, replaced by the control's, says the pair's
    target, and how often it no longer says what the base said.
    """
    columns = ["type", "control", "depth", "to_target", "low", "high", "from_base", "n"]
    if "controls" not in tables:
        return pd.DataFrame(columns=columns)
    rows = []
    for which in dict.fromkeys(tables["pairs"].type):
        sweeps = sweeps_of(tables, str(which), config)
        pairs = sweeps.pairs[sweeps.movable][["pair_id", "A", "target", "text", "speaker"]]
        cells = pairs.merge(tables["controls"][["item", "control", "depth", "prediction"]],
                            left_on="A", right_on="item")  # fmt: skip
        base = tables["runs"].set_index("item").prediction
        cells = cells.assign(
            hit=(cells.prediction == cells.target).astype(np.float64),
            left=(cells.prediction != cells["A"].map(base)).astype(np.float64),
        )
        for (control, depth), part in cells.groupby(["control", "depth"], sort=False):
            point = band(part.hit.to_numpy()[:, None], cluster_labels(part, config), config)[0]
            found = {"to_target": point["mean"], "low": point["low"], "high": point["high"]}
            row = {"type": which, "control": control, "depth": depth, **found}
            rows.append({**row, "from_base": float(part.left.mean()), "n": point["n"]})
    return pd.DataFrame(rows, columns=columns)


# --- Intervals


def cluster_labels(table: pd.DataFrame, config: SemanticVsProsodyConfig) -> list[Hashable]:
    """What each row is resampled with; of a pair, the base's."""
    column: str = config.cluster
    if column == "item" and "item" not in table:
        column = "A"
    return table[column].tolist()


def band(
    values: Float[np.ndarray, "item point"],
    clusters: Sequence[Hashable],
    config: SemanticVsProsodyConfig,
) -> list[dict[str, Any]]:
    """Mean curve with its pointwise interval; items with a NaN are left out and counted."""
    undefined = ~np.isfinite(values).all(axis=1)
    if undefined.all():
        nan = np.full(values.shape[1:], np.nan)
        found = Interval(
            mean=nan, low=nan, high=nan, n=0, n_omitted=len(values), method="no defined items"
        )
    else:
        found = bootstrap_mean(
            values,
            seed=config.seed,
            n_resamples=config.n_resamples,
            clusters=clusters,
            nan_policy="omit",
        )
    kept = {label for label, out in zip(clusters, undefined, strict=True) if not out}
    return [
        {
            "mean": float(found.mean[i]),
            "low": float(found.low[i]),
            "high": float(found.high[i]),
            "n": found.n,
            "n_undefined": found.n_omitted,
            "n_clusters": len(kept),
        }
        for i in range(values.shape[1])
    ]
