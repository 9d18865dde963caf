"""What OB1 measures beside its curves: flips, logit shift, attention ratio.

T is the emotion that the instruction names, A the voice's.

Source: seed document 000; methods cards M-000-8, M-000-10, M-000-13.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.bootstrap import wilson

RatioForm = Literal["fraction", "ratio", "density"]
_COLUMNS = ["voice", "named", "audio_only", "conflict"]


def flip_summary(table: pd.DataFrame) -> pd.DataFrame:
    """How often the final prediction follows text or voice, and how often the text flipped it.

    Args:
        table: one row per conflict item, with labels in the columns ``voice`` (A), ``named`` (T),
            ``audio_only`` and ``conflict`` (the predictions under those prompts).

    Returns:
        Columns ``measure``, ``among``, ``k``, ``n``, ``rate``, ``low``, ``high`` (Wilson 95 %).
        ``flip`` is conflict ≠ audio_only. Among ``audio_only_correct``, the primary set, are the
        items whose voice the model recognises when nothing contradicts it.

    Raises:
        InputError: a missing column or label, or an item that names the voice's own emotion.
    """
    _check_items(table)
    correct = table.audio_only == table.voice
    events = {
        "text_follow": table.conflict == table.named,
        "audio_follow": table.conflict == table.voice,
        "other": (table.conflict != table.named) & (table.conflict != table.voice),
        "flip": table.conflict != table.audio_only,
    }
    rows = [_rate("audio_only_correct", "all", correct)]
    for measure, event in events.items():
        rows.append(_rate(measure, "all", event))
        rows.append(_rate(measure, "audio_only_correct", event[correct]))
    return pd.DataFrame(rows)


def flip_matrix(table: pd.DataFrame, labels: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Flip rate by voice (rows) and named emotion (columns), NaN for no items; and their counts.

    Args:
        table: as for ``flip_summary``.
        labels: rows and columns, in order.
    """
    _check_items(table)
    flips = table.assign(flip=table.conflict != table.audio_only)
    cells = flips.groupby(["voice", "named"]).flip
    counts = cells.sum().unstack(), cells.size().unstack()
    flipped, n = (part.reindex(index=labels, columns=labels).fillna(0) for part in counts)
    return flipped / n.where(n > 0), n.astype(int)


def modality_attention_ratio(
    mass_audio: Float[np.ndarray, " *cell"],
    mass_text: Float[np.ndarray, " *cell"],
    n_audio: int,
    n_text: int,
    form: RatioForm = "fraction",
) -> Float[np.ndarray, " *cell"]:
    """Attention to the audio against attention to the text (M-000-13); NaN for a zero denominator.

    ``fraction``: a/(a+t). ``ratio``: a/t. ``density``: (a/n_audio)/(t/n_text), which does not grow
    with the length of the clip.

    Raises:
        InputError: a negative mass, or a span without tokens.
    """
    if min(n_audio, n_text) < 1 or min(mass_audio.min(), mass_text.min()) < 0:
        raise InputError(
            f"modality attention ratio: got {n_audio} audio and {n_text} text tokens, masses from "
            f"{min(mass_audio.min(), mass_text.min())}; expected at least one token each and no "
            "negative mass. Check the spans."
        )
    above = mass_audio / n_audio if form == "density" else mass_audio
    below = {"fraction": mass_audio + mass_text, "ratio": mass_text, "density": mass_text / n_text}[
        form
    ]
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _check_items(table: pd.DataFrame) -> None:
    missing = [column for column in _COLUMNS if column not in table.columns]
    if missing:
        raise InputError(
            f"counting flips: got a table without {missing}, expected the columns {_COLUMNS}. "
            "Add the predictions of both prompts to the conflict items."
        )
    bad = table[table[_COLUMNS].isna().any(axis=1) | (table.voice == table.named)]
    if len(bad):
        raise InputError(
            f"counting flips: got {len(bad)} rows with a missing label or with voice = named, the "
            f"first {bad.iloc[0][_COLUMNS].to_dict()!r}; expected conflict items with both "
            "predictions. Leave out the others."
        )


def _rate(measure: str, among: str, event: pd.Series) -> dict[str, object]:
    k, n = int(event.sum()), len(event)
    rate = wilson(k, n)
    low, high = float(rate.low), float(rate.high)
    return {"measure": measure, "among": among, "k": k, "n": n} | {
        "rate": float(rate.mean),
        "low": low,
        "high": high,
    }
