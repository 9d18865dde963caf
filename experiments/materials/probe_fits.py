"""Held-out probes as units of a run.

Source: M-BT-5, M-BT-6.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from hooked_alm.inputs import AudioClip
from hooked_alm.methods.activations.depths import PlacedPoint
from hooked_alm.methods.statistics.online_code import online_code
from hooked_alm.methods.statistics.probe_scores import probe_scores
from hooked_alm.methods.statistics.probing import HeldOut, grouped_probe, read_by_probe
from hooked_alm.methods.statistics.selectivity import selective_hits

from ..workbench.experiment import Unit, UnitResult
from ..workbench.results import Row
from ..workbench.run_folder import RunFolder
from .held_out_labels import HeldOutConfig, HeldOutLabel
from .kept_features import (
    ClipFeatures,
    FeatureFiles,
    Features,
    FeatureSource,
    files_of,
    finite_features,
)

OF_THE_CLIP = {"majority": "majority", "duration": "duration", "log_mel": "mean log-mel"}
"""What tells labels before a model has heard anything: nothing, how long a clip is, its mean
spectrum."""


def clip_baselines(clip: AudioClip) -> ClipFeatures:
    """What is known of a clip before a model hears it, by the names in `OF_THE_CLIP`."""
    windows = zip(clip.features, clip.n_frames, strict=True)
    frames = torch.cat([window[:, :n] for window, n in windows], dim=1).double()
    return {
        "majority": np.zeros(1, np.float32),
        "duration": np.array([clip.seconds or 0.0], np.float32),
        "log_mel": frames.mean(dim=1).cpu().numpy().astype(np.float32),
    }


# --- Probes of them


def fit_units(
    labels: Sequence[HeldOutLabel],
    baselines: Iterable[str],
    points: Mapping[FeatureSource, Sequence[PlacedPoint]],
    features: pd.DataFrame,
) -> list[Unit]:
    """A unit for each column and baseline, and each column, point and model.

    Args:
        labels: columns.
        baselines: names of those, whose features the model's own files have.
        points: that are read of each model.
        features: the table of what `keep_features` kept.
    """
    works: list[tuple[FeatureSource, PlacedPoint]] = [
        ("baseline", PlacedPoint(name, "baseline", 0)) for name in baselines
    ]
    works += [(source, point) for source, some in points.items() for point in some]
    files = {str(source): files_of(part) for source, part in features.groupby("source")}
    files["baseline"] = files["model"]
    return [
        Unit(f"probe__{n:03d}__{source}__{m:04d}", ProbeFit(label, source, point, files[source]))
        for n, label in enumerate(labels)
        for m, (source, point) in enumerate(works)
    ]


@dataclass(frozen=True, eq=False)
class ProbeFit:
    """The payload of a unit: a column, read off one kind of features."""

    label: HeldOutLabel
    source: FeatureSource
    point: PlacedPoint
    files: FeatureFiles

    def result(self, folder: RunFolder, names: Sequence[str], config: HeldOutConfig) -> UnitResult:
        """What held-out probes read of every clip, and how closely they follow it.

        Args:
            folder: of the run, with the features of all clips.
            names: of these.
            config: of the run.

        Raises:
            InputError: features that were changed, or are not finite.
        """
        one = self.label
        x = finite_features(folder, self.point.name, self.files)[one.clips]
        key: Row = {
            "label": one.column, "source": self.source, "stream": self.point.stream,
            "depth": self.point.depth, "point": self.point.name,
        }  # fmt: skip
        held = grouped_probe(x, one.codes, one.groups, one.folds)
        said = held.probabilities.argmax(axis=1)
        more = self._nulls(x, held, config) if self.source == "model" else {}
        items = [
            {
                **key, "clip": names[clip], "group": one.groups[i], "fold": int(held.folds[i]),
                "value": one.values[int(one.codes[i])], "said": one.values[int(said[i])],
                "hit": float(said[i] == one.codes[i]),
                **{name: float(column[i]) for name, column in more.items()},
            }
            for i, clip in enumerate(one.clips)
        ]  # fmt: skip
        code = online_code(x, one.codes, one.groups, strength=_middle(held), seed=config.seed)
        fit: Row = {
            **key, **probe_scores(held.probabilities, one.codes, held.folds)._asdict(),
            "strength": _middle(held), "bits": code.bits, "uniform_bits": code.uniform_bits,
            "compression": code.compression, "leaks": one.leaks_shown,
            "sum_off": float(np.abs(held.probabilities.sum(axis=1) - 1).max()),
        }  # fmt: skip
        return UnitResult({"reads": items, "fits": [fit]}, {"strengths": [*held.strengths]})

    def _nulls(self, x: Features, held: HeldOut, config: HeldOutConfig) -> dict[str, np.ndarray]:
        """Shuffled labels in the same folds; labels and control labels in folds of types."""
        one, n = self.label, len(self.label.codes)
        # Draws that depend on the column and the point alone.
        text = f"{config.seed}/{one.column}/{self.point.name}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        shuffled, blind = np.random.default_rng(seed).permutation(one.codes), np.zeros(n, np.int64)
        for fold, strength in enumerate(held.strengths):
            train, there = held.folds != fold, held.folds == fold
            p = read_by_probe(x[train], shuffled[train], x[there], len(one.values), strength)
            blind[there] = p.argmax(axis=1)
        found = {
            "shuffled_hit": blind == shuffled,
            # Of labels dealt out anew, as many are right as have what was said.
            "shuffled_chance": (np.bincount(shuffled) / n)[blind],
            "known_hit": np.full(n, np.nan),
            "control_hit": np.full(n, np.nan),
        }
        if one.types is not None:
            hits = selective_hits(
                x, one.codes, one.types, n_folds=config.n_folds, strength=_middle(held),
                seed=config.seed,
            )  # fmt: skip
            found |= {"known_hit": hits.label, "control_hit": hits.control}
        return found


def _middle(held: HeldOut) -> float:
    """The strength of a probe whose own is not looked for."""
    return sorted(held.strengths)[len(held.strengths) // 2]
