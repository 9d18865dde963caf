"""What else than its answer may tell a pair's clips apart; see `materials.confounds`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ..materials.clips import ClipFile, manifest, open_clip
from ..materials.confounds import Confound, confounds
from ..materials.pairs import Pair


def answering_clips(pairs: Sequence[Pair]) -> list[ClipFile]:
    """The clips that tell a pair's prompts apart, each once, named by their number too.

    Raises:
        InputError: one that cannot be decoded.
    """
    paths = dict.fromkeys(path for *_, path in _wanted(pairs))
    clips = [open_clip(ClipFile, path, where=str(path), cells={}) for path in paths]
    return [replace(clip, name=f"{n:05d}-{clip.name}") for n, clip in enumerate(clips)]


def clip_table(
    pairs: Sequence[Pair], clips: Sequence[ClipFile], sounds: pd.DataFrame
) -> pd.DataFrame:
    """A row for every clip of a contrast and answer that it calls for, as measured.

    Prompts that share their clips are told apart by words alone, and have none.
    """
    measured = manifest(clips, sounds).to_dict("records")
    by_path = {clip.path: row for clip, row in zip(clips, measured, strict=True)}
    rows = [{"contrast": name, "answer": a, **by_path[p]} for name, a, p in _wanted(pairs)]
    return pd.DataFrame(rows, columns=None if rows else ["contrast", "answer"])


def _wanted(pairs: Sequence[Pair]) -> list[tuple[str, str, Path]]:
    """Contrast, answer and clip, each once."""
    wanted: dict[tuple[str, str, Path], None] = {}
    for pair in pairs:
        if pair.base.audio != pair.donor.audio:
            for side, answer in zip((pair.base, pair.donor), pair.answers, strict=True):
                wanted |= dict.fromkeys((pair.contrast, answer, path) for path in side.audio)
    return [*wanted]


def clip_confounds(clips: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What goes with the answers of each contrast; see `confounds`."""
    columns = ["contrast", *Confound._fields]
    found = [
        confounds(some, "answer", seed=seed).assign(contrast=contrast)
        for contrast, some in clips.groupby("contrast", sort=False)
    ]
    return pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)
