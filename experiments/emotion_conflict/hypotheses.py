"""The hypotheses of OB1: H1, the conflict is settled late; H2, the instruction dominates.

Source: seed 000; M-000-14.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_alm.methods.statistics.critical_layer import resolve_depths
from hooked_alm.methods.statistics.draws import chunks
from hooked_alm.methods.statistics.significance import sign_test

from ..workbench.claims import Finding, around_zero, counted, few, shown
from ..workbench.intervals import Clusters, Draws, numbers


class LateConsolidation(NamedTuple):
    """H1: where the conflict is settled, against contrasts of labels drawn at random."""

    finding: Finding
    """Its estimate is the mean resolve depth."""
    depths: Float[np.ndarray, " item"]
    """Resolve depth of each item; NaN where T and A end level."""
    null: Float[np.ndarray, " permutation"]
    """Mean depths of the label-permuted contrasts."""
    p: float
    """Share of the null at or beyond the observed mean, the observed included."""


def late_consolidation_test(
    scores: Float[np.ndarray, " item depth label"],
    pairs: Int[np.ndarray, " item 2"],
    draws: Draws,
    *,
    n_permutations: int = 2000,
    clusters: Clusters = None,
    readout: str = "logit lens",
) -> LateConsolidation:
    """H1: the sign of s[T] − s[A] settles late, and later than that of other contrasts.

    Any two labels' contrast settles somewhere. The null draws, for every item, two different labels
    at random, and takes the mean resolve depth of these contrasts. H1 is established if the
    observed mean is beyond the null (p < 0.05), and its whole interval is deeper than half of the
    depth. It should hold under the tuned lens and under patching as well.

    Args:
        scores: label scores through a lens, depths 0..L.
        pairs: label indices of T and A of every item.
        draws: of the interval; its seed is the permutations' too.
        readout: what ``scores`` were read with; named in the statement.
    """
    n_items, n_depths, n_labels = scores.shape
    # A contrast and its negative settle at the same depth, so unordered pairs are enough.
    choices = list(combinations(range(n_labels), 2))
    by_pair = np.stack([resolve_depths(scores[..., i] - scores[..., j]) for i, j in choices], 1)
    places = {pair: place for place, pair in enumerate(choices)}
    asked = [places[min(pair), max(pair)] for pair in pairs.tolist()]
    depths = by_pair[np.arange(n_items), asked]
    null = _means_of_random_pairs(by_pair, draws.seed, n_permutations)
    found = numbers(draws.mean(depths, clusters))
    p = float((1 + (null >= found["mean"]).sum()) / (1 + len(null)))
    low, high = np.quantile(null, [0.025, 0.975]) if len(null) else (np.nan, np.nan)
    ordinary = {"mean": null.mean() if len(null) else np.nan, "low": low, "high": high}

    n_blocks, n = n_depths - 1, found["n"]
    facts = (
        f"Mean settling depth {shown(found)} of {n_blocks} ({readout}), {shown(ordinary)} for "
        f"random label pairs, p = {p:.2g}"
    )
    if n < n_items:
        facts += f", {n_items - n} items end level and are left out"
    why_not = {
        **few(n),
        "no later than random label pairs": not p < 0.05,
        f"interval not past depth {n_blocks / 2:g}": not found["low"] > n_blocks / 2,
    }
    finding = counted("The conflict is settled late", facts, why_not, found, "blocks")
    return LateConsolidation(finding, depths, null, p)


def _means_of_random_pairs(
    by_pair: Float[np.ndarray, "item pair"], seed: int, n_permutations: int
) -> Float[np.ndarray, " permutation"]:
    """Mean over the items of a random pair's value each; without those of which none is defined."""
    (n_items, n_pairs), rng = by_pair.shape, np.random.default_rng(seed)
    items, null = np.arange(n_items), [np.empty(0)]
    # Memory for an item: its pair, the pair's value, and two copies of this in the mean.
    for rows in chunks(n_permutations, 32 * n_items):
        drawn = by_pair[items, rng.integers(0, n_pairs, (rows.stop - rows.start, n_items))]
        null.append(np.nanmean(drawn[np.isfinite(drawn).any(axis=1)], axis=1))
    return np.concatenate(null)


def dominance_test(
    te_text: Float[np.ndarray, " item"],
    te_audio: Float[np.ndarray, " item"],
    audio_correct: Bool[np.ndarray, " item"],
    draws: Draws,
    clusters: Clusters = None,
) -> Finding:
    """H2: swapping the instruction moves the answer more than swapping the voice does.

    The estimate is the mean of TE_text − TE_audio over the items that the model answers correctly
    without an instruction. Text dominates if its interval is above 0, the voice if below; the sign
    of the estimate says which.

    Args:
        te_text: per item, the change of the metric from the base run to the text-swapped run,
            positive towards the donor's answer; ``te_audio``, to the audio-swapped run.
        audio_correct: the prediction under ``audio_only`` is the voice's emotion.
    """
    gap = te_text - te_audio
    found = numbers(draws.mean(np.where(audio_correct, gap, np.nan), clusters))
    claim = "The voice dominates the text" if found["high"] < 0 else "The text dominates the voice"
    facts = f"TE(text) − TE(voice) = {shown(found)} logits"
    if found["n"]:
        # The interval of few items holds less than it says; S-7 asks for this beside it.
        facts += f", sign test p = {sign_test(gap[audio_correct]).p:.2g}"
    few_items = few(found["n"], "items recognised from the voice alone")
    why_not = few_items | around_zero(found, "difference")
    return counted(claim, facts, why_not, found, "logits")
