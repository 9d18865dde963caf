"""What else than its answer may tell a pair's clips apart; see `materials.confounds`."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..materials.clips import ClipFile, manifest, open_clip
from ..materials.confounds import Confound, confounds
from ..materials.pairs import Pair


def answering_clips(pairs: Sequence[Pair]) -> pd.DataFrame:
    """A row for every clip of a contrast and answer that it calls for, as measured.

    Prompts that share their clips are told apart by words alone, and have none.
    """
    wanted: dict[tuple[str, str, Path], None] = {}
    for pair in pairs:
        if pair.base.audio != pair.donor.audio:
            for side, answer in zip((pair.base, pair.donor), pair.answers, strict=True):
                wanted |= dict.fromkeys((pair.contrast, answer, path) for path in side.audio)
    paths = list(dict.fromkeys(path for *_, path in wanted))
    clips = [open_clip(ClipFile, path, where=str(path), cells={}) for path in paths]
    measured = manifest(clips).to_dict("records")
    by_path = dict(zip(paths, measured, strict=True))
    rows = [{"contrast": name, "answer": a, **by_path[path]} for name, a, path in wanted]
    return pd.DataFrame(rows, columns=None if rows else ["contrast", "answer"])


def clip_confounds(clips: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What goes with the answers of each contrast; see `confounds`."""
    columns = ["contrast", *Confound._fields]
    found = [
        confounds(some, "answer", seed=seed).assign(contrast=contrast)
        for contrast, some in clips.groupby("contrast", sort=False)
    ]
    return pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)
