"""Which donor position stands for which base position: the card's numbers, every policy, bounds."""

import inspect
import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_alm import ALMInput, InputError
from hooked_alm.inputs import positions_from_mask
from hooked_alm.methods.patching.alignment import Alignment, AlignPolicy, align
from hooked_alm.methods.patching.warping import dtw_indices, path_costs
from hooked_alm.spans import Range, SpanMap

POLICIES: tuple[AlignPolicy, ...] = ("resample_linear", "truncate", "pad_last", "dtw")
"""Those that take spans of unequal length, span by span."""

LENGTHS = st.integers(min_value=1, max_value=12)
EXAMPLES = settings(deadline=None, max_examples=30)


def prompt(
    *rows: dict[str, list[Range]], n_pos: int = 40, n_pads: tuple[int, ...] = ()
) -> ALMInput:
    """An input with the given spans, and nothing else that an aligner reads."""
    names = dict.fromkeys(name for row in rows for name in row)
    mask = torch.ones(len(rows), n_pos, dtype=torch.long)
    for row, pads in enumerate(n_pads):
        mask[row, :pads] = 0
    return ALMInput(
        tokens=torch.zeros_like(mask),
        attention_mask=mask,
        position_ids=positions_from_mask(mask),
        spans=SpanMap({name: [row.get(name, []) for row in rows] for name in names}, n_pos),
    )


def audio(start: int, length: int) -> ALMInput:
    return prompt({"audio": [(start, start + length)]})


def aligned(ours: int, theirs: int, policy: AlignPolicy, **options: Any) -> Alignment:
    """Base audio from position 3, donor audio from position 7."""
    if policy == "dtw" and "features" not in options:
        options["features"] = (torch.randn(40, 5), torch.randn(40, 5))
    return align(audio(3, ours), audio(7, theirs), ["audio"], policy=policy, **options)


def donor_index(alignment: Alignment) -> list[float]:
    """Where on the donor's axis each base position reads, counted from the span's start."""
    return [
        low + weight * (high - low) - 7
        for low, high, weight in zip(
            alignment.lower, alignment.upper, alignment.weight, strict=True
        )
    ]


def test_card_s4() -> None:
    # Lengths 4 -> 2: two base positions read indices 0 and 3 of four.
    two_of_four = aligned(2, 4, "resample_linear")
    assert donor_index(two_of_four) == [0, 3]
    assert two_of_four.is_exact
    for policy in (*POLICIES, "error"):
        equal = aligned(4, 4, policy)
        assert equal.base == [3, 4, 5, 6]
        assert equal.lower == equal.upper == [7, 8, 9, 10]
        assert equal.is_exact
        assert equal.length_ratio == {"audio": 1.0}


def test_policies_by_hand() -> None:
    def indices(ours: int, theirs: int, policy: AlignPolicy) -> list[float]:
        return donor_index(aligned(ours, theirs, policy))

    assert indices(4, 2, "resample_linear") == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert indices(5, 3, "resample_linear") == [0, 0.5, 1, 1.5, 2]
    assert indices(3, 5, "resample_linear") == [0, 2, 4]
    assert indices(1, 5, "resample_linear") == [0]
    assert indices(3, 1, "resample_linear") == [0, 0, 0]
    assert indices(4, 2, "truncate") == [0, 1]
    assert indices(2, 4, "truncate") == [0, 1]
    assert indices(4, 2, "pad_last") == [0, 1, 1, 1]
    assert indices(2, 4, "pad_last") == [0, 1]
    assert aligned(4, 2, "truncate").base == [3, 4], "the base's end is left unpatched"


def test_donor_values() -> None:
    donor = torch.arange(40.0)[:, None, None] * torch.tensor([[1.0, 10.0], [100.0, -1.0]])
    values = aligned(5, 3, "resample_linear").donor_values(donor)
    expected = torch.tensor([7, 7.5, 8, 8.5, 9])[:, None, None] * donor[1]
    assert torch.equal(values, expected)
    exact = aligned(3, 3, "error").donor_values(donor)
    assert torch.equal(exact, donor[7:10])
    bf16 = aligned(5, 3, "resample_linear").donor_values(donor.bfloat16())
    assert bf16.dtype == torch.bfloat16


