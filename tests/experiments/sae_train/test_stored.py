"""``sae_train`` on rows of a store: the bytes of a live pass, stopped and gone on, bad input."""

import csv
from pathlib import Path
from typing import Any

import pytest

from circuits_toy import write_tones
from hooked_alm.errors import HookedALMError, HookNameError, InputError
from hooked_alm.experiments.activations.experiment import StoreActivations
from hooked_alm.experiments.activations.settings import ActivationsConfig
from hooked_alm.experiments.sae_train.experiment import TrainDictionaries
from hooked_alm.experiments.sae_train.settings import SAETrainConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.report import read_report
from hooked_alm.experiments.workbench.run_folder import RunFolder
from stopped_runs import interrupted, results
from tiny import TinyModels

pytestmark = pytest.mark.usefixtures("small_figures")
POINT, OTHER = "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"
WEIGHTS = f"sae/{POINT}/seed_0/sae_weights.safetensors"
SMALL: dict[str, Any] = {
    "n_rows": 80, "step_rows": 16, "steps_per_checkpoint": 2, "n_resamples": 1000, "expansion": 2,
    "k": 3, "points": [POINT], "batch_size": 1, "max_bytes": 10_000, "n_dictionaries": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of three speakers."""
    folder = tmp_path_factory.mktemp("clips")
    names = write_tones(folder, 6)
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "speaker"])
        table.writerows([name, f"s{number % 3}"] for number, name in enumerate(names))
    return folder


@pytest.fixture(scope="module")
def store(tiny_models: TinyModels, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two points, clip by clip."""
    config = ActivationsConfig(
        model=str(tiny_models.folder()), audio=str(clips), points=[OTHER, POINT], n_resamples=1000,
        spans=["audio", "readout"], batch_size=1, unit_batches=4,
    )  # fmt: skip
    run = runner.run(StoreActivations(config), tmp_path_factory.mktemp("rows") / "run")
    return run.path / "activations/prompt"


def stored(store: Path, **settings: Any) -> TrainDictionaries:
    return TrainDictionaries(SAETrainConfig(store=str(store), **{**SMALL, **settings}))


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return runner.run(stored(store), tmp_path_factory.mktemp("run") / "run")


def test_a_store_teaches_what_the_clips_do(
    finished: RunFolder, tiny_models: TinyModels, clips: Path, tmp_path: Path
) -> None:
    """Clip by clip on both sides, so that parts of a pass are the same."""
    values = {"model": str(tiny_models.folder()), "audio": str(clips), **SMALL}
    live = runner.run(TrainDictionaries(SAETrainConfig(**values)), tmp_path / "live")
    for path in [
        *live.path.glob("*/*/*/sae_weights.safetensors"),
        *live.path.glob("*/*/*/cfg.json"),
    ]:
        assert (finished.path / path.relative_to(live.path)).read_bytes() == path.read_bytes()
    for table in ("training", "quality", "partners", "copies"):
        assert finished.read_table(table).equals(live.read_table(table))
    assert live.has("tables/recovery.parquet")
    mine, its = (one.provenance["inputs"] for one in (finished, live))
    for name in ("model", "rows", "points", "held_out_groups"):
        assert mine[name] == its[name]


def test_the_report_says_what_a_store_lacks(finished: RunFolder, store: Path) -> None:
    assert not finished.has("tables/recovery.parquet")
    report = read_report(finished)
    assert report.title.endswith(str(store))
    notes = [item.text for section in report.sections for item in section.items
             if item.type == "note"]  # fmt: skip
    assert len(notes) == 1
    assert "is not measured: a store has rows, and no run" in notes[0]
    assert [*finished.read_table("findings").claim] == [f"stable {POINT}"]
    verdicts = finished.read_table("controls").set_index("control").verdict
    assert verdicts.pop("features that are left alone change no answer") == "not applicable"
    assert {*verdicts} == {"pass"}


def test_a_stopped_run_ends_with_the_same_bytes(
    finished: RunFolder, store: Path, tmp_path: Path
) -> None:
    for stop in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(stored(store), [stop]), tmp_path / "run")
    runner.run(stored(store), tmp_path / "run", executor=Processes(2))
    assert results(tmp_path / "run") == results(finished.path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"points": ["blocks.0.hook_resid_post"]}, HookNameError, "matches none of the 2 names"),
        ({"spans": ["text"]}, InputError, "spans text, expected some of .*: audio, readout, or"),
        ({"group": "accent"}, InputError, "prompt: tone0: accent: missing, in 6 of 6 clips"),
        ({"step_rows": 10_000}, InputError, "expected at least one step's 10000"),
        ({"audio": "here"}, ValueError, "audio would decide nothing: leave out either"),
        ({"model": "m", "prompt": None}, ValueError, "model, prompt would decide nothing"),
        ({"store": "/nowhere"}, InputError, "no store.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt(
    settings: dict[str, Any], error: type[Exception], message: str, store: Path, tmp_path: Path
) -> None:
    assert issubclass(error, HookedALMError | ValueError)
    with pytest.raises(error, match=message):
        runner.run(stored(**{"store": store, **settings}), tmp_path / "run")
    assert not (tmp_path / "run/units").exists()
