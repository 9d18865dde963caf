"""The measures of OB1 against the numbers given with cards M-000-7 to M-000-14."""

import numpy as np
import pandas as pd
import pytest

from hooked_alm.errors import InputError
from hooked_alm.experiments.emotion_conflict.critical_layer import (
    critical_layer,
    critical_layer_interval,
)
from hooked_alm.experiments.emotion_conflict.flips import (
    flip_matrix,
    flip_summary,
    modality_attention_ratio,
)
from hooked_alm.experiments.emotion_conflict.hypotheses import (
    dominance_test,
    late_consolidation_test,
)

METHODS = ["second_diff_abs", "second_diff_pos", "half_rise", "resolve", "changepoint"]
CARD = np.array([0.0, 0, 0, 0, 1, 2, 3])


def layers(curve: list[float] | np.ndarray, **options: object) -> list[float]:
    return [critical_layer(np.array(curve, float), m, **options) for m in METHODS]  # type: ignore[arg-type]


def test_critical_layer_of_the_card() -> None:
    # half_rise: the midpoint of 0 and 3 is passed between depths 4 and 5.
    assert layers(CARD) == [3, 3, 5, 4, 3]
    assert layers([0, 0, 1, 2])[2] == 2, "at the midpoint counts as through it"
    assert layers(CARD * 1e-6) == [3, 3, 5, 4, 3]
    assert critical_layer(CARD.astype(np.float32), "changepoint") == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("smooth", [1, 3, 5])
def test_straight_line_does_not_turn(dtype: type, smooth: int) -> None:
    # Not exact in binary: a second difference of it is rounding noise.
    line = np.linspace(-0.1, 0.77, 29).astype(dtype)
    for method in ("second_diff_abs", "second_diff_pos", "changepoint"):
        assert np.isnan(critical_layer(line, method, smooth=smooth))
        assert np.isnan(critical_layer(0 * line, method, smooth=smooth))
    assert critical_layer(line, "resolve", smooth=smooth) == 4
    assert np.isnan(critical_layer(0 * line, "half_rise", smooth=smooth))
    assert np.isnan(critical_layer(0 * line, "resolve", smooth=smooth))


def test_where_the_methods_differ() -> None:
    # Falls to A at once, then turns sharply at 2; back over the middle (-1) at 4; positive from 5.
    assert layers([0, -2, -4, -2, -0.5, 1, 2]) == [2, 2, 4, 5, 2]
    # A fall: the largest turn is away from T, which the signed second difference does not take.
    np.testing.assert_array_equal(layers([0, 0, 0, -3, -6, -7]), [2, 4, np.nan, 3, 2])
    # Resolved from the start, and only at the very end.
    assert critical_layer(np.array([1.0, 2, 1]), "resolve") == 0
    assert critical_layer(np.array([1.0, 2, -1]), "resolve") == 2
    assert critical_layer(np.array([1.0, 0, 1]), "resolve") == 2


def test_resolve_of_a_final_tie_is_undefined() -> None:
    assert np.isnan(critical_layer(np.array([1.0, -1, 0]), "resolve"))


def test_changepoint_is_the_least_squares_kink() -> None:
    rng = np.random.default_rng(0)
    depth = np.arange(29.0)
    curve = 0.2 * depth + 1.5 * np.maximum(0, depth - 17) + rng.normal(0, 0.3, 29)
    assert critical_layer(curve, "changepoint") == 17
    errors = []
    for kink in range(1, 28):
        design = np.stack([np.ones(29), depth, np.maximum(0, depth - kink)], 1)
        errors.append(np.linalg.lstsq(design, curve)[1][0])
    assert 1 + int(np.argmin(errors)) == 17


def test_smoothing_and_the_last_depth() -> None:
    curve = np.array([0.0, 0, 3, 0, 0, 0, 1, 2, 3, 4, 40])
    assert critical_layer(curve, "second_diff_abs") == 9
    assert critical_layer(curve, "second_diff_abs", exclude_last=True) == 2
    by_hand = np.array([0, 1, 1, 1, 0, 1 / 3, 1, 2, 3, 4])
    expected = 1 + int(np.argmax(np.abs(np.diff(by_hand, n=2))))
    # |second differences|: 1 at depth 1, 0, 1 at 3, 4/3 at 4.
    assert expected == 4
    assert critical_layer(curve, "second_diff_abs", smooth=3, exclude_last=True) == expected
    assert critical_layer(np.array([-1.0, -1, -1, 1]), "resolve", exclude_last=True) == 0


