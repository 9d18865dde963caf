"""Convergence on a tiny Whisper: as plain Hugging Face has it, and under an edit that is none."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from hooked_alm.experiments.convergence.experiment import Convergence
from hooked_alm.experiments.convergence.settings import ConvergenceConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.statistics.similarity import linear_cka
from stopped_runs import interrupted
from whisper_toy import LAYERS, POSITIONS, Whispers, noise

SECONDS = (0.4, 0.6, 0.9)
LAST = LAYERS["encoder"]
SETTINGS: dict[str, Any] = {"n_resamples": 1000, "max_new_tokens": 6, "language": "en"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for n, seconds in enumerate(SECONDS):
        soundfile.write(folder / f"c{n}.wav", noise(seconds, seed=n), 16_000)
    return folder


def experiment(model: Path, clips: Path, **changes: Any) -> Convergence:
    return Convergence(
        ConvergenceConfig(model=str(model), audio=str(clips), **{**SETTINGS, **changes})
    )


@pytest.fixture(scope="module")
def run(
    small_figures: None, whispers: Whispers, clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    return runner.run(experiment(whispers.folder(), clips), tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def unpaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest."""
    monkeypatch.setattr(Convergence, "page", lambda self, page, run: None)


@torch.no_grad()
def test_norms_and_similarities_are_hugging_faces(
    run: RunFolder, whispers: Whispers, clips: Path
) -> None:
    """States before the final norm: its input, at the last depth."""
    encoder, caught = whispers.hf().model.encoder, []
    handle = encoder.layer_norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    x = whispers.hooked().prepare(clips / "c1.wav", language="en")
    found = encoder(x.clips[0].features, output_hidden_states=True).hidden_states
    handle.remove()
    states = torch.stack([*found[:-1], caught[0]])[:, 0].double()
    table = run.read_table("streams")
    n_own = round(SECONDS[1] * 50)
    for rows, kept in (("own", n_own), ("all", POSITIONS)):
        mine = table[(table["clip"] == "c1") & (table.rows == rows)].sort_values("depth")
        assert set(mine.n_rows) == {kept}
        some = states[:, :kept]
        centred = some - some.mean(-1, keepdim=True)
        np.testing.assert_allclose(mine.raw_norm, some.flatten(1).norm(dim=1), rtol=1e-5)
        np.testing.assert_allclose(mine.centred_norm, centred.flatten(1).norm(dim=1), rtol=1e-5)
        for column, debiased in (("cka", True), ("plain_cka", False)):
            theirs = [linear_cka(one, some[-1], debiased=debiased) for one in some]
            np.testing.assert_allclose(mine[column], theirs, atol=1e-5)
    assert set(run.read_table("controls").verdict) == {"pass"}


def test_depths_are_those_of_the_curves(run: RunFolder) -> None:
    streams, depths = run.read_table("streams"), run.read_table("depths")
    mine = streams[(streams["clip"] == "c0") & (streams.rows == "own")].sort_values("depth")
    at = depths[(depths["clip"] == "c0") & (depths.rows == "own")].set_index("measure").depth
    assert at["cka"] == 1 + np.diff(mine.cka).argmax()
    norms = mine.raw_norm.to_numpy()
    assert at["raw_norm"] == 1 + (norms[1:] / norms[:-1]).argmax()
    tokens = run.read_table("tokens")
    saturated = depths[(depths["clip"] == "c0") & (depths.measure == "saturation")].iloc[0]
    assert saturated.own_depth == tokens[tokens["clip"] == "c0"].depth.median()
    assert saturated.relative_depth == saturated.own_depth / LAYERS["decoder"]
    assert saturated.depth == saturated.relative_depth * LAST


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.usefixtures("unpaged")
@torch.no_grad()
def test_a_constant_that_nothing_reads_moves_the_raw_norm_alone(
    run: RunFolder, whispers: Whispers, clips: Path, tmp_path: Path, block: int
) -> None:
    """C41: added to the bias of one block, it changes no logit; only raw norms turn there."""
    folder = tmp_path / "edited"
    folder.mkdir()
    for one in whispers.folder().iterdir():
        (folder / one.name).write_bytes(one.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.encoder.layers.{block}.fc2.bias"] += 300.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = runner.run(experiment(folder, clips), tmp_path / "run")
    ours, theirs = found.read_table("depths"), run.read_table("depths")
    is_raw = ours.measure == "raw_norm"
    assert set(ours.depth[is_raw]) == {block + 1}
    pd.testing.assert_frame_equal(ours[~is_raw], theirs[~is_raw], rtol=1e-4, check_dtype=False)
    log_p, before = (one.read_table("transcripts").log_p for one in (found, run))
    np.testing.assert_allclose(log_p, before, atol=1e-3)  # 300 takes two digits of fp32


@pytest.mark.usefixtures("unpaged")
def test_what_the_seed_did_is_taken_back(whispers: Whispers, clips: Path, tmp_path: Path) -> None:
    found = runner.run(experiment(whispers.folder(), clips, variant="seed"), tmp_path / "run")
    findings = found.read_table("findings").set_index("claim").statement
    assert "known defects C41, C17, C22" in findings["same_depth"]
    assert "known defects" not in findings["massive_rows"]


@pytest.mark.usefixtures("unpaged")
def test_stopped_or_in_two_processes_it_leaves_the_same_bytes(
    run: RunFolder, whispers: Whispers, clips: Path, tmp_path: Path
) -> None:
    def again() -> Convergence:
        return experiment(whispers.folder(), clips)

    tables = {path.name: path.read_bytes() for path in run.path.glob("tables/*")}
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(again(), {2}), tmp_path / "stopped")
    for name, executor in (("stopped", {}), ("two", {"executor": Processes(2)})):
        found = runner.run(again(), tmp_path / name, **executor)
        assert {p.name: p.read_bytes() for p in found.path.glob("tables/*")} == tables
