"""Semantic tokens, classes and alignment: the cards' numbers, and Python code that is cut off."""

from typing import Any

import numpy as np
import pytest

from hooked_alm.experiments.prefix_comparison.tokens import (
    ANCHOR_WINDOW,
    Tokens,
    anchor_of,
    binned,
    read_tokens,
    window,
)
from tiny import build_tokenizer


class Words:
    """A tokenizer whose tokens are given."""

    all_special_ids = (99,)

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, ids: list[int], **_: Any) -> str:
        return "<end>" if ids == [99] else self.texts[ids[0]]


def read(*texts: str, kind: Any = "code", labels: tuple[str, ...] = ()) -> Tokens:
    ends = np.cumsum([len(text) for text in texts]).tolist()
    offsets = list(zip([0, *ends[:-1]], ends, strict=True))
    ids = list(range(len(texts)))
    return read_tokens(Words(*texts), ids, offsets, "".join(texts), kind, labels)


def test_card_m_002_5() -> None:
    tokens = read("    ", "return", " x", "\n")
    assert tokens.semantic == [1, 2]
    assert tokens.shown == ["return", " x"]


def test_special_tokens_are_left_out_and_fragments_kept_and_flagged() -> None:
    tokenizer = build_tokenizer()
    text = "a 龘<|im_end|>"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    tokens = read_tokens(tokenizer, ids, offsets, text, "speech")
    assert len(ids) == 6  # a, the space, three bytes, the end of turn; or the space with a byte
    assert tokens.is_fragment.count(True) == 3
    assert len(ids) - 1 not in tokens.semantic
    assert all(index in tokens.semantic for index, odd in enumerate(tokens.is_fragment) if odd)


def test_card_m_002_6() -> None:
    tokens = read("return", " x1", "+", "2")
    assert tokens.classes == ["structure", "identifier", "operator", "literal"]


def test_classes_across_lines_and_by_majority() -> None:
    texts = ("    ", "if", " x", ":\n", "        ", "s", " =", " 'a", "b'", "  # why", "\n")
    assert read(*texts).classes == [
        "other", "structure", "identifier", "operator", "other", "identifier", "operator",
        "literal", "literal", "other", "other",
    ]  # fmt: skip
    # Two letters of a name outvote a bracket.
    assert read("ab(", "1", ")").classes == ["identifier", "literal", "operator"]
    assert read("x = '''a", "\nb'''").classes == ["literal", "literal"]


@pytest.mark.parametrize("end", [(" (", "1,", "\n"), (" 'open",), ("\n", "  y", "\n", " z")])
def test_code_that_breaks_off_is_read_as_far_as_it_goes(end: tuple[str, ...]) -> None:
    tokens = read("x", " =", " 2", "\n", "return", *end)
    expected = ["identifier", "operator", "literal", "other", "structure"]
    assert tokens.classes[:5] == expected
    assert len(tokens.classes) == 5 + len(end)


def test_speech_classes() -> None:
    tokens = read("the", " word", " 42", ",", " sad", kind="speech", labels=("sad",))
    assert tokens.classes == ["function word", "other", "number", "punctuation", "label"]
    assert read("sad", "ly", " sad", kind="speech", labels=("sad",)).classes == [
        "other", "other", "label",
    ]  # fmt: skip
    assert read("高兴", "的", "人", kind="speech", labels=("高兴",)).classes == [
        "label", "function word", "other",
    ]  # fmt: skip


def test_card_m_002_8() -> None:
    np.testing.assert_array_equal(binned(np.array([[1.0, 3, 7]]), 2), [[2, 7]])
    values = np.array([[5.0, 7.0]])
    np.testing.assert_array_equal(binned(values, 4), [[5, np.nan, 7, np.nan]])
    np.testing.assert_array_equal(binned(np.array([[1.0, 3, 5, 9]]), 2), [[2, 7]])


def test_first_tokens_leave_open_what_is_not_there() -> None:
    values = np.array([[1.0, 2, 3]])
    np.testing.assert_array_equal(window(values, 0, 2), [[1, 2]])
    np.testing.assert_array_equal(window(values, 0, 5), [[1, 2, 3, np.nan, np.nan]])


def test_anchors() -> None:
    tokens = read("if", " x", ":", "\n  ", "ret", "urn", " 2", "\n", "return", "\n", "for")
    anchors = ("first_return", "last_return", "first_if", "first_loop")
    assert [anchor_of(tokens, anchor) for anchor in anchors] == [3, 6, 0, 7]
    assert anchor_of(read("x", " =", " 'return", "'", " # return"), "first_return") is None
    assert anchor_of(read("returned", " =", " 1"), "first_return") is None
    # A tokenizer whose tokens, decoded one by one, lack the space before them.
    bare = read_tokens(Words("x", "return", "y"), [0, 1, 2], [(0, 1), (1, 9), (9, 11)],
                       "x\n return y", "code")  # fmt: skip
    assert anchor_of(bare, "first_return") == 1
    values = np.arange(7.0)[None]
    low, high = ANCHOR_WINDOW
    cut = window(values, 3 + low, 3 + high)
    assert cut.shape == (1, high - low)
    assert cut[0, -low] == 3
    assert cut[0, -low - 3] == 0
    assert np.isnan(cut[0, -low - 4])
    assert cut[0, -low + 3] == 6
    assert np.isnan(cut[0, -low + 4])
