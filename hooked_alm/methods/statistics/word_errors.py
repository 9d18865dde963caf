"""Errors of transcripts: words or characters that were substituted, left out or put in.

Counts add up, rates do not: a corpus has the errors of all its clips over the words of all its
references. A clip in which nothing is said has no rate, and what is heard in it are insertions.
Aligned by jiwer.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import jiwer
import numpy as np

from ...errors import InputError

CountedUnit = Literal["word", "character"]
Normaliser = Callable[[str], str]


class WordErrors(NamedTuple):
    """Errors against references of ``n`` words, or characters."""

    n: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        """All of them."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors for a word of the references; NaN if they have none."""
        return self.errors / self.n if self.n else np.nan


def word_errors(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    unit: CountedUnit = "word",
    normalise: Normaliser | None = None,
) -> list[WordErrors]:
    """Errors of every hypothesis against its reference.

    Args:
        references: what was said; may be empty.
        hypotheses: what was heard.
        unit: what is counted; characters suit a language that writes no spaces.
        normalise: applied to both sides, or to neither.

    Raises:
        InputError: there are not as many hypotheses as references.
    """
    if len(references) != len(hypotheses):
        raise InputError(
            f"counting word errors: got {len(hypotheses)} hypotheses for {len(references)} "
            f"references, expected one each."
        )
    clean = normalise or str
    return [
        _errors(clean(said), clean(heard), unit)
        for said, heard in zip(references, hypotheses, strict=True)
    ]


def _errors(said: str, heard: str, unit: CountedUnit) -> WordErrors:
    # As jiwer counts characters, blanks around words included, but with an empty reference.
    parts = (lambda text: text.split()) if unit == "word" else (lambda text: [*text.strip()])
    reference, hypothesis = parts(said), parts(heard)
    if not reference:
        return WordErrors(0, 0, 0, len(hypothesis))
    count = jiwer.process_words if unit == "word" else jiwer.process_characters
    found = count(said, heard)
    return WordErrors(len(reference), found.substitutions, found.deletions, found.insertions)


def distance(one: str, other: str, *, normalise: Normaliser | None = None) -> float:
    """Edits of characters between two texts, as a share of the longer one's; 0 if both are empty.

    Args:
        one: a text.
        other: another.
        normalise: applied to both sides, or to neither.
    """
    found = word_errors([one], [other], unit="character", normalise=normalise)[0]
    longer = max(found.n, found.n - found.deletions + found.insertions)
    return found.errors / longer if longer else 0.0


def corpus_errors(errors: Iterable[WordErrors]) -> WordErrors:
    """The errors of a corpus: sums over its clips."""
    found = np.array([(0, 0, 0, 0), *errors]).sum(axis=0)
    return WordErrors(*found.tolist())
