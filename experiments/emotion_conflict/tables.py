"""The tables of an ``emotion_conflict`` run -> summary tables with their intervals.

Nothing here draws or writes. An *item* is a clip with a target emotion T; intervals resample clips,
because a clip's items share everything but a word.

Source: seed document 000; methods cards M-000-1, M-000-6 to M-000-13, blocks S-7 and S-11.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.audio import decode_file
from hooked_alm.methods.statistics.bootstrap import (
    Interval,
    bootstrap_mean,
    handoff_index,
    resampled_means,
    wilson,
)

from ..materials.acoustics import describe_clip
from ..materials.ob1 import EMOTIONS
from ..materials.recordings import Recording
from ..workbench.experiment import Tables
from .critical_layer import CriticalMethod, critical_layer, critical_layer_interval
from .flips import RatioForm, flip_matrix, flip_summary, modality_attention_ratio
from .settings import EmotionConflictConfig

METHODS: tuple[CriticalMethod, ...] = get_args(CriticalMethod)
RATIOS: tuple[RatioForm, ...] = get_args(RatioForm)
STRATA = ("language", "voice", "intensity")
MEAN_CURVE = "(mean curve)"
"""Stands for the file in ``critical_layers`` where a row is about the mean over clips."""

PATCHING = (
    *("clip", "target", "voice", "donor", "donor_clip", "donor_named", "prompt_language", "named"),
    *("toward", "block", "span", "prediction", "flip", "shift", "recovery", "base"),
    "total_effect",
)
"""Columns of the table of patches that are read here, for a run without any donor."""
EXCHANGED = (
    ("text_swap", "text"),
    ("text_swap", "readout"),
    ("audio_swap", "audio"),
    ("audio_swap", "readout"),
)
"""Donor, and the spans between which the information that it exchanges moves."""


def summarise(
    tables: Tables, config: EmotionConflictConfig, recordings: Sequence[Recording], n_blocks: int
) -> dict[str, pd.DataFrame]:
    """Every summary of a run, by the name of its file."""
    options = {"seed": config.seed, "n_resamples": config.n_resamples}
    runs, items = tables["runs"], items_with_delta(tables)
    conflict = conflict_items(runs)
    return {
        "manifest": manifest(recordings),
        "delta_logit_curves": delta_curves(items, **options),
        "critical_layers": critical_layers(items, config, n_blocks),
        "accuracy": accuracy(items),
        "ob1_flip_summary": flip_summary(conflict),
        "flip_matrix": flip_cells(conflict),
        "lens_fidelity": lens_fidelity_curves(tables["depths"], runs, **options),
        "attention_summary": attention_summary(tables["attention"], runs, **options),
        "mar": (mar := attention_ratios(tables["attention"], runs)),
        "mar_summary": ratio_summary(mar, **options),
        "patching_summary": patching_summary(tables["patching"], **options),
        "handoffs": handoffs(tables["patching"], **options),
    }


def manifest(recordings: Sequence[Recording]) -> pd.DataFrame:
    """Who speaks how in which file, with level and pitch, which may give the emotion away."""
    rows = []
    for recording in recordings:
        channels, rate, _ = decode_file(recording.path)
        rows.append(
            {
                "path": recording.path.name,
                "language": recording.language,
                "emotion": recording.emotion,
                "intensity": recording.intensity,
                "sampling_rate": recording.sampling_rate,
                **asdict(describe_clip(channels.mean(axis=0), rate)),
                "sha256": recording.sha256,
                "notes": "; ".join(recording.notes),
                **recording.other,
            }
        )
    return pd.DataFrame(rows)


# --- Items and their curves


def items_with_delta(tables: Tables) -> pd.DataFrame:
    """One row per item, condition and depth: the contrast, the clip, the prediction."""
    return tables["delta"].merge(tables["runs"].drop(columns="target"), on="unit")


def curves(
    items: pd.DataFrame, x: str, y: str
) -> tuple[pd.DataFrame, Float[np.ndarray, "item x"], list[int]]:
    """What the items are, their curves, and the values of ``x``."""
    wide = items.pivot(index=["clip", "target"], columns=x, values=y)
    return wide.index.to_frame(index=False), wide.to_numpy(np.float64), list(wide.columns)


def delta_curves(items: pd.DataFrame, *, seed: int, n_resamples: int) -> pd.DataFrame:
    """Mean Δlogit by condition and depth with its pointwise band, over all clips and by stratum."""
    rows = []
    for condition, of_condition in items.groupby("condition", sort=False):
        for stratum, part in _strata(of_condition):
            what, values, depths = curves(part, "depth", "delta")
            band = bootstrap_mean(
                values, seed=seed, n_resamples=n_resamples, clusters=what["clip"].tolist()
            )
            for k, depth in enumerate(depths):
                rows.append(
                    {
                        "condition": condition,
                        "stratum": stratum,
                        "depth": depth,
                        **numbers(band, k),
                        "n_clips": what["clip"].nunique(),
                    }
                )
    return pd.DataFrame(rows)


def _strata(items: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield "all", items
    for column in STRATA:
        for value, part in items.groupby(column, sort=False):
            yield f"{column}={value}", part


def numbers(interval: Interval, at: Any = ()) -> dict[str, Any]:
    """``mean``, ``low``, ``high`` and ``n`` of an interval, or of one point of its curve."""
    return {
        "mean": float(interval.mean[at]),
        "low": float(interval.low[at]),
        "high": float(interval.high[at]),
        "n": interval.n,
    }


def critical_layers(
    items: pd.DataFrame, config: EmotionConflictConfig, n_blocks: int
) -> pd.DataFrame:
    """ℓ* by all five definitions: of every clip's curve, and of every condition's mean curve."""
    # Without the final norm the output is on another scale than the depths before it.
    exclude_last = config.lens_norm == "none" and config.lens_depths == "all"
    methods = sorted(METHODS, key=lambda method: method != config.critical_method)
    rows: list[dict[str, Any]] = []
    for condition, part in items.groupby("condition", sort=False):
        what, values, _ = curves(part, "depth", "delta")
        for method in methods:
            whole = critical_layer_interval(
                _rising(values, values.mean(axis=0)) if method == "half_rise" else values,
                method,
                seed=config.seed,
                n_resamples=config.n_resamples,
                clusters=what["clip"].tolist(),
                exclude_last=exclude_last,
            )
            found = {"depth": whole.depth, "low": whole.low, "high": whole.high}
            found |= {"n": whole.n, "undefined": whole.undefined}
            rows.append({"file": MEAN_CURVE, "condition": condition, "method": method} | found)
            for (clip, target), curve in zip(what.itertuples(index=False), values, strict=True):
                if method == "half_rise":
                    curve = _rising(curve, curve)
                depth = critical_layer(curve, method, exclude_last=exclude_last)
                row = {"file": clip, "target": target, "condition": condition, "method": method}
                rows.append(row | {"depth": depth, "n": 1})
    table = pd.DataFrame(rows)
    table.insert(4, "relative_depth", table.depth / n_blocks)
    return table


def _rising(values: np.ndarray, judged_by: np.ndarray) -> np.ndarray:
    """``half_rise`` looks for a rise: where the voice won, the curve is turned over."""
    return -values if judged_by[-1] < 0 else values


# --- Answers


def conflict_items(runs: pd.DataFrame) -> pd.DataFrame:
    """Per conflict item the labels and both predictions, as the flip measures want them."""
    alone = runs[runs.condition == "audio_only"].set_index("clip").prediction
    conflict = runs[runs.condition == "conflict"]
    return pd.DataFrame(
        {
            "clip": conflict["clip"],
            "target": conflict.target,
            "voice": conflict.voice,
            "named": conflict.named,
            "audio_only": conflict["clip"].map(alone),
            "conflict": conflict.prediction,
        }
    ).reset_index(drop=True)


def flip_cells(items: pd.DataFrame) -> pd.DataFrame:
    """Flip rate by voice and named emotion, one row per cell; NaN where no item asked for it."""
    rates, counts = flip_matrix(items, EMOTIONS)
    return pd.DataFrame(
        [
            {"voice": a, "named": t, "rate": float(rates.loc[a, t]), "n": int(counts.loc[a, t])}
            for a in EMOTIONS
            for t in EMOTIONS
        ]
    )


def accuracy(items: pd.DataFrame) -> pd.DataFrame:
    """What the answer follows under every condition: the voice, the matched T, or neither."""
    rows = []
    final = items.drop_duplicates(["unit", "target"])
    for condition, part in final.groupby("condition", sort=False):
        voice, target = part.prediction == part.voice, part.prediction == part.target
        answers = {"the voice (A)": voice, "the other emotion (T)": target & ~voice}
        for answer, hits in (answers | {"neither": ~(voice | target)}).items():
            rows.append({"condition": condition, "answer": answer} | rate(hits))
    return pd.DataFrame(rows)


def rate(hits: "pd.Series[bool]") -> dict[str, Any]:
    """``k``, ``n``, ``rate`` and its Wilson interval."""
    k, n = int(hits.sum()), len(hits)
    interval = wilson(k, n)
    low, high = float(interval.low), float(interval.high)
    return {"k": k, "n": n, "rate": float(interval.mean), "low": low, "high": high}


# --- Lens and attention


def lens_fidelity_curves(
    depths: pd.DataFrame, runs: pd.DataFrame, *, seed: int, n_resamples: int
) -> pd.DataFrame:
    """KL of the lens to the output, agreement of the top token, entropy; by condition and depth."""
    joined = depths.merge(runs[["unit", "clip", "target", "condition"]], on="unit")
    measures = ("kl", "agrees", "entropy", "residual_norm")
    return _means_by(joined, measures, ["condition"], "depth", seed, n_resamples)


def attention_summary(
    attention: pd.DataFrame, runs: pd.DataFrame, *, seed: int, n_resamples: int
) -> pd.DataFrame:
    """Mass, density and mass without the sink, by condition, segment and layer."""
    joined = attention.merge(runs[["unit", "clip", "target", "condition"]], on="unit")
    measures = ("mass", "density", "mass_without_sink")
    return _means_by(joined, measures, ["condition", "span"], "layer", seed, n_resamples)


def attention_ratios(attention: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The modality attention ratio of every run and layer, in its three forms (M-000-13)."""
    rows = []
    who = runs.set_index("unit")[["clip", "condition", "target"]]
    pairs = attention[attention.span.isin(["audio", "text"])]
    for unit, part in pairs.groupby("unit", sort=False):
        mass = part.pivot(index="layer", columns="span", values="mass")
        n = part.groupby("span").n_tokens.first()
        n_audio, n_text = int(n["audio"]), int(n["text"])
        forms = {
            form: modality_attention_ratio(
                mass["audio"].to_numpy(), mass["text"].to_numpy(), n_audio, n_text, form
            )
            for form in RATIOS
        }
        table = pd.DataFrame({"unit": unit, **who.loc[unit], "layer": mass.index, **forms})
        rows.append(table.assign(n_audio=n_audio, n_text=n_text))
    return pd.concat(rows, ignore_index=True)


