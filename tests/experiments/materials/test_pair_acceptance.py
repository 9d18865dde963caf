"""Which pairs are made, and what accepts or rejects them: without a model, on known sounds."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test

from hooked_alm.experiments.materials.pair_acceptance import Accepted, accept, level_leak
from hooked_alm.experiments.materials.pair_candidates import ClipVersion, PairMaterial
from hooked_alm.experiments.materials.recordings import load_recordings
from hooked_alm.experiments.minimal_pairs.settings import MinimalPairsConfig
from hooked_alm.experiments.workbench.intervals import Draws
from minimal_pairs_toy import write_recordings

HOP = 160


def material(table: Path, **settings: Any) -> PairMaterial:
    values = {"attribute": "pitch_label", "prompt": "What is it?", "kinds": ("label",), **settings}
    config = MinimalPairsConfig(audio=str(table), **values)
    return PairMaterial(config, load_recordings(table, label_column="pitch_label"))


def measured(some: PairMaterial) -> pd.DataFrame:
    """What a model with 10 ms frames and tokens of 2 would be told; its states hold text and label.

    Every state is the number of the text and of the label, with noise of its own.
    """
    rows = []
    for number, one in enumerate(some.versions):
        samples, _ = one.samples(some.config)
        own = [some.value(one.recording, "text") == "one six", one.recording.label == "high"]
        around = np.random.default_rng(number).normal(0, 0.1, 4)
        about = {"clip": one.name, "recording": one.recording.name, "change": one.change}
        frames = len(samples) // HOP
        state = [*(2.0 * np.array(own) + around[:2]), *around[2:]]
        found = {"frames": frames, "tokens": frames // 2, "state": state, "scores": [0.0, 1.0]}
        rows.append({**about, **found, **one.sound(some.config)})
    return pd.DataFrame(rows)


def accepted(some: PairMaterial, clips: pd.DataFrame | None = None) -> Accepted:
    return accept(some, measured(some) if clips is None else clips, Draws(0, 1000))


def failures(found: Accepted) -> dict[str, int]:
    rows = found.acceptance[found.acceptance.verdict == "FAIL"]
    return rows.groupby("criterion").size().to_dict()


# --- Candidates


def test_pairs_of_recordings_share_what_they_are_to_share(tmp_path: Path) -> None:
    some = material(write_recordings(tmp_path), kinds=("label", "word"), n_pairs=100)
    pairs = some.candidates
    assert len({one.id for one in pairs}) == len(pairs) == 32
    assert len({frozenset((one.a.name, one.b.name)) for one in pairs}) == 32
    for one in pairs:
        a, b = (clip.recording.cells for clip in (one.a, one.b))
        differing = {name for name in a if a[name] != b[name]}
        assert differing == {"label": {"pitch_label"}, "word": {"text"}}[one.kind]
        expected = {"label": (a["pitch_label"], b["pitch_label"])}
        words = (a["text"].split()[1], b["text"].split()[1])
        assert one.labels == one.answers == expected.get(one.kind, words)
        assert one.group == one.a.recording.name  # eight speakers are too few to be resampled


def test_of_many_speakers_pairs_of_one_are_a_group(tmp_path: Path) -> None:
    some = material(write_recordings(tmp_path, n_speakers=10))
    assert {one.group for one in some.candidates} <= {f"s{i}" for i in range(10)}


def test_a_change_moves_what_it_is_named_after(tmp_path: Path) -> None:
    kinds = ("noise", "band", "level", "pitch", "range", "pace")
    some = material(write_recordings(tmp_path, n_speakers=1), kinds=kinds, n_pairs=4)
    found = {name: one.sound(some.config) for one in some.versions for name in (one.name,)}
    for one in some.candidates:
        a, b = found[one.a.name], found[one.b.name]
        assert a["rms_dbfs"] == pytest.approx(-26, abs=1e-3)
        moved = -6 if one.kind == "level" else 0
        assert b["rms_dbfs"] - a["rms_dbfs"] == pytest.approx(moved, abs=5e-3)
        semitones = 12 * np.log2(b["f0_median_hz"] / a["f0_median_hz"])
        assert semitones == pytest.approx(4 if one.kind == "pitch" else 0, abs=0.4)
        if one.kind == "range":
            assert b["f0_std_hz"] / a["f0_std_hz"] == pytest.approx(0.5, abs=0.1)
        if one.kind == "noise":
            assert b["snr_db"] == pytest.approx(10, abs=1e-2)
        assert len(one.a.samples(some.config)[0]) == len(one.b.samples(some.config)[0])


def test_levels_that_are_left_alone_leave_the_file_alone(tmp_path: Path) -> None:
    some = material(write_recordings(tmp_path, n_speakers=1), level_dbfs=None)
    plain = ClipVersion(some.recordings[0])
    assert plain.is_file(some.config)
    assert not ClipVersion(some.recordings[0], "range").is_file(some.config)
    assert not plain.is_file(MinimalPairsConfig())


# --- Criteria


def test_pairs_that_differ_in_the_label_alone_are_accepted(tmp_path: Path) -> None:
    found = accepted(material(write_recordings(tmp_path), n_pairs=100))
    assert failures(found) == {}
    assert found.pairs.accepted.all()
    probes = found.probes.set_index("column")
    assert probes.reads.to_dict() == {"speaker": False, "text": True, "pitch_label": True}
    # Speakers are four clips each, and none is in two groups.
    grouped = {"speaker": "text", "text": "speaker", "pitch_label": "speaker"}
    assert probes.grouped_by.to_dict() == grouped
    assert (found.pairs.own_probe < -0.5).all()
    judged = found.acceptance[found.acceptance.criterion == "F0"]
    assert (judged.verdict == "not applicable").all()  # it is what they differ in


def test_one_frame_of_difference_rejects(tmp_path: Path) -> None:
    found = accepted(material(write_recordings(tmp_path, longer=HOP), n_pairs=100))
    rows = found.acceptance[found.acceptance.criterion == "frames"]
    assert set(rows.measured.abs()) == {1.0}
    assert not found.pairs.accepted.any()
    assert failures(found)["frames"] == len(found.pairs)


def test_levels_within_the_bound_that_give_labels_away_reject_the_set(tmp_path: Path) -> None:
    table = write_recordings(tmp_path, louder_db=0.4)
    leaking = accepted(material(table, level_dbfs=None, n_pairs=100))
    assert failures(leaking) == {"level leak": 1}
    assert not leaking.pairs.accepted.any()
    # The same clips, brought to one level.
    assert accepted(material(table, n_pairs=100)).pairs.accepted.all()


def test_levels_beyond_the_bound_reject_the_pair(tmp_path: Path) -> None:
    table = write_recordings(tmp_path, louder_db=0.6)
    found = accepted(material(table, level_dbfs=None, n_pairs=100))
    assert failures(found) == {"level": 16}
    assert (
        accepted(material(table, level_dbfs=None, max_level_db=0.7))
        .acceptance.query("criterion == 'level'")
        .verdict.tolist()
        == ["pass"] * 16
    )


def test_a_leak_is_a_sign_flip_test_of_every_label() -> None:
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame(
        {"rms_dbfs_a": -26.0, "rms_dbfs_b": -26 + rng.normal(0.1, 0.2, 10), "label_a": "sad",
         "label_b": "angry", "group": [f"g{i}" for i in range(10)]}
    )  # fmt: skip
    gaps = (pairs.rms_dbfs_b - pairs.rms_dbfs_a).to_numpy()
    gaps = np.where(np.abs(gaps) < 0.01, 0, gaps)
    p = permutation_test((gaps,), np.mean, permutation_type="samples", n_resamples=10**4).pvalue
    assert level_leak(pairs, 0) == pytest.approx(min(1, 2 * p))
    assert level_leak(pairs.assign(rms_dbfs_b=-26.005), 0) == 1.0  # below 16 bits
    assert level_leak(pairs.assign(rms_dbfs_b=-25.6), 0) == pytest.approx(2 * 2 / 2**10)
    assert np.isnan(level_leak(pairs[:5], 0))


def test_a_probe_that_surely_changes_rejects_the_pair(tmp_path: Path) -> None:
    some = material(write_recordings(tmp_path), n_pairs=100)
    clips = measured(some)
    one = some.candidates[0]
    states = dict(zip(clips["clip"], clips["state"], strict=True))
    states[one.b.name] = [2.0 - states[one.b.name][0], *states[one.b.name][1:]]
    clips = clips.assign(state=[*states.values()])
    found = accepted(some, clips)
    failed = found.acceptance[found.acceptance.verdict == "FAIL"]
    assert set(failed.criterion) == {"probe: text"}
    involved = {c.id for c in some.candidates if one.b.name in (c.a.name, c.b.name)}
    assert set(failed.pair) == involved == set(found.pairs[~found.pairs.accepted].pair)


def test_what_no_probe_reads_is_not_judged(tmp_path: Path) -> None:
    some = material(write_recordings(tmp_path), n_pairs=100)
    clips = measured(some)
    states = np.random.default_rng(0).normal(size=(len(clips), 4))
    found = accepted(some, clips.assign(state=states.tolist()))
    assert not found.probes.reads.any()
    assert not found.acceptance.criterion.str.contains("probe").any()
    assert found.pairs.own_probe.isna().all()


def test_a_shift_of_all_pairs_rejects_the_set(tmp_path: Path) -> None:
    """Every clip b is a little less surely read, none of them by much."""
    some = material(write_recordings(tmp_path), kinds=("range",), n_pairs=100)
    clips = measured(some)
    is_b = clips.change == "range"
    shifted = [
        [s[0] * 0.6 + 0.4, *s[1:]] if b else s for s, b in zip(clips.state, is_b, strict=True)
    ]
    assert "probe shift: text" not in failures(accepted(some, clips))
    found = accepted(some, clips.assign(state=shifted))
    assert failures(found).get("probe shift: text") == 1
    assert not found.pairs.accepted.any()
