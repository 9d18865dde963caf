"""Clips whose words and voice disagree, and pairs of them that differ in one of the two.

A manifest is a CSV file with the columns ``path`` (relative to it), ``semantic_label`` (emotion of
the words), ``prosody_label`` (emotion of the voice), ``speaker`` and ``text``; others are kept, and
``sha256`` is checked. All its faults are reported at once, by line and column.

Source: seed 001; M-001-4.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heapify, heappop, heapreplace
from itertools import combinations, islice
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from hooked_alm.errors import InputError
from hooked_alm.storage import expanded

from ..materials.clips import MANIFEST, ClipFile, ClipLine, open_clip, read_clips, table_of
from ..materials.records import GroupName, Words, raise_all
from ..materials.sources import shown
from ..workbench.files import is_folder

SpokenEmotion = Literal["neutral", "happy", "sad", "angry", "surprised"]
Asked = Literal["overall", "words", "voice"]
PairType = Literal["semantic", "prosody"]

EMOTIONS: tuple[SpokenEmotion, ...] = get_args(SpokenEmotion)
QUESTIONS: dict[Asked, str] = {
    "overall": "What emotion does the speaker convey? Answer with one word.",
    "words": "What emotion do the words express? Answer with one word.",
    "voice": "What emotion does the tone of voice express? Answer with one word.",
}
"""What the bundled twins were trained on; ``overall`` is the one that they answer differently."""
PAIR_TYPES: tuple[PairType, ...] = get_args(PairType)


class SpokenLine(ClipLine):
    """A line of the manifest."""

    semantic_label: GroupName
    prosody_label: GroupName
    speaker: GroupName
    text: Words


@dataclass(frozen=True, kw_only=True, slots=True)
class SpokenItem(ClipFile):
    """One clip, whose words and voice each carry a label."""

    @property
    def semantic(self) -> str:
        """Label of the words."""
        return self.cells["semantic_label"]

    @property
    def prosody(self) -> str:
        """Label of the voice."""
        return self.cells["prosody_label"]

    @property
    def speaker(self) -> str:
        """Who speaks."""
        return self.cells["speaker"]

    @property
    def text(self) -> str:
        """What is said."""
        return self.cells["text"]

    @property
    def is_conflict(self) -> bool:
        """Whether words and voice disagree."""
        return self.semantic != self.prosody

    def label(self, which: PairType) -> str:
        """Label of the words or of the voice."""
        return self.semantic if which == "semantic" else self.prosody


@dataclass(frozen=True, kw_only=True, slots=True)
class SpokenPair:
    """A base A, whose audio is replaced by that of B."""

    type: PairType
    """What differs: ``semantic``, the words (same voice, same speaker); ``prosody``, the voice
    (same words, same speaker)."""
    a: SpokenItem
    b: SpokenItem

    @property
    def id(self) -> str:
        """Names it in results."""
        return f"{self.type}__{self.a.name}__{self.b.name}"

    @property
    def target(self) -> str:
        """B's label of what differs."""
        return self.b.label(self.type)


def read_items(source: str | Path, labels: Sequence[str]) -> list[SpokenItem]:
    """The clips of a manifest, in its order.

    Args:
        source: the table, or a folder with ``manifest.csv``.
        labels: the labels that there are.

    Raises:
        InputError: all that is wrong with it, by line and column.
    """
    if (table := table_of(source)) is None:
        table = path / MANIFEST if is_folder(path := expanded(source)) else path
    items = read_clips("clips", table, SpokenLine, partial(_of_line, labels=labels))
    raise_all(f"reading clips from {shown(table)}", list(_contradictions(items)))
    return items


def _of_line(line: SpokenLine, labels: Sequence[str]) -> SpokenItem:
    named = {name: getattr(line, name) for name in ("semantic_label", "prosody_label")}
    if wrong := [f"{name}: got {one!r}" for name, one in named.items() if one not in labels]:
        raise InputError(
            f"{'; '.join(wrong)}, expected one of {', '.join(labels)}. Correct it, or set labels"
        )
    return open_clip(
        SpokenItem, line.path, line.where, line.cells, column="path", sha256=line.sha256
    )


def _contradictions(items: Sequence[SpokenItem]) -> Iterator[str]:
    """Words that have two meanings."""
    first: dict[str, SpokenItem] = {}
    for item in items:
        other = first.setdefault(item.text, item)
        if other.semantic != item.semantic:
            yield (
                f"{item.where}: semantic_label: got {item.semantic!r} for the words that "
                f"{other.where} calls {other.semantic!r}"
            )


