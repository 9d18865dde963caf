"""The continuation's tokens: which carry meaning, of what class, and where they are aligned.

Source: cards M-002-5 (semantic tokens), M-002-6 (classes) and M-002-8 (alignment across items).
"""

import io
import keyword
import re
import tokenize
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from .saved import decoded
from .settings import Anchor

Kind = Literal["code", "speech"]
FUNCTION_WORDS = frozenset(
    "a an the this that these those i you he she it we they me him her us them my your his its our "
    "their and or but if because while as of at by for with about to from in on off over under not "
    "no nor so than too very is am are was were be been being have has had do does did will would "
    "can could may might must shall should 的 了 着 过 和 与 或 但 在 是 也 "
    "都 就 而 及 把 被 对 从 到 吗 呢 吧 这 那 我 你 他 她 它 们 不 没 有".split()
)
REPLACEMENT = "\ufffd"
ANCHOR_WORDS: dict[Anchor, tuple[str, ...]] = {
    "first_return": ("return",),
    "last_return": ("return",),
    "first_if": ("if",),
    "first_loop": ("for", "while"),
}
_ANCHORS = re.compile(rf"\b({'|'.join(sum(ANCHOR_WORDS.values(), ()))})\b")
ANCHOR_WINDOW = (-8, 24)
"""Semantic tokens around an anchor that are kept, half-open."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A continuation's tokens; ``semantic`` are the indices that are not blank and not special."""

    texts: list[str]
    semantic: list[int]
    classes: list[str]
    is_fragment: list[bool]
    """Whether the token decodes to a piece of a character; it is kept."""
    keywords: list[str]
    """The keyword of an anchor that begins in the token, or nothing."""

    @property
    def shown(self) -> list[str]:
        """Texts of the semantic tokens."""
        return [self.texts[index] for index in self.semantic]


def read_tokens(
    tokenizer: Any,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    text: str,
    kind: Kind,
    labels: Sequence[str] = (),
) -> Tokens:
    """Texts, semantic indices and classes of a continuation.

    Code is read by Python's own tokenizer; of speech, ``labels`` are the label words. ``offsets``
    are each token's range of characters in the text.
    """
    texts = [decoded(tokenizer, token) for token in ids]
    special = {*tokenizer.all_special_ids}
    by_character = _code_classes(text) if kind == "code" else _speech_classes(text, labels)
    # Keywords are found in the text: tokens decoded one by one may lack the spaces between them.
    begin = {
        match.start(): match.group()
        for match in _ANCHORS.finditer(text)
        if by_character[match.start()] == "structure"  # not in a string or comment
    }
    return Tokens(
        texts=texts,
        semantic=[
            index
            for index, (token, shown) in enumerate(zip(ids, texts, strict=True))
            if token not in special and shown.strip()
        ],
        classes=[_majority(by_character, text, *offset) for offset in offsets],
        is_fragment=[REPLACEMENT in shown for shown in texts],
        keywords=[
            next((word for at, word in begin.items() if start <= at < stop), "")
            for start, stop in offsets
        ],
    )


def _majority(by_character: Sequence[str], text: str, start: int, stop: int) -> str:
    found = [by_character[i] for i in range(start, stop) if not text[i].isspace()]
    # The first of equally frequent ones: Counter keeps the order of appearance.
    return Counter(found).most_common(1)[0][0] if found else "other"


def _code_classes(text: str) -> list[str]:
    """Class of every character, by Python's tokenizer; what it cannot read is ``other``."""
    classes = ["other"] * len(text)
    starts = [0, *accumulate(len(line) + 1 for line in text.split("\n"))]
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            found = _class_of(token)
            (row, column), (end_row, end_column) = token.start, token.end
            if found is None or end_row > len(starts):
                continue
            for i in range(starts[row - 1] + column, starts[end_row - 1] + end_column):
                classes[i] = found
    except (tokenize.TokenError, SyntaxError):
        pass  # the continuation ends amid a bracket, or is no Python: the rest stays other
    return classes


def _class_of(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NAME:
        return "structure" if keyword.iskeyword(token.string) else "identifier"
    if token.type == tokenize.OP:
        return "operator"
    name = tokenize.tok_name[token.type]
    is_literal = token.type in (tokenize.NUMBER, tokenize.STRING) or name.startswith("FSTRING")
    return "literal" if is_literal else None


def _speech_classes(text: str, labels: Sequence[str]) -> list[str]:
    classes: list[str] = []
    # Runs of letters and digits of one script, and every other character by itself.
    for word in re.findall(r"[A-Za-z0-9]+|.", text, re.DOTALL):
        found = (
            "punctuation" if not any(char.isalnum() for char in word)
            else "number" if any(char.isdigit() for char in word)
            else "function word" if word.lower() in FUNCTION_WORDS
            else "other"
        )  # fmt: skip
        classes += [found] * len(word)
    for label in labels:
        # As a word of its own: "sad" is no part of "sadly".
        for match in re.finditer(rf"(?<![A-Za-z0-9]){re.escape(label)}(?![A-Za-z0-9])", text):
            classes[match.start() : match.end()] = ["label"] * len(label)
    return classes


# --- Alignment of continuations of unequal length


def binned(values: Float[np.ndarray, "*map token"], n_bins: int) -> Float[np.ndarray, "*map bin"]:
    """Mean of each bin of progress, ``floor(n_bins k / n)``; NaN where no token falls into it."""
    n = values.shape[-1]
    bins = np.arange(n) * n_bins // max(n, 1)
    out = np.full((*values.shape[:-1], n_bins), np.nan)
    for number in np.unique(bins):
        out[..., number] = values[..., bins == number].mean(axis=-1)
    return out


def window(
    values: Float[np.ndarray, "*map token"], start: int, stop: int
) -> Float[np.ndarray, "*map column"]:
    """Semantic tokens ``start`` to ``stop``, half-open; NaN outside the item."""
    columns = np.arange(start, stop)
    inside = (columns >= 0) & (columns < values.shape[-1])
    out = np.full((*values.shape[:-1], len(columns)), np.nan)
    out[..., inside] = values[..., columns[inside]]
    return out


def anchor_of(tokens: Tokens, anchor: Anchor) -> int | None:
    """Index of the anchor among the semantic tokens; None without one.

    The anchor is the token that a keyword begins in. Words in strings and comments do not count.
    """
    words = ANCHOR_WORDS[anchor]
    found = [k for k, index in enumerate(tokens.semantic) if tokens.keywords[index] in words]
    return None if not found else found[-1] if anchor.startswith("last") else found[0]