def ratio_summary(mar: pd.DataFrame, *, seed: int, n_resamples: int) -> pd.DataFrame:
    """The three forms of the modality attention ratio, by condition and layer."""
    return _means_by(mar, RATIOS, ["condition"], "layer", seed, n_resamples)


def _means_by(
    table: pd.DataFrame,
    measures: Sequence[str],
    by: list[str],
    x: str,
    seed: int,
    n_resamples: int,
) -> pd.DataFrame:
    """Mean curves over ``x`` with their bands, one row per group, point and measure."""
    rows = []
    for group, part in table.groupby(by, sort=False):
        for measure in measures:
            what, values, points = curves(part, x, measure)
            interval = _mean_of_defined(values, what["clip"].tolist(), seed, n_resamples)
            for k, point in enumerate(points):
                row = {**dict(zip(by, group, strict=True)), x: point, "measure": measure}
                rows.append(row | numbers(interval, k) | {"n_undefined": interval.n_omitted})
    return pd.DataFrame(rows)


def _mean_of_defined(
    values: Float[np.ndarray, "item point"],
    clips: Sequence[Hashable],
    seed: int,
    n_resamples: int,
) -> Interval:
    """Mean over the items without a NaN; NaN if none is left."""
    undefined = np.isnan(values).any(axis=1)
    if undefined.all():
        nan = np.full(values.shape[1:], np.nan)
        return Interval(
            mean=nan, low=nan, high=nan, n=0, n_omitted=len(values), method="no defined items"
        )
    return bootstrap_mean(
        values, seed=seed, n_resamples=n_resamples, clusters=clips, nan_policy="omit"
    )