def conflict_items(items: Sequence[SpokenItem]) -> list[SpokenItem]:
    """The clips whose words and voice disagree.

    Raises:
        InputError: there are none.
    """
    found = [item for item in items if item.is_conflict]
    if not found:
        raise InputError(
            f"choosing conflict items: got {len(items)} clips, in all of which semantic_label is "
            "prosody_label; expected some that disagree. Add clips to the manifest."
        )
    return found


def draw_pairs(
    items: Sequence[SpokenItem],
    which: PairType,
    n: int | None,
    seed: int,
    *,
    tokens: Mapping[str, int],
) -> list[SpokenPair]:
    """Pairs of conflict items in both directions, (A, B) and (B, A).

    The two differ in what ``which`` says and share the rest, and the speaker. Pairs of equal length
    come first: their spans need no resampling. Among them an item is used again only once no pair
    of less used items is left; what that leaves open is decided by a random order of the items.
    The work grows with the items and with the pairs that are drawn, not with those there could be.

    Args:
        items: conflict items.
        which: what differs.
        n: how many, before they are reversed; None is all.
        seed: of the draw.
        tokens: number of audio tokens by item name.
    """
    rest = attrgetter("speaker", "prosody" if which == "semantic" else "text")
    ranks = np.random.default_rng([seed, PAIR_TYPES.index(which)]).permutation(len(items))
    alike: dict[tuple[str, str], list[_Candidate]] = {}
    for place, (item, rank) in enumerate(zip(items, ranks.tolist(), strict=True)):
        one = _Candidate(place, item.label(which), tokens[item.name], rank)
        alike.setdefault(rest(item), []).append(one)
    by_length: dict[tuple[object, int], list[_Candidate]] = {}
    for key, group in alike.items():
        for one in group:
            by_length.setdefault((key, one.length), []).append(one)

    chosen: set[tuple[int, int]] = set()
    if n is None:
        for group in alike.values():
            chosen.update(_ends(a, b) for a, b in combinations(group, 2) if a.label != b.label)
    else:
        for groups in (by_length.values(), alike.values()):
            _draw_least_used(list(groups), n - len(chosen), chosen)
    return [
        SpokenPair(type=which, a=items[a], b=items[b])
        for pair in sorted(chosen)
        for a, b in (pair, pair[::-1])
    ]


@dataclass(eq=False, slots=True)
class _Candidate:
    """An item that may be drawn."""

    place: int
    label: str
    length: int
    rank: int
    n_used: int = 0

    def __lt__(self, other: "_Candidate") -> bool:
        return (self.n_used, self.rank) < (other.n_used, other.rank)


_Ends = tuple[int, int]


def _ends(a: _Candidate, b: _Candidate) -> _Ends:
    return min(a.place, b.place), max(a.place, b.place)


def _draw_least_used(groups: list[list[_Candidate]], n: int, chosen: set[_Ends]) -> None:
    """Add up to ``n`` pairs within groups, which share no item: those of the least used first."""
    for group in groups:
        group.sort()
    heap = [(*best, index) for index, group in enumerate(groups) if (best := _best(group, chosen))]
    heapify(heap)
    for _ in range(n):
        if not heap:
            return
        _, pair, index = heap[0]
        chosen.add(pair)
        for one in groups[index]:
            one.n_used += one.place in pair
        groups[index].sort()
        if best := _best(groups[index], chosen):
            heapreplace(heap, (*best, index))
        else:
            heappop(heap)


def _best(group: list[_Candidate], chosen: set[_Ends]) -> tuple[tuple[int, ...], _Ends] | None:
    """The pair of a sorted group whose items are used least, and its cost."""
    found: tuple[tuple[int, ...], _Ends] | None = None
    for place, later in enumerate(group):
        if found and (later.n_used > found[0][0] or found[0][1] == group[0].n_used):
            break  # no pair further on costs less
        for earlier in islice(group, place):
            if earlier.label != later.label and (pair := _ends(earlier, later)) not in chosen:
                cost = (later.n_used, earlier.n_used, later.rank, earlier.rank)
                found = min(found or (cost, pair), (cost, pair))
                break  # those behind it are used more, or come later
    return found


def like_in_labels(
    items: Sequence[SpokenItem], item: SpokenItem, seed: int, *, tokens: dict[str, int]
) -> SpokenItem | None:
    """Another clip with the same two labels, of equal length if there is one; None without any.

    Args:
        items: conflict items.
        item: what it is like.
        seed: of the choice.
        tokens: number of audio tokens by item name.
    """
    labels = attrgetter("semantic", "prosody")
    alike = [other for other in items if other is not item and labels(other) == labels(item)]
    as_long = [other for other in alike if tokens[other.name] == tokens[item.name]]
    found = as_long or alike
    digest = hashlib.sha256(f"{seed}/{item.name}".encode()).digest()
    return found[int.from_bytes(digest[:8], "big") % len(found)] if found else None
