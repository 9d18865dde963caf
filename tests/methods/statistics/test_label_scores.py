"""What semantic_vs_prosody counts: the numbers of its cards, worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.label_scores import (
    dealt_hits,
    flip_rates,
    handoff_depth,
    lead,
    margin,
    of_label,
    readable_depth,
    target_recovery,
    target_shift,
    wins,
)

NEUTRAL, HAPPY, SAD = 0, 1, 2
CARD = np.array([[0, 2, 1, 0, 0], [0, 1, 3, 0, 0], [5, 1, 2, 0, 0.0]])
SEMANTIC, PROSODY = np.full(3, HAPPY), np.full(3, SAD)


def test_wins_of_the_card() -> None:
    """M-001-2: semantic, prosody, other; a third each."""
    shares = wins(CARD, SEMANTIC, PROSODY)
    assert shares.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert np.allclose(shares.mean(0), 1 / 3, rtol=0, atol=1e-15)


def test_margin_of_the_card() -> None:
    """M-001-3: -1, +2, +1; the third leans to the voice while another label wins."""
    values = margin(CARD, SEMANTIC, PROSODY)
    assert values.tolist() == [-1, 2, 1]
    assert values.mean() == pytest.approx(2 / 3)


def test_a_tie_is_shared_or_given_to_the_first() -> None:
    scores = np.array([[0.0, 4, 4, 4, 0], [7, 7, 0, 0, 0]])
    sides = np.array([HAPPY, HAPPY]), np.array([SAD, SAD])
    shared = wins(scores, *sides)
    assert np.allclose(shared, [[1 / 3, 1 / 3, 1 / 3], [0.5, 0, 0.5]], rtol=0, atol=1e-15)
    assert wins(scores, *sides, ties="first").tolist() == [[1, 0, 0], [0, 0, 1]]


@given(
    arrays(np.float64, (4, 3, 5), elements=st.integers(0, 2)), st.sampled_from(["split", "first"])
)
def test_wins_sum_to_one(scores: np.ndarray, ties: str) -> None:
    """I17; whole numbers, so that ties are frequent."""
    shares = wins(scores, np.array([0, 1, 2, 3]), np.array([4, 0, 1, 2]), ties=ties)
    assert np.allclose(shares.sum(-1), 1, rtol=0, atol=1e-15)
    assert shares.shape == (4, 3, 3)
    assert (shares >= -1e-15).all()


def test_wins_refuse_items_that_agree() -> None:
    with pytest.raises(InputError, match=r"counting wins: item 1 has the same label"):
        wins(CARD, SEMANTIC, np.array([SAD, HAPPY, SAD]))


def test_flip_rates_of_the_card() -> None:
    """M-001-6: base [h,h,s,s], target [s,s,s,h], patched [s,h,s,h]."""
    h, s = HAPPY, SAD
    base, target = np.array([h, h, s, s]), np.array([s, s, s, h])
    patched, donor = np.array([s, h, s, h]), np.array([s, h, s, s])
    rates = flip_rates(base, donor, patched, target, donor_counts=False)
    assert (rates.to_target, rates.from_base, rates.base_rate) == (0.75, 0.5, 0.25)
    assert (rates.conditional, rates.n_conditional) == (pytest.approx(2 / 3), 3)
    assert (rates.ceiling, rates.to_donor) == (0.5, 0.75)
    # C7: of the three, only the first pair's donor says the target.
    movable = flip_rates(base, donor, patched, target)
    assert (movable.conditional, movable.n_conditional) == (1.0, 1)


def test_no_movable_pair_has_no_conditional_rate() -> None:
    one = np.array([HAPPY])
    rates = flip_rates(one, one, one, np.array([SAD]))
    assert math.isnan(rates.conditional)
    assert rates.n_conditional == 0


BASE = np.array([[0.0, 3, 1, 0, 0], [2, 0, 4, 0, 0]])
DONOR = np.array([[0.0, 1, 5, 0, 0], [3, 0, 0, 0, 0]])
PATCHED = np.array([[[0.0, 2, 2, 0, 0]], [[9, 0, 4, 0, 0]]])
TARGET = np.array([SAD, SAD])


def test_shift_in_its_three_forms() -> None:
    """M-001-7, C31: a constant added to all logits moves the seed's form alone."""
    raised = PATCHED + 7
    assert target_shift(PATCHED, BASE, TARGET, "logit").tolist() == [[1], [0]]
    assert target_shift(raised, BASE, TARGET, "logit").tolist() == [[8], [7]]
    # From -2 to 0; the second item's base says the target already.
    shift = target_shift(PATCHED, BASE, TARGET, "logit_diff")
    assert shift[0].tolist() == [2]
    assert np.isnan(shift[1]).all()
    assert np.array_equal(target_shift(raised, BASE, TARGET, "logit_diff"), shift, equal_nan=True)
    log_p = target_shift(PATCHED, BASE, TARGET, "logprob")
    by_hand = [
        math.log(math.exp(2) / (3 + 2 * math.exp(2))) - math.log(math.e / (3 + math.e + math.e**3)),
        math.log(math.exp(4) / (math.exp(9) + math.exp(4) + 3))
        - math.log(math.exp(4) / (math.exp(2) + math.exp(4) + 3)),
    ]
    assert np.allclose(log_p[:, 0], by_hand, rtol=0, atol=1e-12)
    assert np.allclose(target_shift(raised, BASE, TARGET, "logprob"), log_p, rtol=0, atol=1e-12)


