"""The measures of OB1 against the numbers given with cards M-000-7 to M-000-14."""

import numpy as np
import pandas as pd
import pytest

from hooked_alm.experiments.emotion_conflict.hypotheses import (
    dominance_test,
    late_consolidation_test,
)
from hooked_alm.experiments.emotion_conflict.tables import flip_cells, flip_summary
from hooked_alm.experiments.materials.ob1 import EMOTIONS
from hooked_alm.experiments.workbench.intervals import Draws
from hooked_alm.methods.statistics import draws

DRAWS = Draws(0, 2000)
METHODS = ["second_diff_abs", "second_diff_pos", "half_rise", "resolve", "changepoint"]
CARD = np.array([0.0, 0, 0, 0, 1, 2, 3])


def card_items() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "voice": ["sad", "angry", "neutral", "cheerful"],
            "named": ["cheerful", "neutral", "angry", "sad"],
            "audio_only": ["sad", "sad", "neutral", "cheerful"],
            "conflict": ["cheerful", "neutral", "neutral", "sad"],
        }
    )


def test_flip_summary_of_the_card() -> None:
    summary = flip_summary(card_items()).set_index(["measure", "among"])
    assert summary.rate.to_dict() == {
        ("audio_only_correct", "all"): 3 / 4,
        ("text_follow", "all"): 3 / 4,
        ("text_follow", "audio_only_correct"): 2 / 3,
        ("audio_follow", "all"): 1 / 4,
        ("audio_follow", "audio_only_correct"): 1 / 3,
        ("other", "all"): 0,
        ("other", "audio_only_correct"): 0,
        ("flip", "all"): 3 / 4,
        ("flip", "audio_only_correct"): 2 / 3,
    }
    flip = summary.loc["flip", "audio_only_correct"]
    assert (flip.k, flip.n) == (2, 3)
    np.testing.assert_allclose([flip.low, flip.high], [0.208, 0.939], atol=5e-4)


def test_flip_shares_sum_to_one_and_other_is_counted() -> None:
    items = card_items()
    items.loc[0, "conflict"] = "terrified"
    summary = flip_summary(items).set_index(["measure", "among"])
    for among in ("all", "audio_only_correct"):
        parts = [summary.loc[m, among] for m in ("text_follow", "audio_follow", "other")]
        assert sum(part.k for part in parts) == parts[0].n
        assert parts[2].k == 1


def test_flip_summary_without_recognised_items() -> None:
    items = card_items().assign(audio_only="terrified")
    summary = flip_summary(items).set_index(["measure", "among"])
    assert summary.loc["flip", "audio_only_correct"].n == 0
    assert summary.xs("audio_only_correct", level="among").rate.isna().all()
    assert summary.loc["flip", "all"].rate == 1


def test_flip_cells() -> None:
    items = pd.concat([card_items(), card_items().assign(conflict="cheerful").iloc[[2, 2, 3]]])
    labels = ["neutral", "cheerful", "sad", "angry", "terrified"]
    cells = flip_cells(items, EMOTIONS).set_index(["voice", "named"])
    assert list(cells.index) == [(voice, named) for voice in labels for named in labels]
    assert cells.n.sum() == 7
    assert cells.n["neutral", "angry"] == 3
    assert cells.rate["neutral", "angry"] == 2 / 3
    assert cells.rate["cheerful", "sad"] == 1 / 2
    assert cells.rate["angry", "neutral"] == 1
    assert cells.rate.isna().sum() == 25 - 4


def scores_settling_at(depth: int, n: int = 18, n_depths: int = 29) -> np.ndarray:
    """Labels 0 and 1 swap for good at ``depth``; each other contrast settles somewhere early."""
    rng = np.random.default_rng(0)
    scores = np.zeros((n, n_depths, 5))
    start = rng.integers(0, 8, (n, 5))
    scores += 10 * np.arange(5) * (np.arange(n_depths)[:, None] >= start[:, None])
    scores += rng.normal(size=scores.shape)
    scores[..., 0] = scores[..., 1] + np.where(np.arange(n_depths) < depth, -1, 1)
    return scores


PAIRS = np.tile([0, 1], (18, 1))


