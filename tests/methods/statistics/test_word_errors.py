"""Errors of transcripts by hand, and what jiwer's rates would make of them."""

import jiwer
import numpy as np
import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.word_errors import (
    WordErrors,
    corpus_errors,
    distance,
    word_errors,
)


def test_the_cards_example() -> None:
    """``a b c d`` heard as ``a x c``: one substituted, one left out, half of the words wrong."""
    (found,) = word_errors(["a b c d"], ["a x c"])
    assert found == WordErrors(4, 1, 1, 0)
    assert (found.errors, found.rate) == (2, 0.5)


def test_where_nothing_is_said_all_that_is_heard_is_put_in() -> None:
    """Jiwer calls the number of insertions a rate; a corpus counts them as errors of no words."""
    assert jiwer.wer("", "a b") == 2
    (silent,) = word_errors([""], ["a b"])
    assert silent == WordErrors(0, 0, 0, 2)
    assert np.isnan(silent.rate)
    spoken = word_errors(["a b c d", "e f"], ["a b c d", "e"])
    total = corpus_errors([silent, *spoken])
    assert total == WordErrors(6, 0, 1, 2)
    assert total.rate == 0.5
    assert np.isnan(corpus_errors([]).rate)
    assert corpus_errors([]) == WordErrors(0, 0, 0, 0)


def test_both_sides_are_normalised_or_neither() -> None:
    said, heard = ["Smith's, he said."], ["smith s he said"]
    assert word_errors(said, heard)[0].errors == 3
    assert word_errors(said, heard, normalise=BasicTextNormalizer())[0].errors == 0


def test_characters() -> None:
    """Blanks between words count, as they do for jiwer; those around a text do not."""
    (found,) = word_errors(["你能 不能"], ["你能不 "], unit="character")
    assert found == WordErrors(5, 0, 2, 0)
    assert found.rate == jiwer.cer("你能 不能", "你能不 ") == 0.4


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("", "", 0.0), ("abcd", "", 1.0), ("", "ab", 1.0), ("abcd", "abxd", 0.25), ("ab", "abcd", 0.5),
     ("A b.", "a b", 0.0)],
)  # fmt: skip
def test_distance_is_a_share_of_the_longer(one: str, other: str, expected: float) -> None:
    assert distance(one, other, normalise=BasicTextNormalizer()) == expected
    assert distance(other, one, normalise=BasicTextNormalizer()) == expected


def test_every_hypothesis_needs_its_reference() -> None:
    with pytest.raises(InputError, match="got 1 hypotheses for 2 references"):
        word_errors(["a", "b"], ["a"])
