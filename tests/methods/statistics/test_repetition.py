"""Repeated n-grams and loops by hand."""

import zlib

import numpy as np
import pytest

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.repetition import compression_ratio, loops, repetition


def test_the_cards_example() -> None:
    """``a b a b a b`` has five bigrams, two of them different."""
    assert repetition([1, 2, 1, 2, 1, 2], 2) == pytest.approx(0.6)
    assert repetition([1, 2, 3], 2) == 0
    assert np.isnan(repetition([1], 2))
    assert np.isnan(repetition([], 1))
    with pytest.raises(InputError, match="got n=0"):
        repetition([1], 0)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 5, 5, 5], True),
        ([5, 5, 5], False),
        ([9, 1, 2, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 1, 2, 1, 2, 1], False),
        ([1, 2, 3, 4] * 4, True),
        ([1, 2, 3, 4, 5] * 4, False),  # five tokens are no n-gram of four
        ([1, 2, 3, 1, 2, 4] * 4, False),
        ([], False),
    ],
)
def test_loops(tokens: list[int], expected: bool) -> None:
    assert loops(tokens) is expected


def test_longer_ones_on_request() -> None:
    assert loops([1, 2, 3, 4, 5] * 4, longest=5)
    assert not loops([1, 2, 3, 4, 5] * 4, longest=5, times=5)


def test_what_is_said_again_compresses() -> None:
    """As Whisper counts: by hand, and on either side of its threshold."""
    assert compression_ratio("") == 0
    text = "two cats \N{LATIN SMALL LETTER E WITH ACUTE}"
    n = len(zlib.compress(text.encode("utf-8")))
    assert compression_ratio(text) == pytest.approx((len(text) + 1) / n)  # é has two bytes
    assert compression_ratio("The train departs from platform four at noon.") < 1.2
    assert compression_ratio("again and " * 20) > 2.4