def test_late_consolidation_is_found_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    got = late_consolidation_test(scores_settling_at(20), PAIRS, DRAWS)
    assert got.depths.tolist() == [20.0] * 18
    assert (got.finding.estimate, got.finding.low, got.finding.high) == (20, 20, 20)
    assert (got.finding.n, got.finding.established, got.finding.unit) == (18, True, "blocks")
    assert got.p == 1 / 2001
    assert got.null.shape == (2000,)
    assert got.null.max() < 20
    assert got.finding.statement.startswith(
        "The conflict is settled late. Mean settling depth 20.00"
    )
    again = late_consolidation_test(scores_settling_at(20), PAIRS, DRAWS)
    assert np.array_equal(got.null, again.null)
    monkeypatch.setattr(draws, "MOST_BYTES", 100_000)
    in_chunks = late_consolidation_test(scores_settling_at(20), PAIRS, DRAWS)
    assert np.array_equal(got.null, in_chunks.null), "to the last bit"
    # The order within a pair is the sign of the contrast, which settles at the same depth.
    swapped = late_consolidation_test(scores_settling_at(20), PAIRS[:, ::-1].copy(), DRAWS)
    assert np.array_equal(got.depths, swapped.depths)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (scores_settling_at(0), "no later than random label pairs; interval not past depth 14"),
        (scores_settling_at(13), "(interval not past depth 14)"),
        # On average late (15.8 of 28), but not with any certainty.
        (
            np.concatenate([scores_settling_at(8)[:8], scores_settling_at(22)[8:]]),
            "(interval not past depth 14)",
        ),
        (scores_settling_at(20, n=9), "(only 9 items)"),
    ],
)
def test_late_consolidation_that_is_not_established(scores: np.ndarray, reason: str) -> None:
    got = late_consolidation_test(scores, PAIRS[: len(scores)], DRAWS)
    assert not got.finding.established
    assert got.finding.statement.startswith("Not established (")
    assert reason in got.finding.statement


def test_late_consolidation_is_calibrated() -> None:
    """Where T and A are labels like any other, H1 is rarely beyond the null."""
    rng = np.random.default_rng(0)
    ps = []
    for _ in range(200):
        scores = np.cumsum(rng.normal(size=(12, 15, 5)), axis=1)
        pairs = np.array([rng.permutation(5)[:2] for _ in range(12)])
        got = late_consolidation_test(scores, pairs, Draws(0, 2), n_permutations=200)
        ps.append(got.p)
    assert np.mean(np.array(ps) < 0.05) < 0.1
    assert 0.4 < np.mean(ps) < 0.6


def test_late_consolidation_leaves_out_ties() -> None:
    scores = scores_settling_at(20)
    scores[3, -1, 0] = scores[3, -1, 1]
    got = late_consolidation_test(scores, PAIRS, DRAWS)
    assert got.finding.n == 17
    assert "1 items end level and are left out" in got.finding.statement
    flat = late_consolidation_test(np.zeros((18, 29, 5)), PAIRS, DRAWS)
    assert (flat.finding.n, flat.finding.established, flat.p) == (0, False, 1)


def test_dominance() -> None:
    rng = np.random.default_rng(0)
    text, voice = 3 + rng.normal(size=18), rng.normal(size=18)
    right = np.arange(18) != 5
    for sign, claim in ((1, "The text dominates the voice"), (-1, "The voice dominates the text")):
        got = dominance_test(sign * text, sign * voice, right, DRAWS)
        assert got.established
        assert got.n == 17
        assert got.estimate == pytest.approx(sign * (text - voice)[right].mean())
        assert min(sign * got.low, sign * got.high) > 0
        numbers = f"{got.estimate:.2f} [{got.low:.2f}, {got.high:.2f}] logits"
        # 17 of 17 values have one sign: p = 2 / 2^17.
        p = "sign test p = 1.5e-05, n = 17."
        assert got.statement == f"{claim}. TE(text) − TE(voice) = {numbers}, {p}"


def test_dominance_that_is_not_established() -> None:
    rng = np.random.default_rng(0)
    text, voice = rng.normal(size=18), rng.normal(size=18)
    everyone = np.ones(18, bool)
    even = dominance_test(text, text[::-1].copy(), everyone, DRAWS)
    assert not even.established
    assert even.statement.startswith(
        "Not established (the interval of the difference includes 0): "
    )
    few = dominance_test(text + 9, voice, np.arange(18) < 9, DRAWS)
    assert (few.n, few.established) == (9, False)
    assert few.statement.startswith(
        "Not established (only 9 items recognised from the voice alone)"
    )
    none = dominance_test(text, voice, ~everyone, DRAWS)
    assert (none.n, none.established) == (0, False)
    # All of the effect comes from one speaker of two; clips of one speaker are no replication.
    text[:9] += 20
    speakers = ["a"] * 9 + ["b"] * 9
    assert dominance_test(text, voice, everyone, DRAWS).established
    assert not dominance_test(text, voice, everyone, DRAWS, clusters=speakers).established
