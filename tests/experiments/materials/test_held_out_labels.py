"""Labels of clips: folds of speakers or texts, types, what leaks, and every refusal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hooked_alm.errors import InputError
from hooked_alm.experiments.materials.clips import ClipFile
from hooked_alm.experiments.materials.held_out_labels import (
    ControlLabelsConfig,
    HeldOutLabel,
    described_labels,
    held_out_labels,
)


def clips(**columns: list[str]) -> list[ClipFile]:
    """A clip for each row of some columns."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [
        ClipFile(
            name=f"c{i}", path=Path(f"c{i}.wav"), cells=cells, seconds=1.0, sampling_rate=16_000,
            channels=1, codec="WAV/PCM_16", sha256=str(i), where=f"t.csv, line {i + 2}",
        )
        for i, cells in enumerate(rows)
    ]  # fmt: skip


def one(some: list[ClipFile], **settings: Any) -> HeldOutLabel:
    (found,) = held_out_labels(some, ControlLabelsConfig(labels=("x",), **settings))
    return found


SPEAKERS, X = [*"aabbccdd"], [*"pqpqpqpq"]


def test_speakers_are_held_out_then_texts_then_clips() -> None:
    texts = [*"tuvwtuvw"]
    by_speaker = one(clips(x=X, speaker=SPEAKERS, text=texts))
    assert by_speaker.groups == SPEAKERS
    assert by_speaker.types is None  # each clip has a text and speaker of its own
    assert one(clips(x=X, text=[*"ttuuvvww"])).groups == [*"ttuuvvww"]
    assert one(clips(x=X, other=texts)).groups == [f"c{i}" for i in range(8)]
    assert one(clips(x=X, speaker=SPEAKERS, other=texts), group="other").groups == texts
    for group in "abcd":
        mine = by_speaker.folds[[s == group for s in SPEAKERS]]
        assert len({*mine}) == 1
    assert by_speaker.values == ["p", "q"]
    assert by_speaker.codes.tolist() == [0, 1] * 4


def test_types_are_what_several_clips_share() -> None:
    assert one(clips(x=X, speaker=SPEAKERS)).types == SPEAKERS
    assert one(clips(x=X, other=SPEAKERS)).types is None
    assert one(clips(x=X, other=SPEAKERS), types=("other",)).types == SPEAKERS
    with pytest.raises(InputError, match="a type of its own for each"):
        one(clips(x=X, other=[*"abcdefgh"]), types=("other",))


def test_what_is_not_held_out_and_tells_the_label_is_named() -> None:
    """A text with one label, in several folds; and speakers, where texts are held out."""
    telling, else_ = [*"tutututu"], [*"ttuuttuu"]
    assert one(clips(x=X, speaker=SPEAKERS, text=telling)).leaks == {"text": 1.0}
    assert one(clips(x=X, speaker=SPEAKERS, text=else_)).leaks == {}
    assert one(clips(x=X, speaker=[*"abababab"], text=SPEAKERS), group="text").leaks == {
        "speaker": 1.0
    }
    (about,) = described_labels([one(clips(x=X, speaker=SPEAKERS, text=telling))])
    assert about["values"] == {"p": 4, "q": 4}


def test_clips_of_a_duration_are_put_together() -> None:
    """Of each label as many, and what else is in the table stays where it is."""
    some = [
        replace(clip, seconds=seconds)
        for clip, seconds in zip(
            clips(x=X, speaker=SPEAKERS), (1.0, 1.1, 2.0, 1.2, 3.0, 3.0, 9.0, 3.1), strict=True
        )
    ]
    found = one(some, match_duration_s=0.25)
    assert found.clips == [0, 1, 4, 5]
    assert (found.codes.tolist(), found.groups) == ([0, 1, 0, 1], [*"aacc"])
    with pytest.raises(InputError, match=r"no clips of p, q whose durations are within 0.2 s"):
        one([replace(clip, seconds=float(n)) for n, clip in enumerate(some)], match_duration_s=0.2)


def test_random_folds_are_refused_where_speakers_are_known() -> None:
    with pytest.raises(InputError, match="set force=true, which takes back every claim"):
        one(clips(x=X, speaker=SPEAKERS), cv="random")
    forced = one(clips(x=X * 3, speaker=SPEAKERS * 3), cv="random", force=True)
    assert max(len({*forced.folds[[s == g for s in SPEAKERS * 3]]}) for g in "abcd") > 1
    assert forced.leaks["speaker"] > 0.9
    free = one(clips(x=X * 3, other=SPEAKERS * 3), cv="random")
    assert np.bincount(free.folds).tolist() == [5, 5, 5, 5, 4]


def test_a_speaker_may_have_one_label_but_a_label_needs_two_speakers() -> None:
    found = one(clips(x=[*"ppqqppqq"], speaker=SPEAKERS))
    assert np.bincount(found.folds).tolist() == [2] * 4
    with pytest.raises(InputError, match="q of one speaker alone, expected each label of two"):
        one(clips(x=[*"ppqqpppp"], speaker=SPEAKERS))
    with pytest.raises(InputError, match=r"x: got \['p'\] alone, expected two labels or more"):
        one(clips(x=["p"] * 8, speaker=SPEAKERS))


def test_other_bad_tables() -> None:
    with pytest.raises(InputError, match="no column y, z, but speaker, x"):
        held_out_labels(
            clips(x=X, speaker=SPEAKERS), ControlLabelsConfig(labels=("x", "z"), types=("y",))
        )
    with pytest.raises(InputError, match=r"t.csv, line 4: speaker: missing"):
        one(clips(x=X, speaker=[*"aa", "", *"bccdd"]))
    left = one(clips(x=["", *X[1:]], speaker=SPEAKERS))
    assert left.clips == [*range(1, 8)]
    with pytest.raises(ValueError, match="labels must be named once each"):
        ControlLabelsConfig(labels=("x", "x"))