# --- Patching


def patching_summary(patching: pd.DataFrame, *, seed: int, n_resamples: int) -> pd.DataFrame:
    """Flip rate, logit shift and recovery by donor, span and block (M-000-11).

    A recovery is undefined where donor and base hardly differ; such items are counted.
    """
    rows = []
    for (donor, span), part in patching.groupby(["donor", "span"], sort=False):
        what, shift, blocks = curves(part, "block", "shift")
        clips = what["clip"].tolist()
        share = curves(part, "block", "recovery")[1]
        shifted = _mean_of_defined(shift, clips, seed, n_resamples)
        recovered = _mean_of_defined(share, clips, seed, n_resamples)
        flips = curves(part, "block", "flip")[1] > 0
        for k, block in enumerate(blocks):
            flip = rate(pd.Series(flips[:, k]))
            rows.append(
                {
                    "donor": donor,
                    "block": block,
                    "span": span,
                    "n": flip["n"],
                    **{f"flip_{key}": flip[key] for key in ("rate", "low", "high")},
                    **_prefixed("shift", numbers(shifted, k)),
                    **_prefixed("recovery", numbers(recovered, k)),
                    "n_undefined": recovered.n_omitted,
                }
            )
    names = [f"{what}_{end}" for what in ("shift", "recovery") for end in ("mean", "low", "high")]
    columns = ["donor", "block", "span", "n", "flip_rate", "flip_low", "flip_high"]
    return pd.DataFrame(rows, columns=[*columns, *names, "n_undefined"])


