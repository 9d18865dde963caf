"""The items: a clip, the word that is said in it, and the one that its context calls for.

A table of clips has, beside ``path`` and ``text``, the columns ``acoustic_word``, which is said,
``contextual_word``, which is not, and ``donor``: another path of the table, where the same is said
with the contextual word. ``donor`` may be empty; clips without an acoustic word are donors alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hooked_alm.errors import InputError

from ..materials.clips import ClipFile
from ..materials.records import collect, raise_all
from ..materials.sources import shown
from ..materials.transcription import Transcription

WORDS = ("acoustic_word", "contextual_word")
DONOR = "donor"


@dataclass(frozen=True)
class ContextItem:
    """A clip, with what tells its two words apart."""

    clip: ClipFile
    donor: ClipFile | None
    """A minimal pair: the same sentence with the contextual word."""
    begun: tuple[int, ...]
    """Tokens of the transcript up to where the two words differ."""
    acoustic: int
    """The token there if the word is written that is said."""
    contextual: int
    strangers: tuple[int, ...] = ()
    """Such a pair of another item, a null of these two; none where all items ask about these."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The pairs of tokens that are told apart."""
        return (self.acoustic, self.contextual, *self.strangers)


def context_items(ours: Transcription) -> list[ContextItem]:
    """The items of a table, in its order.

    Args:
        ours: clips that a model has heard.

    Raises:
        InputError: all that is wrong with them.
    """
    doing = f"reading {shown(ours.config.audio)}"
    asked = [one for one in ours.clips if one.cells.get(WORDS[0])]
    if not asked:
        raise InputError(
            f"{doing}: got no clip with an {WORDS[0]}, expected the columns path, text, "
            f"{', '.join(WORDS)} and {DONOR} (which may be empty)."
        )
    found = collect(doing, lambda one: _item(ours, one), asked, lambda one: one.where)
    rng = np.random.default_rng(ours.config.seed)
    return [_beside(one, found, rng) for one in found]


def _beside(
    item: ContextItem, every: Sequence[ContextItem], rng: np.random.Generator
) -> ContextItem:
    """An item with the words of another, which is drawn."""
    others = [one.tokens for one in every if {*one.tokens} != {*item.tokens}]
    return replace(item, strangers=others[rng.integers(len(others))]) if others else item


def _item(ours: Transcription, clip: ClipFile) -> ContextItem:
    said, other = (clip.cells.get(column, "") for column in WORDS)
    text = ours.said_in(clip) or ""
    n = len(found := re.findall(rf"(?<!\w){re.escape(said)}(?!\w)", text))
    faults = []
    if not other or other == said:
        faults.append(f"{WORDS[1]}: got {other!r}, expected another word than {said!r}")
    if n != 1:
        faults.append(f"{WORDS[0]}: {said!r} is {n} times in the text {text!r}, expected once")
    raise_all("telling its words apart", faults)
    swapped = re.sub(rf"(?<!\w){re.escape(found[0])}(?!\w)", lambda _: other, text)
    ids, others = ours.ids(text), ours.ids(swapped)
    same = [a == b for a, b in zip(ids, others, strict=False)]
    if all(same):
        raise InputError(
            f"telling its words apart: {text!r} and {swapped!r} are the same tokens as far as both "
            "go on. Choose words that the tokenizer tells apart"
        )
    at = same.index(False)
    return ContextItem(clip, _donor(ours.clips, clip), (*ids[:at],), ids[at], others[at])


def _donor(clips: Sequence[ClipFile], clip: ClipFile) -> ClipFile | None:
    if not (given := clip.cells.get(DONOR, "")):
        return None
    found = [one for one in clips if f"/{one.path.as_posix()}".endswith(f"/{given}")]
    if len(found) != 1 or found[0] is clip:
        raise InputError(
            f"{DONOR}: got {given!r}, expected the path of one other clip of the table, or nothing"
        )
    return found[0]
