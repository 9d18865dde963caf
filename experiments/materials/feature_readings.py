"""What is read off features of clips, as units of a run: labels by few of them, and factors.

Source: M-SAE-4, M-SAE-6.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field, model_validator

from hooked_alm.methods.dictionary.disentanglement import (
    ALPHA,
    FactorReading,
    Importances,
    completeness,
    mean_disentanglement,
    read_factors,
)
from hooked_alm.methods.dictionary.k_sparse import RankedBy, ReadItems, k_sparse_probe, unlearn
from hooked_alm.methods.statistics.probing import grouped_probe

from ..workbench.experiment import UnitResult
from ..workbench.results import Row
from ..workbench.run_folder import RunFolder
from .held_out_labels import ColumnName, HeldOutConfig, HeldOutLabel
from .kept_features import FeatureFiles, Features, finite_features

FeatureCount = Annotated[int, Field(ge=1, le=10**7)]


class FeatureReadingConfig(HeldOutConfig):
    """Settings of experiments that read labels and factors off features of clips."""

    n_folds: int = Field(default=10, ge=2, le=100, description="folds, or fewer where groups are")
    ks: tuple[FeatureCount, ...] = Field(
        default=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
        min_length=1,
        max_length=100,
        description="numbers of features that are read, or deleted, as far as there are as many; "
        "all are read, too",
    )
    ranked_by: RankedBy = Field(
        default="mean_difference",
        description="which features come first, on the clips that a probe learns from",
    )
    n_random: int = Field(
        default=3, ge=1, le=100, description="orders of the features at random, beside that one"
    )
    factors: tuple[ColumnName, ...] = Field(
        default=("rms_dbfs", "f0_median_hz", "f0_iqr_hz", "voiced_fraction"),
        max_length=100,
        description="what of each clip's sound (duration_s, too), or which columns of numbers of "
        "its table, codes are to hold apart; needs scikit-learn; none leaves it out",
    )
    alpha: float = Field(
        default=ALPHA, gt=0, lt=1, description="penalty of the Lassos that read the factors"
    )

    def ks_of(self, width: int) -> list[int]:
        """Numbers of features that are read of so many, all of them the last."""
        return [*sorted(k for k in {*self.ks} if k < width), width]

    @model_validator(mode="after")
    def _ranks(self) -> "FeatureReadingConfig":
        if self.ranked_by == "random":
            raise ValueError("ranked_by must be a ranking: orders at random stand beside it")
        if len({*self.factors}) < len(self.factors):
            raise ValueError("factors must be named once each")
        return self


FeatureKind = Literal["codes", "rows", "principal", "rotated", "itself"]
WHOLE = -1
"""In the place of a fold: all clips."""


@dataclass(frozen=True)
class FeatureSet:
    """Features of all clips, a row a clip."""

    owner: str
    """A dictionary, or the point of rows."""
    kind: FeatureKind
    """``codes``: means of a dictionary's activations over a clip; ``rotated``: the same,
    standardised, along as many random directions of the same subspace. ``rows``: means of the
    model's own rows; ``principal``: along their principal directions, over all clips."""
    array: str
    """In the files of features."""
    files: FeatureFiles
    seed: int

    def read(self, folder: RunFolder) -> Features:
        """The features.

        Raises:
            InputError: files that were changed, or values that are not finite.
        """
        x = finite_features(folder, self.array, self.files)
        if self.kind in ("codes", "rows"):
            return x
        x = x - x.mean(axis=0)
        if self.kind == "rotated":
            spread = x.std(axis=0)
            x = x[:, spread > 0] / spread[spread > 0]
            if not x.size:  # nothing fires in these clips
                return np.zeros((len(x), 1))
        left, sizes, _ = np.linalg.svd(x, full_matrices=False)
        rank = min(len(x) - 1, x.shape[1])
        scores = left[:, :rank] * sizes[:rank]
        if self.kind == "principal":
            return scores
        drawn = np.random.default_rng(self.seed).normal(size=(x.shape[1], rank))
        return scores @ np.linalg.qr(drawn)[0].T

    @property
    def key(self) -> Row:
        """What tells it from others in tables."""
        return {"owner": self.owner, "kind": self.kind}