def test_several_spans_keep_their_order_and_their_ratios() -> None:
    base = prompt({"audio": [(5, 9)], "text": [(1, 3), (10, 11)], "label": [(10, 11)]})
    donor = prompt({"audio": [(6, 8)], "text": [(0, 2), (20, 21)], "label": [(20, 21)]})
    both = align(base, donor, ["text", "audio"], policy="pad_last")
    assert both.base == [1, 2, 10, 5, 6, 7, 8]
    assert both.lower == [0, 1, 20, 6, 7, 7, 7]
    assert both.length_ratio == {"text": 1.0, "audio": 0.5}
    assert align(base, donor, ["label"]).lower == [20]


def test_clips_do_not_run_over_into_each_other() -> None:
    """Two clips of 2 and 4 positions against two of 4 and 2: as many, but not the same ones."""
    base = prompt({"audio": [(2, 4), (6, 10)]})
    donor = prompt({"audio": [(2, 6), (8, 10)]})
    with pytest.raises(InputError, match="2 base and 4 donor positions"):
        align(base, donor, ["audio"])
    resampled = align(base, donor, ["audio"], policy="resample_linear")
    assert resampled.base == [2, 3, 6, 7, 8, 9]
    assert resampled.lower == [2, 5, 8, 8, 8, 9]
    assert resampled.weight == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 0])
    assert resampled.length_ratio == {"audio": 1.0}
    one_clip = prompt({"audio": [(2, 8)]})
    assert align(one_clip, donor, ["audio"]).lower == [2, 3, 4, 5, 8, 9]


def test_rows_have_their_own_alignments() -> None:
    base = prompt({"audio": [(2, 4)]}, {"audio": [(5, 6)]})
    donor = prompt({"audio": [(9, 11)]}, {"audio": [(3, 4)]})
    assert align(base, donor, ["audio"], row=1).base == [5]
    assert align(base, donor, ["audio"], row=1).lower == [3]
    assert align(base, donor, ["audio"], row=0).lower == [9, 10]


def test_min_len_counts_real_positions_from_the_start_of_both_prompts() -> None:
    # Base row 0 has 4 pads and 36 positions, the donor 1 and 11: index 11 and up have no partner.
    base = prompt({"audio": [(6, 10)], "text": [(12, 18)]}, {"audio": [(0, 2)]}, n_pads=(4, 0))
    donor = prompt({"audio": []}, {"audio": []}, n_pos=12, n_pads=(1, 3))
    both = align(base, donor, ["text", "audio"], policy="min_len")
    assert both.base == [6, 7, 8, 9, 12, 13, 14]
    assert both.lower == both.upper == [pos - 4 + 1 for pos in both.base]
    assert both.is_exact
    assert both.length_ratio == {}
    assert align(base, donor, ["audio"], row=1, policy="min_len").lower == [3, 4]


def test_min_len_without_length_differences_is_the_identity() -> None:
    base, donor = (prompt({"audio": [(4, 9)]}, n_pos=n, n_pads=(n - 20,)) for n in (20, 23))
    donor = prompt({"audio": [(7, 12)]}, n_pos=23, n_pads=(3,))
    by_span, by_index = (
        align(base, donor, ["audio"], policy=policy) for policy in ("error", "min_len")
    )
    assert (by_span.base, by_span.lower) == (by_index.base, by_index.lower)