def test_critical_layer_errors() -> None:
    for curve, options in (
        ([1.0, 2], {}),
        ([1.0, 2, 3], {"exclude_last": True}),
        ([1.0, np.nan, 3], {}),
        ([1.0, np.inf, 3], {}),
        ([1.0, 2, 3], {"smooth": 2}),
        ([1.0, 2, 3], {"smooth": 0}),
    ):
        for method in METHODS:
            with pytest.raises(InputError, match="expected at least 3 depths, finite values and"):
                critical_layer(np.array(curve), method, **options)  # type: ignore[arg-type]


def test_interval_of_identical_curves_has_no_width() -> None:
    for method, depth in zip(METHODS, layers(CARD), strict=True):
        got = critical_layer_interval(np.tile(CARD, (5, 1)), method, seed=0, n_resamples=100)  # type: ignore[arg-type]
        assert (got.depth, got.low, got.high, got.n, got.undefined) == (depth, depth, depth, 5, 0)
        assert got.relative_depth == depth / 6


def test_interval_covers_the_samples_turns() -> None:
    late = np.array([0.0, 0, 0, 0, 0, 0, 9])
    curves = np.stack([CARD] * 9 + [late] * 9)
    got = critical_layer_interval(curves, "second_diff_abs", seed=0)
    assert (got.depth, got.low, got.high) == (5, 5, 5)
    got = critical_layer_interval(np.stack([CARD, late]), "second_diff_abs", seed=0)
    assert (got.depth, got.low, got.high) == (5, 3, 5)
    clustered = critical_layer_interval(
        curves, "second_diff_abs", seed=0, clusters=[0] * 9 + [1] * 9
    )
    assert (clustered.low, clustered.high) == (3, 5)


def test_interval_counts_replicates_without_a_turn() -> None:
    curves = np.stack([CARD, np.zeros(7)])
    got = critical_layer_interval(curves, "second_diff_abs", seed=0)
    assert (got.depth, got.low, got.high) == (3, 3, 3)
    assert got.undefined == pytest.approx(0.25, abs=0.04)
    alone = critical_layer_interval(CARD[None], "resolve", seed=0)
    assert alone.depth == 4
    assert alone.undefined == 1
    assert np.isnan([alone.low, alone.high]).all()


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


def test_flip_matrix() -> None:
    items = pd.concat([card_items(), card_items().assign(conflict="cheerful").iloc[[2, 2, 3]]])
    labels = ["neutral", "cheerful", "sad", "angry", "terrified"]
    rates, counts = flip_matrix(items, labels)
    assert list(rates.index) == list(rates.columns) == labels == list(counts.index)
    assert counts.to_numpy().sum() == 7
    assert counts.loc["neutral", "angry"] == 3
    assert rates.loc["neutral", "angry"] == 2 / 3
    assert rates.loc["cheerful", "sad"] == 1 / 2
    assert rates.loc["angry", "neutral"] == 1
    assert rates.isna().to_numpy().sum() == 25 - 4


def test_flip_errors() -> None:
    for function in (flip_summary, lambda table: flip_matrix(table, ["sad"])):
        with pytest.raises(InputError, match=r"without \['named', 'conflict'\]"):
            function(card_items().drop(columns=["named", "conflict"]))
        with pytest.raises(InputError, match=r"got 4 rows .* voice = named.*'voice': 'sad'"):
            function(card_items().assign(named=lambda table: table.voice))
        with pytest.raises(InputError, match="got 4 rows with a missing label"):
            function(card_items().assign(conflict=None))


