"""The hypotheses of OB1: H1, the conflict is settled late; H2, the instruction dominates.

Source: seed document 000; methods card M-000-14.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.bootstrap import Interval, bootstrap_mean
from hooked_alm.methods.statistics.significance import sign_test

from ..workbench.findings import MIN_ITEMS, Finding, judged
from .critical_layer import resolve_depths


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LateConsolidation:
    """H1: where the conflict is settled, against contrasts of labels drawn at random."""

    finding: Finding
    """Its estimate is the mean resolve depth."""
    depths: Float[np.ndarray, " item"]
    """Per item; NaN where T and A end level."""
    null: Float[np.ndarray, " permutation"]
    """Mean depths of the label-permuted contrasts."""
    p: float
    """Share of the null at or beyond the observed mean, the observed included."""
    null_mean: float
    null_low: float
    null_high: float


def late_consolidation_test(
    scores: Float[np.ndarray, " item depth label"],
    pairs: Int[np.ndarray, " item 2"],
    *,
    seed: int,
    n_permutations: int = 2000,
    n_resamples: int = 2000,
    clusters: Sequence[Hashable] | None = None,
    late_from: float = 0.5,
    alpha: float = 0.05,
    readout: str = "logit lens",
) -> LateConsolidation:
    """H1: the sign of s[T] − s[A] settles late, and later than that of other contrasts.

    Any two labels' contrast settles somewhere. The null draws, for every item, two different labels
    at random, and takes the mean resolve depth of these contrasts. H1 is established if the
    observed mean is beyond the null (p < ``alpha``), and its whole interval is deeper than
    ``late_from`` of the depth. It should hold under the tuned lens and under patching as well.

    Args:
        scores: label scores through a lens, depths 0..L.
        pairs: per item the label indices of T and A.
        late_from: where "late" begins, as a share of the blocks.
        readout: what ``scores`` were read with; named in the statement.

    Raises:
        InputError: T equals A, an index out of range, or NaN scores.
    """
    _check_scores(scores, pairs)
    n_items, n_depths, n_labels = scores.shape
    # A contrast and its negative settle at the same depth, so unordered pairs are enough.
    choices = list(combinations(range(n_labels), 2))
    by_pair = np.stack([resolve_depths(scores[..., i] - scores[..., j]) for i, j in choices], 1)
    items = np.arange(n_items)
    column = {pair: k for k, pair in enumerate(choices)}
    depths = by_pair[items, [column[min(t, a), max(t, a)] for t, a in pairs.tolist()]]

    draws = np.random.default_rng(seed).integers(0, len(choices), (n_permutations, n_items))
    null = _means_of_defined(by_pair[items, draws])
    null = null[np.isfinite(null)]
    estimate = _mean(depths, np.isfinite(depths), clusters, seed, n_resamples)
    p = float((1 + (null >= estimate.mean).sum()) / (1 + len(null)))
    null_low, null_high = np.quantile(null, [0.025, 0.975]) if len(null) else (np.nan, np.nan)
    null_mean = float(null.mean()) if len(null) else np.nan

    n_blocks = n_depths - 1
    late = late_from * n_blocks
    facts = (
        f"Mean settling depth {_numbers(estimate)} of {n_blocks} ({readout}), "
        f"{null_mean:.2f} [{null_low:.2f}, {null_high:.2f}] for random label pairs, p = {p:.2g}"
    )
    if estimate.n < n_items:
        facts += f", {n_items - estimate.n} items end level and are left out"
    why_not = {
        f"only {estimate.n} items": estimate.n < MIN_ITEMS,
        "no later than random label pairs": not p < alpha,
        f"interval not past depth {late:g}": not estimate.low > late,
    }
    finding = _finding("The conflict is settled late", facts, why_not, estimate, "blocks")
    return LateConsolidation(
        finding=finding,
        depths=depths,
        null=null,
        p=p,
        null_mean=null_mean,
        null_low=float(null_low),
        null_high=float(null_high),
    )


def dominance_test(
    te_text: Float[np.ndarray, " item"],
    te_audio: Float[np.ndarray, " item"],
    audio_correct: Bool[np.ndarray, " item"],
    *,
    seed: int,
    unit: str = "logits",
    n_resamples: int = 2000,
    clusters: Sequence[Hashable] | None = None,
) -> Finding:
    """H2: swapping the instruction moves the answer more than swapping the voice does.

    The estimate is the mean of TE_text − TE_audio over the items that the model answers correctly
    without an instruction. Text dominates if its interval is above 0, the voice if below; the sign
    of the estimate says which.

    Args:
        te_text: per item, the change of the metric from the base run to the text-swapped run,
            positive towards the donor's answer.
        te_audio: the same for the audio-swapped run.
        audio_correct: the prediction under ``audio_only`` is the voice's emotion.
    """
    gap = te_text - te_audio
    estimate = _mean(gap, audio_correct, clusters, seed, n_resamples)
    claim = "The voice dominates the text" if estimate.high < 0 else "The text dominates the voice"
    facts = f"TE(text) − TE(voice) = {_numbers(estimate)} {unit}"
    if estimate.n:
        # A percentile interval of few items is somewhat too narrow; S-7 asks for this beside it.
        facts += f", sign test p = {sign_test(gap[audio_correct]).p:.2g}"
    why_not = {
        f"only {estimate.n} items recognised from the voice alone": estimate.n < MIN_ITEMS,
        "the interval includes 0": not (estimate.low > 0 or estimate.high < 0),
    }
    return _finding(claim, facts, why_not, estimate, unit)


def _finding(
    claim: str, facts: str, why_not: dict[str, bool], estimate: Interval, unit: str
) -> Finding:
    numbers = {name: getattr(estimate, name) for name in ("mean", "low", "high", "n")}
    return judged(claim, f"{facts}, n = {estimate.n}", why_not, numbers=numbers, unit=unit)


def _numbers(interval: Interval) -> str:
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _mean(
    values: Float[np.ndarray, " item"],
    chosen: Bool[np.ndarray, " item"],
    clusters: Sequence[Hashable] | None,
    seed: int,
    n_resamples: int,
) -> Interval:
    """Bootstrap of the mean of the chosen items; NaN where none is chosen."""
    if not chosen.any():
        nan = np.asarray(np.nan)
        return Interval(mean=nan, low=nan, high=nan, n=0, method="no items")
    if clusters is not None:
        clusters = [clusters[i] for i in np.flatnonzero(chosen).tolist()]
    return bootstrap_mean(values[chosen], seed=seed, n_resamples=n_resamples, clusters=clusters)


def _means_of_defined(
    depths: Float[np.ndarray, " permutation item"],
) -> Float[np.ndarray, " permutation"]:
    defined = np.isfinite(depths)
    total = np.where(defined, depths, 0).sum(axis=1)
    n = defined.sum(axis=1)
    return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)


def _check_scores(
    scores: Float[np.ndarray, " item depth label"], pairs: Int[np.ndarray, " item 2"]
) -> None:
    n_labels = scores.shape[2]
    bad = (pairs < 0).any(1) | (pairs >= n_labels).any(1) | (pairs[:, 0] == pairs[:, 1])
    bad |= ~np.isfinite(scores).all(axis=(1, 2))
    if bad.any() or len(scores) == 0:
        raise InputError(
            f"late consolidation: got {len(scores)} items, {bad.sum()} of them bad (the first is "
            f"{bad.argmax() if len(bad) else None}); expected finite scores and two different "
            f"label indices below {n_labels} for each. Check the label set."
        )
