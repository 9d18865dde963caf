"""``--auto-batch``: which size it takes, what it refuses, and that a run keeps its own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hooked_alm.errors import InputError
from hooked_alm.experiments import cli
from hooked_alm.experiments.cli import app
from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.materials.conflict_runs import PatchRun, PromptRun
from hooked_alm.experiments.workbench import auto_batch, runner
from hooked_alm.experiments.workbench.auto_batch import auto_batched, host_room, largest_batch
from hooked_alm.experiments.workbench.experiment import UnitResult
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.worker import Brief
from workbench_toy import Toy, ToyConfig

MIB = 2**20


class Trial:
    """Takes so much memory a prompt, and so much time a batch and a prompt, by its own clock."""

    def __init__(
        self, share: float = 0.0, *, s_a_prompt: float = 0.0, n: int = 10**6, fails_at: int = 10**6
    ) -> None:
        self.share, self.s_a_prompt, self.n, self.fails_at = share, s_a_prompt, n, fails_at
        self.sizes: list[int] = []
        self.now = 0.0

    def try_batch(self, size: int) -> int:
        self.sizes.append(size)
        if size >= self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.now += 0.05 + self.s_a_prompt * size
        return min(size, self.n)


def measured(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, n_workers: int = 1
) -> tuple[int, list[str]]:
    said: list[str] = []

    class Watched:
        def __init__(self, n_workers: int) -> None:
            self.n_workers, self.share = n_workers, 0.0

        @contextmanager
        def watched(self) -> Iterator[None]:
            yield
            self.share = trial.share * self.n_workers * trial.sizes[-1]

    monkeypatch.setattr(auto_batch, "_Memory", Watched)
    monkeypatch.setattr(auto_batch, "time", SimpleNamespace(perf_counter=lambda: trial.now))
    return largest_batch(trial, n_workers=n_workers, say=said.append), said


def test_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(1 / 16)  # 8 take half; 16 would take all
    size, said = measured(trial, monkeypatch)
    assert size == 8
    assert trial.sizes == [1, 1, 2, 4, 8]
    assert said[0] == "batches of 1: 50 ms a prompt, 6% of the memory"
    assert said[3:] == ["batches of 8: 6 ms a prompt, 50% of the memory", "batch_size=8"]
    assert measured(Trial(1 / 16), monkeypatch, n_workers=2)[0] == 4


def test_memory_that_is_held_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process, by many times what else moves in it."""
    monkeypatch.setattr(auto_batch, "host_room", lambda: 1024 * MIB)
    memory = auto_batch._Memory(2)
    with memory.watched():
        held = np.ones(256 * MIB, np.uint8)
        time.sleep(0.1)
        del held
    assert 0.4 < memory.share < 0.8


@pytest.mark.parametrize(
    ("trial", "size", "last"),
    [
        (Trial(s_a_prompt=3.0), 1, 2),  # 0.025 s of 3.05 are saved
        (Trial(n=5), 4, 8),
        (Trial(fails_at=4), 2, 4),
    ],
    ids=["no faster", "no more prompts", "out of memory"],
)
def test_where_it_ends(trial: Trial, size: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(trial, monkeypatch)[0] == size
    assert trial.sizes[-1] == last


def test_not_even_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no memory for a single prompt. Set max_bytes lower"):
        measured(Trial(fails_at=1), monkeypatch)


def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Trial):
        def try_batch(self, size: int) -> int:
            raise RuntimeError("sizes of tensors must match")

    with pytest.raises(RuntimeError, match="must match"):
        measured(Broken(), monkeypatch)


def test_what_a_container_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "CGROUP", tmp_path)
    free = host_room()
    (tmp_path / "memory.current").write_text("1000\n", "ascii")
    (tmp_path / "memory.max").write_text("4096\n", "ascii")
    assert host_room() == 3096
    (tmp_path / "memory.max").write_text("max\n", "ascii")
    assert host_room() > free / 2


def test_a_trial_runs_the_longest_of_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = EmotionConflict(EmotionConflictConfig(donors=("self", "text_swap")))
    experiment.identify()
    ran = []

    def kept(works: list[PromptRun | PatchRun]) -> list[UnitResult]:
        ran.append(works)
        return [UnitResult() for _ in works]

    monkeypatch.setattr(experiment, "measure_batch", kept)
    assert experiment.try_batch(4) == 4
    assert [[type(work) for work in works] for works in ran] == [[PromptRun] * 4, [PatchRun] * 4]
    every = [work for unit in experiment.units()[:-1] for work in unit.payload]
    for works in ran:
        longest = max(experiment.n_positions(w) for w in every if type(w) is type(works[0]))
        assert experiment.n_positions(works[0]) == longest
        assert len({experiment.batch_kind(work) for work in works}) == 1


def test_a_run_keeps_the_batches_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Measured by a process of its own."""
    words = ["run", "head_statistics", "--out", str(tmp_path / "run"), "--auto-batch"]
    words += ["-s", "max_samples=4", "-s", "n_resamples=1000", "-s", "unit_batches=1"]
    for drawing in ("conclude", "render"):  # takes longer than the run
        monkeypatch.setattr(runner, drawing, lambda *_: None)
    monkeypatch.setattr(cli, "_conclude", lambda *_: None)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    size = RunFolder(tmp_path / "run").provenance["config"]["batch_size"]
    assert size in (1, 2, 4)
    said = capfd.readouterr().err
    assert "batches of 1: " in said
    assert f"batch_size={size}\n" in said

    def never(*_: object) -> int:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(auto_batch, "_asked", never)
    assert CliRunner().invoke(app, words).exit_code == 0
    for more, why in (
        (["--shard", "1/2"], "every shard would measure batches of its own"),
        (["-s", "batch_size=2"], "got batch_size too"),
    ):
        assert why in str(CliRunner().invoke(app, [*words, *more]).exception)


def test_a_process_that_dies_says_so() -> None:
    brief = Brief(None, Path("/nowhere"), (), {}, b"")
    with pytest.raises(InputError, match="starting a worker in /nowhere"):
        auto_batch._asked(brief, {}, 1)
    with pytest.raises(InputError, match="the process ended with 1"):
        auto_batch._asked(brief, {"PYTHONHOME": "/nowhere"}, 1)


def test_an_experiment_without_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="runs one prompt at a time"):
        auto_batched(Toy(ToyConfig()), RunFolder(tmp_path / "run"), environment={})