def _prefixed(prefix: str, found: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{key}": found[key] for key in ("mean", "low", "high")}


def handoffs(patching: pd.DataFrame, *, seed: int, n_resamples: int) -> pd.DataFrame:
    """Where information leaves its own span for good, and where it is at the readout for good.

    ``leaves``: the first block from which the span's mean recovery stays below one half (S-11);
    ``arrives``: the first from which the readout's stays at one half or above. NaN if there is no
    such block; ``undefined`` is the share of the replicates without one.
    """
    rows = []
    for donor, span in EXCHANGED:
        part = patching[(patching.donor == donor) & (patching.span == span)]
        if part.empty:
            continue
        part = part[part.recovery.notna()]
        is_arrival = span == "readout"
        row: dict[str, Any] = {"donor": donor, "span": span}
        row |= {"event": "arrives" if is_arrival else "leaves", "n": 0, "undefined": 1.0}
        row |= dict.fromkeys(("block", "low", "high"), np.nan)
        if len(part):
            what, values, blocks = curves(part, "block", "recovery")
            drawn = resampled_means(
                values, seed=seed, n_resamples=n_resamples, clusters=what["clip"].tolist()
            )
            row |= _handoff(values.mean(axis=0), drawn, blocks, is_arrival) | {"n": len(values)}
        rows.append(row)
    columns = ["donor", "span", "event", "block", "low", "high", "undefined", "n"]
    return pd.DataFrame(rows, columns=columns)


def _handoff(
    mean: Float[np.ndarray, " block"],
    drawn: Float[np.ndarray, "resample block"],
    blocks: list[int],
    is_arrival: bool,
) -> dict[str, float]:
    names = np.array([*blocks, np.nan])
    drawn = drawn[np.isfinite(drawn).all(axis=1)]  # NaN throughout for a single clip
    if is_arrival:
        mean, drawn = 1 - mean, 1 - drawn
    first = names[handoff_index(mean[None], is_arrival)][0]
    found = names[handoff_index(drawn, is_arrival)]
    undefined = float(np.isnan(found).mean()) if len(found) else 1.0
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [0.025, 0.975]) if len(found) else (np.nan, np.nan)
    return {"block": float(first), "low": float(low), "high": float(high), "undefined": undefined}