def test_empty_spans() -> None:
    nowhere = prompt({"audio": []})
    empty = align(nowhere, nowhere, ["audio"])
    assert empty.base == empty.lower == []
    assert math.isnan(empty.length_ratio["audio"])
    assert empty.donor_values(torch.randn(40, 3)).shape == (0, 3)
    for policy in ("error", *POLICIES):
        for base, donor in ((nowhere, audio(3, 2)), (audio(3, 2), nowhere)):
            with pytest.raises(InputError, match="nothing to align; leave the span out"):
                align(base, donor, ["audio"], policy=policy)


def test_refusals() -> None:
    with pytest.raises(
        InputError, match=r"span 'audio' of row 0: 4 base and 2 donor .* 'error' does not apply"
    ):
        aligned(4, 2, "error")
    base, donor = prompt({"text": [(0, 4)]}), prompt({"text": [(0, 2)]})
    with pytest.raises(InputError, match="'resample_linear' does not apply"):
        align(base, donor, ["text"], policy="resample_linear")
    with pytest.raises(InputError, match="'dtw' does not apply.*'dtw' \\(with features\\)"):
        align(base, donor, ["text"], policy="dtw")
    with pytest.raises(InputError, match="looking up span 'speech': this input has text"):
        align(base, donor, ["speech"])
    with pytest.raises(InputError, match=r"got 'texts' in the policy.*some of the spans text"):
        align(base, base, ["text"], policy={"texts": "nearest"})
    without_type_checks = inspect.unwrap(align)
    with pytest.raises(InputError, match=r"got 'closest' in the policy, expected error, resample"):
        without_type_checks(base, base, ["text"], policy="closest")


def test_dtw_of_equal_features_is_the_identity() -> None:
    x = torch.randn(9, 5)
    assert dtw_indices(x, x) == list(range(9))
    assert dtw_indices(x, 3 * x) == list(range(9)), "cosine: loudness does not matter"
    assert dtw_indices(x[:1], x[:1]) == [0]


def test_dtw_of_a_stretched_copy_finds_it() -> None:
    x = torch.eye(4)
    stretched = x.repeat_interleave(3, dim=0)
    # Each base row meets three copies of itself, and takes the middle one.
    assert dtw_indices(x, stretched) == [1, 4, 7, 10]
    assert dtw_indices(stretched, x) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    # Only the middle is slower.
    uneven = x[[0, 1, 1, 1, 2, 3]]
    assert dtw_indices(x, uneven) == [0, 2, 4, 5]
    assert dtw_indices(x[:1], x) == [1], "one row meets all four; of two in the middle, the earlier"
    assert dtw_indices(x, x[:1]) == [0, 0, 0, 0]