@dataclass(frozen=True, eq=False)
class LabelReading:
    """The payload of a unit: a column, read off some of the features, or without them."""

    label: HeldOutLabel
    features: FeatureSet

    def result(self, folder: RunFolder, config: FeatureReadingConfig) -> UnitResult:
        """How often the label is read, group by group, and what vouches for it."""
        one, x = self.label, self.features.read(folder)[self.label.clips]
        ks = config.ks_of(x.shape[1])
        key = {"label": one.column, **self.features.key}
        reads = list[Row]()
        for how, numbers, read in _ways(x, one, ks):
            every: dict[RankedBy, list[int]] = {
                config.ranked_by: [config.seed],
                "random": [config.seed + draw for draw in range(config.n_random)],
            }
            for by, seeds in every.items():
                hits = np.mean([read(numbers, by=by, seed=seed) for seed in seeds], axis=0)
                about = {**key, "how": how, "ranked": by}
                for k, row in zip(numbers, hits, strict=True):
                    reads += [{**about, "k": k, **found} for found in _by_group(row, one.groups)]
        return UnitResult({"reads": reads, "checks": [{**key, **self._checks(x, ks, config)}]})

    def _checks(self, x: Features, ks: Sequence[int], config: FeatureReadingConfig) -> Row:
        """All features against a probe that ranks none, and labels dealt out within their folds."""
        one, n = self.label, len(self.label.codes)
        whole = grouped_probe(x, one.codes, one.groups, one.folds).probabilities.argmax(axis=1)
        read = partial(k_sparse_probe, x, groups=one.groups, folds=one.folds, by=config.ranked_by)
        found = read(labels=one.codes, ks=[x.shape[1]])[0]
        dealt, chance = one.codes.copy(), 0.0
        rng = np.random.default_rng(config.seed)
        for fold in range(int(one.folds.max()) + 1):
            there = np.flatnonzero(one.folds == fold)
            dealt[there] = rng.permutation(dealt[there])
            chance += float(np.bincount(dealt[there]).max()) / n
        return {
            "n_clips": n, "otherwise": int((found != (whole == one.codes)).sum()),
            "dealt": float(read(labels=dealt, ks=ks).mean()), "chance": chance,
        }  # fmt: skip


def _ways(
    x: Features, one: HeldOutLabel, ks: Sequence[int]
) -> Iterator[tuple[str, list[int], Callable[..., ReadItems]]]:
    """Name, numbers of features, and what reads with these: some kept, or some deleted."""
    given = (x, one.codes, one.groups, one.folds)
    yield "kept", [*ks], partial(k_sparse_probe, *given)
    for how in ("refit", "frozen"):
        yield how, [0, *ks[:-1]], partial(unlearn, *given, how=how)


def _by_group(values: Float[np.ndarray, " clip"], groups: Sequence[str]) -> Iterator[Row]:
    """Means over the clips of each group that have a value."""
    for group in dict.fromkeys(groups):
        mine = values[np.array([one == group for one in groups])]
        if (mine := mine[np.isfinite(mine)]).size:
            yield {"group": group, "n": len(mine), "value": float(mine.mean())}


# --- Factors


@dataclass(frozen=True, eq=False)
class Factors:
    """What is known of how clips sound, and how they are held out."""

    names: tuple[str, ...]
    values: Float[np.ndarray, "clip factor"]
    """NaN where it is not known."""
    groups: list[str]
    folds: Int[np.ndarray, " clip"]

    @property
    def themselves(self) -> Features:
        """The factors as codes, with means where they are not known."""
        return np.where(np.isfinite(self.values), self.values, np.nanmean(self.values, axis=0))


@dataclass(frozen=True, eq=False)
class FactorWork:
    """The payload of a unit: factors, read off features; of none, off themselves."""

    factors: Factors
    features: FeatureSet | None

    def result(self, folder: RunFolder, config: FeatureReadingConfig) -> UnitResult:
        """How well factors are read, and how many codes have them."""
        one = self.factors
        x = one.themselves if self.features is None else self.features.read(folder)
        key = {"owner": "factors", "kind": "itself"} if self.features is None else self.features.key
        varies = np.ptp(x, axis=0) > 0
        x = x[:, varies] if varies.any() else x[:, :1]
        found = read_factors(x, one.values, one.folds, alpha=config.alpha)
        fits = [(WHOLE, found.weights), *enumerate(found.weights_without)]
        return UnitResult({
            "dci": [{**key, "fold": fold, **_measures(weights)} for fold, weights in fits],
            "factors": [*_factor_rows(key, one, found)],
            "factor_errors": [*_error_rows(key, one, found)],
        })  # fmt: skip


def _measures(weights: Importances) -> Row:
    whole = completeness(weights)
    is_read = np.isfinite(whole)
    return {
        "disentanglement": mean_disentanglement(weights),
        "completeness": float(whole[is_read].mean()) if is_read.any() else np.nan,
        "n_codes": len(weights),
        "n_read": int((weights > 0).any(axis=1).sum()),
    }


def _factor_rows(key: Row, one: Factors, found: FactorReading) -> Iterator[Row]:
    whole = completeness(found.weights)
    for j, name in enumerate(one.names):
        yield {
            **key, "factor": name, "r2": float(found.r2[j]), "r2_learnt": float(found.r2_learnt[j]),
            "completeness": float(whole[j]), "n_read": int((found.weights[:, j] > 0).sum()),
            "n_clips": int(np.isfinite(one.values[:, j]).sum()),
            "unfinished": int(found.unfinished[j]),
        }  # fmt: skip


def _error_rows(key: Row, one: Factors, found: FactorReading) -> Iterator[Row]:
    """Errors by group, over the mean error of knowing the training clips' mean."""
    relative = found.errors / np.nanmean(found.null_errors, axis=0)
    for j, name in enumerate(one.names):
        for row in _by_group(relative[:, j], one.groups):
            yield {**key, "factor": name, **row}
