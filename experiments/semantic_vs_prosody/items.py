"""Clips whose words and voice disagree, and pairs of them that differ in one of the two.

A manifest is a CSV file with the columns ``path`` (relative to it), ``semantic_label`` (emotion of
the words), ``prosody_label`` (emotion of the voice), ``speaker`` and ``text``; others are kept, and
``sha256`` is checked. All its faults are reported at once, by line and column.

Source: seed 001; M-001-4.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from operator import attrgetter
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd

from hooked_alm.audio import decode_file
from hooked_alm.errors import InputError

from ..materials.acoustics import describe_file
from ..materials.clip_table import MEASURED, check_cells, collect, raise_all, read_lines

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

MANIFEST = "manifest.csv"
NEEDED = ("path", "semantic_label", "prosody_label", "speaker", "text")
LONGEST_NAME = 100
"""Bytes. Two names and a few words are the name of a file, of which most systems take 255."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpokenItem:
    """One clip."""

    path: Path
    semantic: str
    """Emotion of the words."""
    prosody: str
    """Emotion of the voice."""
    speaker: str
    text: str
    sha256: str
    seconds: float
    where: str
    """Its table and line; leads the errors about it."""
    notes: tuple[str, ...] = ()
    """What was odd about reading it."""
    other: dict[str, str] = field(default_factory=dict)
    """Further columns of the manifest."""

    @property
    def name(self) -> str:
        """File name without its suffix, as files of a run can be named; no two items share it."""
        return re.sub(r"[^\w+=@,.-]+", "-", self.path.stem)

    @property
    def is_conflict(self) -> bool:
        """Whether words and voice disagree."""
        return self.semantic != self.prosody

    def label(self, which: PairType) -> str:
        """Emotion of the words or of the voice."""
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
        source: the CSV file, or a folder with ``manifest.csv``.
        labels: the emotions that there are.

    Raises:
        InputError: all that is wrong with it, by line and column.
    """
    source = Path(source)
    table = source / MANIFEST if source.is_dir() else source
    columns, lines = read_lines(table, NEEDED)
    allowed = {"semantic_label": labels, "prosody_label": labels}

    def item(line: tuple[str, dict[str, str]]) -> SpokenItem:
        where, cells = line
        check_cells(cells, "path", len(columns), allowed)
        cells = {column: cell.strip() for column, cell in cells.items()}
        if empty := [column for column in ("speaker", "text") if not cells[column]]:
            raise InputError(
                f"column {empty[0]}: got nothing, expected a value: pairs keep the speaker, and "
                "either the words or the voice, the same"
            )
        return _open(table.parent / cells["path"], cells, where)

    items = collect(f"reading {table}", item, lines, lambda line: line[0])
    raise_all(f"reading {table}", list(_repeats(items)))
    return items


def _open(path: Path, cells: dict[str, str], where: str) -> SpokenItem:
    if (n := len(path.stem.encode())) > LONGEST_NAME:
        raise InputError(
            f"column path: got a file name of {n} bytes without its suffix, expected at most "
            f"{LONGEST_NAME}: results are named by it. Rename the file"
        )
    try:
        channels, rate, notes = decode_file(path)
    except InputError as error:
        raise InputError(f"column path: {error}") from error
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if cells.get("sha256") and cells["sha256"].lower() != sha256:
        raise InputError(
            f"column sha256: got {cells['sha256']}, expected {sha256} for {path.name}. The file "
            "was changed since; put the original back, or empty the cell"
        )
    return SpokenItem(
        path=path,
        semantic=cells["semantic_label"],
        prosody=cells["prosody_label"],
        speaker=cells["speaker"],
        text=cells["text"],
        sha256=sha256,
        seconds=channels.shape[1] / rate,
        where=where,
        notes=tuple(notes),
        other={name: cell for name, cell in cells.items() if name not in (*NEEDED, *MEASURED)},
    )


def _repeats(items: Sequence[SpokenItem]) -> Iterator[str]:
    """Names a result could not tell apart, recordings given twice, and words with two meanings."""
    first: dict[tuple[str, str], SpokenItem] = {}
    for item in items:
        for what, key, cure in (
            ("file stem", item.name.casefold(), "results are named by it; rename one file"),
            ("recording", item.sha256, "leave one out"),
        ):
            earlier = first.setdefault((what, key), item)
            if earlier is not item:
                yield f"{item.where}: column path: the same {what} as {earlier.where}: {cure}"
        other = first.setdefault(("text", item.text), item)
        if other.semantic != item.semantic:
            yield (
                f"{item.where}: column semantic_label: got {item.semantic!r} for the words that "
                f"{other.where} calls {other.semantic!r}"
            )


def manifest(items: Sequence[SpokenItem]) -> pd.DataFrame:
    """Who says what how in which file, with length, level and pitch, which may give it away."""
    return pd.DataFrame(
        {
            "path": item.path.name,
            "semantic_label": item.semantic,
            "prosody_label": item.prosody,
            "speaker": item.speaker,
            "text": item.text,
            **describe_file(item.path),
            "sha256": item.sha256,
            "notes": "; ".join(item.notes),
        }
        for item in items
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


def candidates(items: Sequence[SpokenItem], which: PairType) -> list[tuple[SpokenItem, SpokenItem]]:
    """Unordered pairs that differ in this and share the rest."""
    rest = attrgetter("speaker", "prosody" if which == "semantic" else "text")
    pairs = combinations(items, 2)
    return [(a, b) for a, b in pairs if rest(a) == rest(b) and a.label(which) != b.label(which)]


def draw_pairs(
    items: Sequence[SpokenItem],
    which: PairType,
    n: int | None,
    seed: int,
    *,
    tokens: dict[str, int],
) -> list[SpokenPair]:
    """Pairs of conflict items in both directions, (A, B) and (B, A).

    Pairs of equal length come first: their spans need no resampling. Among them the draw is random,
    but an item is used again only once no pair of less used items is left.

    Args:
        items: conflict items.
        which: what differs.
        n: how many, before they are reversed; None is all.
        seed: of the draw.
        tokens: number of audio tokens by item name.
    """
    found = candidates(items, which)
    n = len(found) if n is None else min(n, len(found))
    order = np.random.default_rng([seed, PAIR_TYPES.index(which)]).permutation(len(found))
    left, used = {index: found[index] for index in order.tolist()}, Counter[str]()

    def cost(index: int) -> tuple[bool, int, int]:
        a, b = (item.name for item in left[index])
        return tokens[a] != tokens[b], max(used[a], used[b]), min(used[a], used[b])

    chosen: list[int] = list(left) if n == len(found) else []
    while len(chosen) < n:
        best = min(left, key=cost)  # the first of them in the order drawn
        used.update(item.name for item in left.pop(best))
        chosen.append(best)
    return [
        SpokenPair(type=which, a=a, b=b)
        for index in sorted(chosen)
        for a, b in (found[index], found[index][::-1])
    ]


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