def test_dtw_is_the_best_path() -> None:
    """Against every path there is."""

    def paths(i: int, j: int) -> list[list[tuple[int, int]]]:
        if i == j == 0:
            return [[(0, 0)]]
        before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        return [[*path, (i, j)] for a, b in before if a >= 0 and b >= 0 for path in paths(a, b)]

    for seed in range(5):
        generator = torch.manual_seed(seed)
        a, b = (torch.randn(n, 3, generator=generator) for n in (4, 5))
        cost = 1 - torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
        best = min(paths(3, 4), key=lambda path: sum(float(cost[at]) for at in path))
        stretches = [[j for i, j in best if i == row] for row in range(4)]
        assert dtw_indices(a, b) == [stretch[(len(stretch) - 1) // 2] for stretch in stretches]


@given(st.data(), LENGTHS, LENGTHS, st.booleans())
@EXAMPLES
def test_path_costs_are_those_of_cell_by_cell(
    data: st.DataObject, n: int, m: int, has_ties: bool
) -> None:
    """To the last bit, so that ties are broken alike; sides of one cell included."""
    values = st.sampled_from([0.0, 0.1, 0.3]) if has_ties else st.floats(0, 2, width=32)
    rows = st.lists(values, min_size=n * m, max_size=n * m)
    cost = np.array(data.draw(rows), np.float32).reshape(n, m)
    expected = np.full((n + 1, m + 1), np.inf)
    expected[0, 0] = 0.0
    for i, j in np.ndindex(n, m):
        before = min(expected[i, j], expected[i, j + 1], expected[i + 1, j])
        expected[i + 1, j + 1] = cost[i, j] + before
    assert np.array_equal(path_costs(cost), expected)


def test_dtw_of_a_long_clip_takes_no_time() -> None:
    """Thirty seconds against thirty: cell by cell it is two seconds, by diagonals hundredths."""
    base, donor = (torch.randn(750, 8, generator=torch.manual_seed(seed)) for seed in (0, 1))
    began = time.process_time()
    path = dtw_indices(base, donor)
    assert time.process_time() - began < 0.7
    assert path == sorted(path)


def test_dtw_reads_the_features_of_the_span() -> None:
    """In `align`, features are those of all positions."""
    ours, theirs = torch.randn(40, 5), torch.randn(40, 5)
    theirs[7:15] = ours[3:7].repeat_interleave(2, dim=0)
    alignment = aligned(4, 8, "dtw", features=(ours, theirs))
    assert donor_index(alignment) == [0, 2, 4, 6]
    assert alignment.length_ratio == {"audio": 2.0}


@given(ours=LENGTHS, theirs=LENGTHS, policy=st.sampled_from(POLICIES), seed=st.integers(0, 99))
@EXAMPLES
def test_alignments_stay_inside_and_keep_the_order(
    ours: int, theirs: int, policy: AlignPolicy, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = tuple(torch.randn(40, 3, generator=generator) for _ in range(2))
    alignment = aligned(ours, theirs, policy, features=features)
    n = min(ours, theirs) if policy == "truncate" else ours
    assert alignment.base == list(range(3, 3 + n))
    assert len(alignment.lower) == len(alignment.upper) == len(alignment.weight) == n
    for low, high, weight in zip(alignment.lower, alignment.upper, alignment.weight, strict=True):
        assert 7 <= low <= high < 7 + theirs
        assert high - low <= 1
        assert 0 <= weight < 1
    at = donor_index(alignment)
    assert at == sorted(at)
    assert alignment.length_ratio == {"audio": theirs / ours}
    values = alignment.donor_values(torch.arange(40.0, dtype=torch.float64)[:, None])[:, 0] - 7
    assert values.tolist() == at


@given(ours=LENGTHS, theirs=LENGTHS)
@EXAMPLES
def test_resampling_maps_ends_to_ends_evenly(ours: int, theirs: int) -> None:
    at = donor_index(aligned(ours, theirs, "resample_linear"))
    assert at[0] == 0
    if ours > 1:
        assert at[-1] == theirs - 1
        steps = [b - a for a, b in pairwise(at)]
        assert steps == pytest.approx([(theirs - 1) / (ours - 1)] * (ours - 1))


def test_nearest_keeps_positions_whole() -> None:
    """Endpoints map to endpoints, nothing is mixed, and one position takes the last."""
    for n_base, n_donor, expected in ((3, 5, [0, 2, 4]), (5, 3, [0, 0, 1, 2, 2]), (1, 3, [2])):
        base, donor = (prompt({"text": [(1, 1 + n)]}) for n in (n_base, n_donor))
        found = align(base, donor, ["text"], policy="nearest")
        assert found.is_exact
        assert found.lower == [donor.spans.positions("text", 0)[i] for i in expected]


def test_a_longer_label_does_not_shift_the_words_around_it() -> None:
    """The text is cut at the label: words before and behind it map one to one."""
    base = prompt({"text": [(1, 7)], "label": [(4, 5)]})
    donor = prompt({"text": [(1, 8)], "label": [(4, 6)]})
    found = align(base, donor, ["text"], policy={"text": "nearest"})
    # Three words, a label of one or two tokens, two words.
    assert found.base == [1, 2, 3, 4, 5, 6]
    assert found.lower == [1, 2, 3, 5, 6, 7]
    with pytest.raises(InputError, match="policy 'error' does not apply"):
        align(base, donor, ["text"], policy={"audio": "resample_linear"})
