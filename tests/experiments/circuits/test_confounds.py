"""What else tells a pair's clips apart, and the claims that it takes back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from hooked_alm.experiments.circuits.claims import _effect
from hooked_alm.experiments.circuits.confounds import (
    answering_clips,
    clip_confounds,
    clip_table,
)
from hooked_alm.experiments.circuits.settings import CircuitsConfig
from hooked_alm.experiments.circuits.tables import CircuitResults
from hooked_alm.experiments.materials.clips import MEASURED, sound_units
from hooked_alm.experiments.materials.pairs import Pair, Side

ANSWERS = ("sad", "angry")


def pairs(folder: Path, *levels: float) -> list[Pair]:
    """Eight pairs in which the voice differs, and one in which the words do; a level per answer."""
    rng = np.random.default_rng(0)

    def side(turn: int, number: int) -> Side:
        path = folder / f"{ANSWERS[turn]}{number}.wav"
        soundfile.write(path, levels[turn] * rng.uniform(-1, 1, 4000), 16_000)
        return Side(audio=(path,), text="Which?")

    sides = [(side(0, i), side(1, i), "voice") for i in range(8)]
    base = sides[0][0]
    sides.append((base, base.model_copy(update={"text": "And now?"}), "words"))
    return [
        Pair(id=f"{i}", base=one, donor=two, answers=ANSWERS, group=f"g{i}", contrast=contrast)
        for i, (one, two, contrast) in enumerate(sides)
    ]


def effect(found: pd.DataFrame, contrast: str) -> str:
    numbers = {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 30, "n_groups": 30}
    effects = pd.DataFrame([{"contrast": contrast, **numbers, "answers_as_given": 1.0}])
    tables = {"effects": effects, "confounds": found}
    return _effect(CircuitResults(CircuitsConfig(pairs="my.jsonl"), {}, tables), contrast).statement


def measured(some: Sequence[Pair]) -> pd.DataFrame:
    clips = answering_clips(some)
    rows = [row for unit in sound_units(clips) for row in unit.payload.measured().tables["sounds"]]
    return clip_table(some, clips, pd.DataFrame(rows, columns=["clip", *MEASURED]))


def test_a_level_that_goes_with_the_answer_takes_claims_back(tmp_path: Path) -> None:
    clips = measured(pairs(tmp_path, 0.02, 0.5))
    assert clips.groupby(["contrast", "answer"]).size().to_dict() == {
        ("voice", "angry"): 8,
        ("voice", "sad"): 8,
    }
    found = clip_confounds(clips, seed=0)
    assert found[["contrast", "feature"]].to_numpy().tolist() == [["voice", "rms_dbfs"]]
    assert effect(found, "voice").startswith("Not established (rms_dbfs goes with the labels too)")
    assert effect(found, "words").startswith("Exchanging the words moves the answer.")


def test_clips_alike_in_all_that_is_measured_take_nothing_back(tmp_path: Path) -> None:
    found = clip_confounds(measured(pairs(tmp_path, 0.1, 0.1)), seed=0)
    assert found.empty
    assert effect(found, "voice").startswith("Exchanging the voice moves the answer.")


def test_prompts_that_share_their_clips_have_none(tmp_path: Path) -> None:
    clips = measured(pairs(tmp_path, 0.02, 0.5)[-1:])
    assert clips.empty
    assert {*clip_confounds(clips, seed=0)} == {"contrast", "feature", "p", "found"}


def test_a_clip_counts_once_for_an_answer(tmp_path: Path) -> None:
    one = pairs(tmp_path, 0.02, 0.5)[0]
    assert len(measured([one, one.model_copy(update={"id": "again"})])) == 2