def test_modality_attention_ratio_of_the_card() -> None:
    audio, text = np.array([0.4, 0.0, 0.3]), np.array([0.1, 0.0, 0.0])
    cases = {"fraction": (0.8, 1.0), "ratio": (4.0, np.nan), "density": (2.0, np.nan)}
    for form, (card, audio_only) in cases.items():
        got = modality_attention_ratio(audio, text, 2, 1, form)  # type: ignore[arg-type]
        np.testing.assert_allclose(got, [card, np.nan, audio_only], rtol=1e-15)
    assert modality_attention_ratio(audio, text, 2, 1)[0] == 0.8
    with pytest.raises(InputError, match="got 0 audio and 1 text tokens"):
        modality_attention_ratio(audio, text, 0, 1)
    with pytest.raises(InputError, match=r"masses from -0\.1"):
        modality_attention_ratio(audio, -text, 2, 1)


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


def test_late_consolidation_is_found_where_it_is() -> None:
    got = late_consolidation_test(scores_settling_at(20), PAIRS, seed=0)
    assert got.depths.tolist() == [20.0] * 18
    assert (got.finding.estimate, got.finding.low, got.finding.high) == (20, 20, 20)
    assert (got.finding.n, got.finding.established, got.finding.unit) == (18, True, "blocks")
    assert got.p == 1 / 2001
    assert got.null.shape == (2000,)
    assert got.null_low <= got.null_mean <= got.null_high < 20
    assert got.finding.statement.startswith(
        "The conflict is settled late. Mean settling depth 20.00"
    )
    again = late_consolidation_test(scores_settling_at(20), PAIRS, seed=0)
    assert np.array_equal(got.null, again.null)
    # The order within a pair is the sign of the contrast, which settles at the same depth.
    swapped = late_consolidation_test(scores_settling_at(20), PAIRS[:, ::-1].copy(), seed=0)
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
    got = late_consolidation_test(scores, PAIRS[: len(scores)], seed=0)
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
        got = late_consolidation_test(scores, pairs, seed=0, n_permutations=200, n_resamples=2)
        ps.append(got.p)
    assert np.mean(np.array(ps) < 0.05) < 0.1
    assert 0.4 < np.mean(ps) < 0.6


def test_late_consolidation_leaves_out_ties() -> None:
    scores = scores_settling_at(20)
    scores[3, -1, 0] = scores[3, -1, 1]
    got = late_consolidation_test(scores, PAIRS, seed=0)
    assert got.finding.n == 17
    assert "1 items end level and are left out" in got.finding.statement
    flat = late_consolidation_test(np.zeros((18, 29, 5)), PAIRS, seed=0)
    assert (flat.finding.n, flat.finding.established, flat.p) == (0, False, 1)


def test_late_consolidation_errors() -> None:
    for pairs in ([0, 0], [0, 5], [-1, 1]):
        with pytest.raises(InputError, match=r"18 of them bad \(the first is 0\)"):
            late_consolidation_test(scores_settling_at(20), np.tile(pairs, (18, 1)), seed=0)
    scores = scores_settling_at(20)
    scores[4, 2, 3] = np.nan
    with pytest.raises(InputError, match=r"1 of them bad \(the first is 4\); expected finite"):
        late_consolidation_test(scores, PAIRS, seed=0)


def test_dominance() -> None:
    rng = np.random.default_rng(0)
    text, voice = 3 + rng.normal(size=18), rng.normal(size=18)
    right = np.arange(18) != 5
    for sign, claim in ((1, "The text dominates the voice"), (-1, "The voice dominates the text")):
        got = dominance_test(sign * text, sign * voice, right, seed=0)
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
    even = dominance_test(text, text[::-1].copy(), everyone, seed=0)
    assert not even.established
    assert even.statement.startswith("Not established (the interval includes 0): ")
    few = dominance_test(text + 9, voice, np.arange(18) < 9, seed=0)
    assert (few.n, few.established) == (9, False)
    assert few.statement.startswith(
        "Not established (only 9 items recognised from the voice alone)"
    )
    none = dominance_test(text, voice, ~everyone, seed=0)
    assert (none.n, none.established) == (0, False)
    # All of the effect comes from one speaker of two; clips of one speaker are no replication.
    text[:9] += 20
    speakers = ["a"] * 9 + ["b"] * 9
    assert dominance_test(text, voice, everyone, seed=0).established
    assert not dominance_test(text, voice, everyone, seed=0, clusters=speakers).established
