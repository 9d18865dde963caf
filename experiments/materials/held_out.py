"""Which groups of items are looked at first, and which are held out to confirm what was seen."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from hooked_alm.errors import InputError

from .resampling import SPEAKER
from .row_source import KnownClip

Half = Literal["discovery", "held-out"]


def split_groups(groups: Sequence[str], share: float, seed: int) -> dict[str, Half]:
    """Each group's part: a seeded draw, at least one group on either side.

    It does not depend on the order of ``groups``.
    """
    names = sorted(set(groups))
    n = min(max(round(share * len(names)), 1), max(len(names) - 1, 1))
    drawn = np.random.default_rng(seed).permutation(len(names))[:n]
    chosen = {names[i] for i in drawn}
    return {name: "discovery" if name in chosen else "held-out" for name in names}


def split_clips(
    clips: Iterable[str], groups: Sequence[str], share: float, seed: int
) -> dict[str, Half]:
    """Each clip's part, which is that of its group; see `split_groups`."""
    parts = split_groups(groups, share, seed)
    return {clip: parts[group] for clip, group in zip(clips, groups, strict=True)}


def halved(
    clips: Sequence[KnownClip], column: str | None, share: float, seed: int, into: str
) -> list[tuple[str, Half]]:
    """Each clip's group, and the part that this is of; see `groups_of` and `split_groups`.

    Raises:
        InputError: clips without a group, or one group alone; ``into`` says what the parts are.
    """
    groups = groups_of(clips, column)
    halves = split_groups(groups, share, seed)
    if len(halves) < 2:
        raise InputError(
            f"splitting {len(clips)} clips into {into}: got one group ({groups[0]}), expected two "
            "or more. Name another column as group."
        )
    return [(group, halves[group]) for group in groups]


def groups_of(clips: Sequence[KnownClip], column: str | None) -> list[str]:
    """What each clip is held out with: its value of a column; of None its speaker, or itself.

    Raises:
        InputError: a column that was named, or that some clips have, and that others lack.
    """
    named = column or SPEAKER
    missing = [clip.where for clip in clips if not clip.cells.get(named)]
    if column is None and len(missing) == len(clips):
        return [clip.name for clip in clips]
    if missing:
        raise InputError(
            f"{missing[0]}: {named}: missing, in {len(missing)} of {len(clips)} clips, expected "
            "what is held out together. Fill it in, or name another column as group."
        )
    return [clip.cells[named] for clip in clips]
