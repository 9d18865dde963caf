"""Hand-made tables of an ``emotion_conflict`` run, in which every answer is known."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import soundfile

from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.emotion_conflict.tables import (
    EmotionResults,
    conflict_items,
    flip_summary,
)
from hooked_alm.experiments.materials.clips import Sounds
from hooked_alm.experiments.materials.conflict_runs import NAMES_TARGET
from hooked_alm.experiments.materials.item_curves import handoffs
from hooked_alm.experiments.materials.ob1 import CONFLICT_MAP, EMOTIONS, ob1_clip_names
from hooked_alm.experiments.materials.recordings import Recording, load_recordings

N_BLOCKS = 4
INPUTS = {
    "model": {"blocks": N_BLOCKS},
    "audio_is_first": True,
    "labels": [*EMOTIONS],
    "prompts": {"en": {"audio_only": "What is it?"}},
}
SEGMENTS = {
    "audio": 0.4,
    "audio_struct": 0.1,
    "text": 0.1,
    "struct": 0.1,
    "sink": 0.2,
    "readout": 0.1,
}
LEAVES, ARRIVES = [1.0, 0.8, 0.3, 0.0], [0.0, 0.2, 0.6, 1.0]
Side = Literal["text", "voice"]


def scores(winner: str, jitter: float) -> dict[str, float]:
    """The winner has 5, the others less, each something else."""
    return {name: 5.0 if name == winner else 0.1 * k + jitter for k, name in enumerate(EMOTIONS)}


def toy_tables(
    config: EmotionConflictConfig, side: Side = "text", n_clips: int = 12
) -> dict[str, pd.DataFrame]:
    """What a model leaves that hears every voice and settles a conflict for one side."""
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("runs", "delta", "depths", "attention", "patching")
    }
    for number, clip in enumerate(ob1_clip_names()[:n_clips]):
        voice = clip.emotion
        targets = [CONFLICT_MAP[voice]]
        if config.pairs == "all_pairs":
            targets = [emotion for emotion in EMOTIONS if emotion != voice]
        who = {
            "clip": clip.stem,
            "language": clip.language,
            "prompt_language": clip.language,
            "voice": voice,
            "intensity": clip.intensity,
        }
        z = functools.partial(scores, jitter=0.01 * number)
        for mode in config.modes:
            if mode in NAMES_TARGET:
                for target in targets:
                    winner = target if mode == "conflict" and side == "text" else voice
                    run = {**who, "condition": mode, "named": target, "target": target}
                    _add_run(rows, run, [target], z(winner), config)
            else:
                named = voice if mode == "consistent" else None
                run = {**who, "condition": mode, "named": named, "target": targets[0]}
                _add_run(rows, run, targets, z(voice), config)
        for target in targets:
            base = {**who, "condition": "conflict", "named": target, "target": target}
            for donor in config.donors:
                _add_sweep(rows["patching"], base, donor, side, number, config)
    return {name: pd.DataFrame(found) for name, found in rows.items() if found}


def _add_run(
    rows: dict[str, list[dict[str, Any]]],
    run: dict[str, Any],
    targets: Sequence[str],
    z: dict[str, float],
    config: EmotionConflictConfig,
) -> None:
    unit = f"{run['clip']}__{run['condition']}_{run['named']}"
    named = {f"z_{name}": value for name, value in z.items()}
    rows["runs"].append(
        {
            "unit": unit,
            **run,
            "prediction": max(z, key=lambda name: z[name]),
            **named,
            "delta_final": z[run["target"]] - z[run["voice"]],
            "label_mass": 0.9,
            "best_label_rank": 1,
            "top_token": "x",
            "n_tokens": 20,
            "n_audio_tokens": 8,
        }
    )
    last = N_BLOCKS if config.lens_depths == "all" else N_BLOCKS - 1
    for depth in range(last + 1):
        share = depth / N_BLOCKS
        for target in targets:
            delta = share * (z[target] - z[run["voice"]])
            rows["delta"].append({"unit": unit, "target": target, "depth": depth, "delta": delta})
        lens = {name: share * value for name, value in named.items()}
        rows["depths"].append(
            {
                "unit": unit,
                "depth": depth,
                **lens,
                "kl": 1 - share,
                "agrees": float(share > 0.5),
                "entropy": 1.0,
                "residual_norm": 1.0 + depth,
            }
        )
    for layer in range(N_BLOCKS):
        for span, mass in SEGMENTS.items():
            without = np.nan if span == "sink" else mass / 0.8
            rows["attention"].append(
                {
                    "unit": unit,
                    "layer": layer,
                    "span": span,
                    "mass": mass,
                    "density": mass,
                    "mass_without_sink": without,
                    "n_tokens": 2 if span == "audio" else 1,
                }
            )


def _add_sweep(
    rows: list[dict[str, Any]],
    base: dict[str, Any],
    donor: str,
    side: Side,
    number: int,
    config: EmotionConflictConfig,
) -> None:
    voice, target = base["voice"], base["target"]
    toward, away = (target, voice) if donor == "audio_swap" else (voice, target)
    winner = target if side == "text" else voice
    start = 5.0 if winner == toward else -5.0
    large = {"text_swap": "text", "audio_swap": "voice"}.get(donor, side) == side
    total = 0.0 if donor == "self" else (10.0 if large else 1.0) + 0.1 * (number % 3)
    for span in config.patched_spans():
        for block in range(N_BLOCKS):
            share = _share(donor, span, block)
            shift = share * total
            is_toward = start + shift > 0 if donor != "random_other" else start > 0
            rows.append(
                {
                    "unit": f"patch__{base['clip']}__{donor}",
                    **base,
                    "donor": donor,
                    "donor_clip": base["clip"],
                    "donor_named": voice,
                    "toward": toward,
                    "block": block,
                    "span": span,
                    "prediction": toward if is_toward else away,
                    "flip": float(is_toward != (start > 0)),
                    "shift": shift,
                    "recovery": share if total >= config.min_effect else np.nan,
                    "base": start,
                    "donor_metric": start + total,
                    "total_effect": total,
                    "noise": 0.0,
                }
            )


def _share(donor: str, span: str, block: int) -> float:
    if span in ("all", "text+readout"):
        return 1.0
    if span == "readout":
        return ARRIVES[block]
    source = {"text_swap": "text", "audio_swap": "audio"}.get(donor)
    return LEAVES[block] if span == source else 0.0


def toy_recordings(folder: Path, n_clips: int) -> list[Recording]:
    """As many short clips, all different."""
    folder.mkdir()
    for number, clip in enumerate(ob1_clip_names()[:n_clips]):
        tone = 0.1 * np.sin(np.arange(4000) / 16_000 * 2 * np.pi * (120 + 10 * number))
        soundfile.write(folder / f"{clip.stem}.wav", tone, 16_000)
    return load_recordings(folder)


def toy_sounds(recordings: Sequence[Recording]) -> dict[str, pd.DataFrame]:
    """The table of how they sound."""
    return {"sounds": pd.DataFrame(Sounds(tuple(recordings)).measured().tables["sounds"])}


def toy_results(
    config: EmotionConflictConfig, tables: dict[str, pd.DataFrame] | None = None, **made: Any
) -> EmotionResults:
    """Hand-made tables (or given ones) as results, with the summaries that claims are made of."""
    run = EmotionConflict.results(config, INPUTS, tables or toy_tables(config, **made))
    run.tables["confounds"] = pd.DataFrame(columns=["feature", "p", "found"])
    run.tables["handoffs"] = handoffs(run["patching"], "block", run.draws)
    run.tables["ob1_flip_summary"] = flip_summary(conflict_items(run["runs"]))
    return run
