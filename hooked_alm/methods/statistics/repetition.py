"""Repetition in generated tokens: how much of a text is said again, and whether it goes in circles.

Source: Beyond Transcription (arXiv 2508.15882); M-BT-5, M-BT-7.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from ...errors import InputError


def repetition(tokens: Sequence[int], n: int) -> float:
    """Share of a text's n-grams that were there before; NaN if it has none.

    Raises:
        InputError: ``n`` below 1.
    """
    if n < 1:
        raise InputError(f"counting repeated n-grams: got n={n}, expected 1 or more.")
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len({*grams}) / len(grams) if grams else np.nan


def loops(tokens: Sequence[int], longest: int = 4, times: int = 4) -> bool:
    """Whether some n-gram, of ``longest`` tokens at most, stands so many times in a row."""
    for n in range(1, longest + 1):
        run = 0  # tokens in a row that are as those n before them
        for before, token in zip(tokens, tokens[n:], strict=False):
            run = run + 1 if token == before else 0
            if run >= n * (times - 1):
                return True
    return False


def compression_ratio(text: str) -> float:
    """Bytes of a text for a byte of it compressed; 0 if it is empty.

    Whisper takes transcripts with more than 2.4 for failures.

    Source: openai/whisper, ``utils.compression_ratio``.
    """
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw))
