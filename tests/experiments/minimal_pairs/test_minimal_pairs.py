"""``minimal_pairs`` as a run: its files, its sweeps against plain Hugging Face, and the truth."""

import itertools
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.experiments.circuits.experiment import Circuits
from hooked_alm.experiments.circuits.settings import CircuitsConfig
from hooked_alm.experiments.materials.pair_acceptance import Accepted, accept, read_by_probes
from hooked_alm.experiments.materials.pairs import read_pairs
from hooked_alm.experiments.materials.recordings import load_recordings
from hooked_alm.experiments.minimal_pairs import experiment
from hooked_alm.experiments.minimal_pairs.claims import CLAIMS
from hooked_alm.experiments.minimal_pairs.experiment import MinimalPairs
from hooked_alm.experiments.minimal_pairs.settings import MinimalPairsConfig
from hooked_alm.experiments.minimal_pairs.tables import effects
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.intervals import Draws
from hooked_alm.experiments.workbench.run_folder import RunFolder
from minimal_pairs_toy import tables_of, toy, write_recordings
from minimal_pairs_verdicts import cases, concluded
from stopped_runs import interrupted, results
from tiny import TinyModels
from tolerances import BATCHED_ROWS

SMALL: dict[str, Any] = {
    "kinds": ["label", "range"], "n_pairs": 2, "batch_size": 2,
    "min_effect": 1e5,  # a figure shows fewer places then, and drawing takes longer than the runs
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings"), n_speakers=3)


@pytest.fixture(scope="module")
def finished(
    tiny_models: TinyModels, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    out, n_asked = tmp_path_factory.mktemp("run") / "run", itertools.count()

    def counted(*args: Any) -> Accepted:
        next(n_asked)
        return accept(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(experiment, "accept", counted)
        run = runner.run(toy(tiny_models.folder(), table, **SMALL), out)
    assert next(n_asked) == 1  # of thousands of clips, probes take minutes
    return run


# --- The run, and its files


def test_what_is_accepted_is_written(finished: RunFolder, table: Path) -> None:
    pairs = finished.read_table("pairs")
    accepted = pairs[pairs.accepted]
    assert {*accepted.attribute} == {"pitch_label", "range"}
    found = read_pairs(finished.path / "pairs" / "pairs.jsonl")
    assert [one.id for one in found] == accepted.pair.tolist()
    assert [one.contrast for one in found] == accepted.attribute.tolist()
    for one, row in zip(found, accepted.to_dict("records"), strict=True):
        sides = [side.audio[0].stem for side in (one.base, one.donor)]
        assert sides == [row["clip_a"], row["clip_b"]]
        assert one.base.parts == one.donor.parts == (("text", "What is it?"),)
    clips = load_recordings(finished.path / "pairs", label_column="pitch_label")
    assert {one.name for one in clips} == {*accepted.clip_a, *accepted.clip_b}
    original = {one.name: one for one in load_recordings(table, label_column="pitch_label")}
    for one in clips:
        name, _, change = one.name.partition("__")
        assert one.label == original[name].label
        assert one.cells.get("change", "") == change
    written = finished.read_table("written")
    assert (written.difference == 0).all()
    assert finished.read_table("controls").verdict.tolist() == ["pass"] * 3


def test_the_pairs_run_in_circuits(
    finished: RunFolder, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """The totals of both experiments are one number."""
    shutil.copytree(finished.path / "pairs", tmp_path / "pairs")
    pairs = tmp_path / "pairs" / "pairs.jsonl"
    lines = pairs.read_text("utf-8").splitlines()
    pairs.write_text("\n".join(one for one in lines if '"pitch_label"' in one), "utf-8")
    config = CircuitsConfig(
        model=str(tiny_models.folder()), pairs=str(pairs), places=("readout",), min_effect=1e5,
        n_resamples=1000, seed=1,
    )  # fmt: skip
    run = runner.run(Circuits(config), tmp_path / "run")
    theirs = run.read_table("pairs").set_index("pair").total_effect
    ours = finished.read_table("depths").query("direction == 'noising'")
    ours = ours[ours.attribute == "pitch_label"]
    ours = (ours.base - ours.donor).groupby(ours.pair).first()
    pd.testing.assert_series_equal(
        ours, theirs.loc[ours.index], check_names=False, atol=BATCHED_ROWS, rtol=0
    )


def test_changed_clips_are_answered_with_what_the_change_brings_nearest(
    finished: RunFolder, tiny_models: TinyModels
) -> None:
    model = tiny_models.hooked("gqa")
    words = ("high", "low")
    for one in read_pairs(finished.path / "pairs" / "pairs.jsonl"):
        if one.contrast == "range":
            ids = [model.tokenizer(word)["input_ids"][0] for word in words]
            logits = []
            for side in (one.base, one.donor):
                x = model.prepare(side.audio[0], segments=list(side.parts))
                logits.append(model(x)[0, -1, ids].detach())
            gains = dict(zip(words, (logits[1] - logits[0]).tolist(), strict=True))
            others = [word for word in words if word != one.answers[0]]
            assert one.answers[1] == max(others, key=gains.__getitem__)


def test_stopped_amid_either_stage_two_processes_end_it_with_the_same_bytes(
    tiny_models: TinyModels, table: Path, finished: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for before in (3, 7):  # of 7 units that hear clips; then come two sweeps, and the files
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(toy(tiny_models.folder(), table, **SMALL), {before}), out)
    assert len(list(out.glob("units/pair__*"))) == 1
    runner.run(toy(tiny_models.folder(), table, **SMALL), out, executor=Processes(2))
    assert results(out) == results(finished.path)


def test_identical_clips_have_no_effect_and_no_recovery(
    tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    """A level that is changed by nothing."""
    same = {"kinds": ["level"], "level_db": 0.0, "n_pairs": 2}
    experiment = toy(tiny_models.folder(), table, **same)
    found = tables_of(experiment, tmp_path / "run")
    depths, heads = found["depths"], found["heads"]
    assert len(found["written"]) == 4
    assert depths.pair.nunique() == 2
    np.testing.assert_allclose(depths.base, depths.donor, atol=BATCHED_ROWS, rtol=0)
    assert (depths.toward == 0).all()
    assert (heads.patched == 0).all()
    assert depths.recovery.isna().all()
    # Other experiments read the manifest, in which no recording is twice.
    assert len(load_recordings(tmp_path / "run" / "pairs", label_column="pitch_label")) == 2
    run = MinimalPairs.results(experiment.config, {}, found)
    run.tables.update(effects(run))
    assert "no pair has an effect" in CLAIMS[1].judge(run, "level").statement


def test_a_head_that_is_missed_but_carries_nothing_is_no_backup() -> None:
    run, names = cases(), {"patched": "ablated", "ablated": "patched"}
    missed = concluded({**run.tables, "heads": run["heads"].rename(columns=names)})
    for one, said in (
        (run, "Other heads may stand in for some that carry emotion (backup)"),
        (missed, "Heads that do not carry emotion are missed where they are removed"),
    ):
        found = MinimalPairs.judge(one).findings["emotion: backup"]
        assert found.established
        assert found.claim.startswith(said)


def test_a_run_that_accepts_nothing_says_so(tiny_models: TinyModels, tmp_path: Path) -> None:
    table = write_recordings(tmp_path, n_speakers=2, longer=160)
    run = runner.run(toy(tiny_models.folder(), table, kinds=["label"]), tmp_path / "run")
    assert not (run.path / "pairs").exists()
    findings = run.read_table("findings")
    assert findings.claim.tolist() == ["pitch_label: alone"]
    assert "no pair is accepted" in findings.statement[0]
    assert run.read_table("controls").verdict.tolist() == ["not applicable"] * 3


def test_batches_are_the_single_pairs_to_rounding(
    tiny_models: TinyModels, table: Path, finished: RunFolder, tmp_path: Path
) -> None:
    single = {**SMALL, "batch_size": 1, "kinds": ["label"]}
    found = tables_of(toy(tiny_models.folder(), table, **single), tmp_path / "run")
    for name in ("depths", "heads"):
        ours = finished.read_table(name).query("attribute == 'pitch_label'")
        theirs = found[name]
        assert len(ours) == len(theirs) > 0
        pd.testing.assert_frame_equal(
            ours.drop(columns="recovery", errors="ignore").reset_index(drop=True),
            theirs.drop(columns="recovery", errors="ignore"),
            atol=BATCHED_ROWS, rtol=0,
        )  # fmt: skip


# --- Refusals, before anything is written


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (["path,speaker", "a.wav,s1"], {}, r"clips.csv.*line 2: pitch_label: missing"),
        (["path,pitch_label", "no.wav,high"], {}, r"clips.csv.*line 2: path: .*no.wav"),
        (["path,pitch_label", "a.wav,high"], {"prompt": None}, r"clips.csv line 2: .*Set prompt"),
        (["path,pitch_label", "a.wav,high"], {"kinds": ["label"]}, "got none of label, expected"),
        (["path,pitch_label", "a.wav,high"], {}, "got 'high' alone, expected two"),
        (
            ["path,pitch_label", "a.wav,high", "b.wav,low"],
            {"level_dbfs": 0.0},
            "clips.csv line 2: bringing a to its level: it would be clipped",
        ),
        (
            ["path,pitch_label", "a.wav,high", "b.wav,low"],
            {"probe_point": "blocks.*.hook_resid_pre"},
            "got 4 hook points, expected one",
        ),
    ],
)
def test_bad_input_is_refused_by_line(
    tiny_models: TinyModels,
    tmp_path: Path,
    table: Path,
    lines: list[str],
    settings: dict[str, Any],
    message: str,
) -> None:
    for name, source in (("a.wav", "0-two-high.wav"), ("b.wav", "0-two-low.wav")):
        (tmp_path / name).write_bytes((table.parent / source).read_bytes())
    (tmp_path / "clips.csv").write_text("\n".join(lines), "utf-8")
    experiment = toy(tiny_models.folder(), tmp_path / "clips.csv", **settings)
    with pytest.raises(InputError, match=message):
        runner.run(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"band_hz": (400, 300)}, "lower one first"),
        ({"kinds": ["noise", "noise"]}, "each only once"),
        ({"attribute": "speaker"}, "no kind of pair"),
        ({"pace_factor": 0.5}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MinimalPairsConfig(**settings)


# --- The truth: OB1's pairs differ in the emotion, not in what is said


@pytest.fixture(scope="module")
def ob1() -> tuple[MinimalPairs, pd.DataFrame]:
    found = MinimalPairs(MinimalPairsConfig(kinds=("label",), batch_size=9))
    found.identify()
    found.load()
    rows = [row for unit in found.units() for row in found.measure(unit).tables["clips"]]
    return found, pd.DataFrame(rows)


def test_the_emotion_probe_changes_and_the_text_probe_does_not(
    ob1: tuple[MinimalPairs, pd.DataFrame],
) -> None:
    experiment, clips = ob1
    material = experiment.material
    assert len(material.candidates) == 18
    readings, probes = read_by_probes(material, clips.set_index("clip"))
    assert set(readings) == {"text", "emotion"}
    draws, groups = Draws(0, 2000), [one.group for one in material.candidates]
    changes = {
        column: draws.row([read.change(one) for one in material.candidates], groups)
        for column, read in readings.items()
    }
    assert changes["emotion"]["high"] < -0.5
    assert changes["text"]["low"] < 0 < changes["text"]["high"]
    assert probes.set_index("column").accuracy["emotion"] > 0.8


@torch.no_grad()
def test_states_and_scores_are_the_models(ob1: tuple[MinimalPairs, pd.DataFrame]) -> None:
    experiment, clips = ob1
    model: HookedALM = experiment.model
    one = experiment.material.versions[-1]
    x = experiment.prompts[one.name]
    logits, cache = model.run_with_cache(x, names_filter=[experiment.point])
    row = clips.set_index("clip").loc[one.name]
    n_real = model.encoder_rows(x).prompts.is_real[0]
    mean = cache[experiment.point][0][torch.from_numpy(n_real)].mean(0)
    np.testing.assert_allclose(row.state, mean.numpy(), atol=1e-5)
    tokens = experiment.labels[one.recording.name].tokens
    np.testing.assert_allclose(row.scores, logits[0, -1, tokens].numpy(), atol=BATCHED_ROWS)
    assert row.frames == round(100 * one.recording.seconds)


def test_another_process_measures_the_same(
    tiny_models: TinyModels, table: Path, finished: RunFolder
) -> None:
    """Workers get what `identify` left, pickled, and nothing that `measure` did."""
    here = toy(tiny_models.folder(), table, **SMALL)
    here.identify()
    there = pickle.loads(pickle.dumps(here))
    there.load()
    first = here.units()[0]
    rows = pd.DataFrame(there.measure(first).tables["clips"])
    kept = finished.read_table("clips")[: len(rows)]
    assert rows["state"].tolist() == [list(one) for one in kept["state"]]
    pd.testing.assert_frame_equal(
        rows.drop(columns=["state", "scores"]), kept.drop(columns=["state", "scores"])
    )