def test_recovery_is_a_share_of_the_donors_effect() -> None:
    """Base -2, patched 0, donor 4; and nothing to share where the base is at the target."""
    share = target_recovery(PATCHED, BASE, DONOR, TARGET, min_effect=0.5)
    assert share[0, 0] == pytest.approx(1 / 3)
    assert np.isnan(share[1]).all()
    assert np.isnan(target_recovery(PATCHED, BASE, DONOR, TARGET, min_effect=6.5)).all()


def test_handoff_of_the_block() -> None:
    """S-11."""
    assert handoff_depth(np.array([[1, 1, 0.9, 0.6, 0.4, 0.1, 0]])).tolist() == [4]
    assert handoff_depth(np.array([[1, 0.4, 0.7, 0.3]])).tolist() == [3]
    assert handoff_depth(np.array([[0.1, 0.2]])).tolist() == [0]
    assert math.isnan(handoff_depth(np.array([[1, 0.4, 0.7]]))[0])


def test_arrival_is_where_a_curve_stays_above() -> None:
    rising = np.array([[0, 0.5, 0.2, 0.5, 1], [0, 1, 1, 1, 0.4]])
    found = handoff_depth(rising, rising=True)
    assert found[0] == 3
    assert math.isnan(found[1])


def test_a_lens_is_read_only_where_it_reads_the_output() -> None:
    """C32: the sign is final from depth 1; the lens agrees in half of the items from depth 2."""
    leaning, some = np.array([[0.1, -0.1, -2, -3, -4.0]]), np.array([0.3])
    agrees = np.array([[0.9, 0.2, 0.5, 0.5, 1]])
    assert readable_depth(leaning, agrees, some).tolist() == [2]
    assert readable_depth(leaning, np.ones((1, 5)), some).tolist() == [1]
    assert readable_depth(leaning, np.array([[1, 1, 1, 0.4, 1]]), some).tolist() == [4]
    assert readable_depth(-leaning, agrees, some).tolist() == [2]
    # Always the same token would agree as often, where half of the items, or all, have it.
    assert readable_depth(leaning, agrees, np.array([0.5])).tolist() == [4]
    assert np.isnan(readable_depth(leaning, agrees, np.array([1.0]))).all()
    assert np.isnan(readable_depth(leaning, np.zeros((1, 5)), some)).all()
    assert np.isnan(readable_depth(np.zeros((1, 5)), agrees, some)).all()


def test_of_label_picks_each_items_own() -> None:
    scores = np.arange(12.0).reshape(2, 2, 3)
    assert of_label(scores, np.array([2, 0])).tolist() == [[2, 5], [6, 9]]


def test_a_lead_is_over_the_best_of_the_others() -> None:
    scores = np.array([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert lead(scores, np.array([0, 2])).tolist() == [1.0, -1.0]
    assert lead(np.stack([scores, -scores]), np.array([0, 2])).tolist() == [[1, -1], [-2, -1]]


def test_dealt_labels_are_hit_as_often_as_both_have_them() -> None:
    """Always "a", of which half are: one half; a third each way: a third."""
    assert dealt_hits("aaaa", "abab") == pytest.approx(0.5)
    assert dealt_hits("abc", "cab") == pytest.approx(1 / 3)
    assert dealt_hits("aa", "bc") == 0
