"""Runs on several workers, in shards, and on Ray: the same bytes, whoever dies on the way."""

import dataclasses
import json
import os
import pickle
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.experiments import cli
from hooked_alm.experiments.registry import load_experiment
from hooked_alm.experiments.workbench import executors, ray_executor, runner, worker
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.experiment import Experiment, Unit, UnitResult
from hooked_alm.experiments.workbench.merge import check_shards, merge
from hooked_alm.experiments.workbench.ray_executor import RayActors
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.status import status_lines
from hooked_alm.experiments.workbench.work import NO_PART, share
from stopped_runs import kill, needs_kill, results, start, units, wait_for
from workbench_toy import Toy, ToyConfig, run_toy, run_toy_at_home

FREE = ("recording.wav", "lock")
SETTINGS: dict[str, Any] = {"n_units": 14, "delay_s": 0.15, "chains": True}
pytestmark = needs_kill
OWN = '''
"""An experiment of a user's own, whose units hold a class of its file."""

from dataclasses import dataclass

from hooked_alm.experiments.workbench.experiment import Experiment, Unit, UnitResult
from hooked_alm.experiments.workbench.settings import ExperimentConfig


@dataclass(frozen=True)
class Work:
    number: int


class Own(Experiment[ExperimentConfig]):
    name, title, question, Config = "own", "Own", "Does it travel?", ExperimentConfig
    tables = {"rows": "a number"}

    def identify(self):
        return {"model": {"blocks": 1}}

    def units(self):
        return [Unit(f"u{number}", Work(number)) for number in range(3)]

    def measure(self, unit):
        return UnitResult({"rows": [{"number": unit.payload.number}]})

    def page(self, page, run):
        page.section("Rows")
'''


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("serial") / "run"
    run_toy(out, **SETTINGS)
    return results(out, *FREE)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    if not (out / "events.jsonl").exists():
        return []
    lines = (out / "events.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def pids(out: Path) -> set[int]:
    """Processes that have measured units of a run."""
    return {int(event["worker"].rpartition(":")[2]) for event in events(out, "unit")}


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- Processes


def test_two_processes_and_two_that_are_killed(tmp_path: Path, serial: dict[str, bytes]) -> None:
    """A worker that dies in a unit is replaced, and its unit is done by whoever comes first."""
    out = tmp_path / "run"
    driver = start(run_toy, out, executor=Processes(2), **SETTINGS)
    for n, chosen in ((2, max), (5, min)):
        wait_for(lambda n=n: len(events(out, "unit")) >= n, seconds=120)
        os.kill(chosen(pids(out)), signal.SIGKILL)
    driver.join()
    assert driver.exitcode == 0
    assert os.getpid() not in pids(out)
    assert len(pids(out)) >= 2
    assert results(out, *FREE) == serial
    assert not [*(out / "claims").glob("*")]


def test_a_killed_driver_takes_its_workers_along(tmp_path: Path, serial: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    driver = start(run_toy, out, executor=Processes(2), **SETTINGS)
    wait_for(lambda: len(events(out, "unit")) >= 4, seconds=120)
    workers = pids(out)
    kill(driver)
    wait_for(lambda: all(map(is_gone, workers)), seconds=10)
    before = len(units(out))
    assert before < 14
    run_toy(out, **SETTINGS)
    assert results(out, *FREE) == serial
    assert len(events(out, "unit")) <= 14 + 2  # what was cut short is done again, nothing else


def test_a_unit_that_fails_stops_all_workers(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="a unit that fails") as caught:
        run_toy(out, executor=Processes(2), n_units=20, delay_s=0.2, fails_at=17)
    assert "unit zh_sad_17" in caught.value.__notes__[0]
    assert len(units(out)) < 19
    assert all(map(is_gone, pids(out)))
    (said,) = [line for line in status_lines(RunFolder(out)) if line.startswith("failed")]
    assert "zh_sad_17: measuring: got a unit that fails" in said


def test_a_unit_that_kills_its_workers_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def begin_and_die() -> None:
        with folder.claim("x") as is_ours:
            assert is_ours
            os._exit(0)

    for _ in range(3):
        if not (child := os.fork()):
            begin_and_die()
        os.waitpid(child, 0)
    with pytest.raises(InputError, match="measuring x: 3 workers died in it"), folder.claim("x"):
        pytest.fail("it was claimed")
    folder.forget_claims()
    with folder.claim("x") as is_ours, folder.claim("x") as is_ours_twice:
        assert (is_ours, is_ours_twice) == (True, False)


def test_what_cannot_be_loaded_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "MODULE", "hooked_alm.nowhere")
    with pytest.raises(InputError, match="one ended before it had loaded the model"):
        run_toy(tmp_path / "run", executor=Processes(1), n_units=1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="got no number of workers and no GPU"):
        run_toy(tmp_path / "run", executor=Processes(), n_units=1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="got 3 workers for 2 GPUs"):
        run_toy(tmp_path / "run", executor=Processes(3), n_units=1, device="cuda")


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,3,5,7")
    toy = Toy(ToyConfig(device="cuda", n_threads=3))

    def seen(n: int | None) -> list[str]:
        found = Processes(n).environments(toy)
        assert {one["OMP_NUM_THREADS"] for one in found} == {"3"}
        return [one["CUDA_VISIBLE_DEVICES"] for one in found]

    assert seen(2) == ["1,2", "3,5"]
    assert seen(None) == ["1", "2", "3", "5", "7"]


def test_devices_of_two_kinds_are_refused() -> None:
    assert executors.one_kind(["NVIDIA H200"] * 2) == "NVIDIA H200"
    with pytest.raises(InputError, match=r"2 kinds \(NVIDIA A100, NVIDIA H200\)"):
        executors.one_kind(["NVIDIA H200", "NVIDIA A100"])


def test_a_result_that_is_no_json_is_a_failure_of_its_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "measure", lambda self, unit: UnitResult({}, {"x": {1, 2}}))
    with pytest.raises(TypeError, match="is not JSON") as caught:
        run_toy(tmp_path / "run", n_units=1)
    assert "unit zh_sad_0" in caught.value.__notes__[0]
    assert [event["unit"] for event in events(tmp_path / "run", "failed")] == ["zh_sad_0"]


def test_room_on_rays_machines() -> None:
    """Of each machine, not of all together: an actor does not spread over two."""
    actors = RayActors(4)
    two = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}]
    assert actors._n_actors(two, True, 1) == (4, 2)
    assert RayActors()._n_actors(two, True, 1) == (8, 1)
    uneven = [{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 2.0}]
    with pytest.raises(InputError, match="of which there is for 3"):
        actors._n_actors(uneven, True, 1)
    with pytest.raises(InputError, match="got 4 workers of 5 threads and 0 GPUs"):
        actors._n_actors(two, False, 5)


def test_errors_travel() -> None:
    class LocalError(Exception):
        pass

    error = InputError("no")
    error.add_note("in unit x")
    copy = worker.portable(error)
    assert type(copy) is InputError
    assert (str(copy), copy.__notes__) == ("no", ["in unit x"])
    try:
        raise LocalError("odd")
    except LocalError as error:
        copy = worker.portable(error)
    assert type(copy) is RuntimeError
    assert "LocalError: odd" in str(copy)
    assert "test_executors.py" in copy.__notes__[-1]


def test_a_machine_with_other_versions_is_refused() -> None:
    """Before it loads anything; the versions are those that shards have to share."""
    brief = worker.Brief.of(Toy(ToyConfig()))
    assert {"torch", "numpy", "source_revision"} < brief.environment.keys()
    other = dataclasses.replace(brief, environment=brief.environment | {"torch": "9.9"})
    one = worker.Worker()
    is_answer, error = one.answer(other, pickle.dumps(()))
    assert (is_answer, one.experiment) == (False, None)
    found = brief.environment["torch"]
    expected = (
        f'got a different torch (now "{found}", where the run began "9.9"), expected the same'
    )
    assert expected in str(error)
    assert isinstance(brief.read(), Toy)


# --- Shards


def test_shards_merge_to_the_same_bytes(tmp_path: Path, serial: dict[str, bytes]) -> None:
    outs = [tmp_path / f"{i}" for i in (1, 2, 3)]
    for i, out in enumerate(outs, start=1):
        run_toy(out, shard=(i, 3), **SETTINGS)
        assert not (out / "report.json").exists()
    assert [len(units(out)) for out in outs] == [5, 5, 4]
    cli_merge([outs[0], outs[1]], out := tmp_path / "merged")
    assert not (out / "report.json").exists()
    cli_merge(outs, out)
    assert results(out, *FREE) == serial


def cli_merge(runs: list[Path], out: Path, **settings: Any) -> None:
    folders = [RunFolder(run) for run in runs]
    check_shards(folders)
    merge(Toy(ToyConfig(**(settings or SETTINGS))), folders, RunFolder(out))
    run_toy(out, shard=NO_PART, **(settings or SETTINGS))


def test_more_shards_than_there_is_work_merge(tmp_path: Path) -> None:
    """One that had nothing to measure knows no device; the order of the folders is free."""
    for i in (1, 2, 3):
        run_toy(tmp_path / f"{i}", shard=(i, 3), n_units=2)
    assert RunFolder(tmp_path / "3").provenance["environment"]["device"] is None
    cli_merge([tmp_path / name for name in "312"], tmp_path / "merged", n_units=2)
    merged = RunFolder(tmp_path / "merged")
    assert merged.has("report.json")
    assert str(merged.provenance["environment"]["device"]).startswith("CPU with")


def test_merging_runs_no_code_that_a_folder_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    kind = load_experiment(str(tmp_path / "own.py"))
    runner.run(kind(kind.Config()), tmp_path / "a", shard=(1, 1))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')", "utf-8")
    words = ["hooked-alm", "merge", str(tmp_path / "a"), "--out", str(tmp_path / "m")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert f"Add --experiment {tmp_path / 'own.py'}, if you trust it" in capsys.readouterr().err
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    monkeypatch.setattr("sys.argv", [*words, "--experiment", str(tmp_path / "own.py")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert RunFolder(tmp_path / "m").read_table("rows")["number"].tolist() == [0, 1, 2]


def test_a_run_stays_on_its_kind_of_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_toy(tmp_path / "run", shard=(1, 2), n_units=2)
    monkeypatch.setattr(worker, "device_kind", lambda config: "NVIDIA H200")
    with pytest.raises(InputError, match="got NVIDIA H200 to compute on, expected CPU with"):
        run_toy(tmp_path / "run", n_units=2)
    assert len(units(tmp_path / "run")) == 1


def test_a_claim_of_a_living_worker_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.claim("x") as is_ours:
        assert is_ours
        folder.forget_claims()
        assert folder.claimed() == ["x"]
    assert folder.claimed() == []


def test_chains_stay_in_one_shard() -> None:
    chain = [Unit("a"), Unit("b", after="a"), Unit("c"), Unit("d", after="b"), Unit("e")]
    parts = ["".join(unit.id for unit in share(chain, (i, 2))) for i in (1, 2)]
    assert parts == ["abde", "c"]
    assert share(chain, None) == chain
    assert share(chain, NO_PART) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("device", "NVIDIA H200", r"different environment.device \(now \"NVIDIA H200\""),
        ("torch", "9.9", r"different environment.torch \(now \"9.9\""),
    ],
)
def test_shards_of_other_kinds_are_refused(
    tmp_path: Path, key: str, value: str, message: str
) -> None:
    runs = [RunFolder(tmp_path / name) for name in "ab"]
    for i, run in enumerate(runs, start=1):
        run_toy(run.path, shard=(i, 2), n_units=2)
    about = runs[1].provenance
    about["environment"][key] = value
    runs[1].write_json("run.json", about)
    with pytest.raises(InputError, match=message):
        check_shards(runs)
    with pytest.raises(InputError, match="each once"):
        check_shards([runs[0], runs[0]])


def test_shards_of_other_runs_and_other_results_are_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_toy(tmp_path / name, shard=(1, 1), n_units=1, seed=seed)
    with pytest.raises(InputError, match=r"merging .*c with .*a: got a different config.seed"):
        check_shards([RunFolder(tmp_path / name) for name in "ac"])
    run = RunFolder(tmp_path / "b")
    found = run.read_unit("zh_sad_0")
    run.write_unit("zh_sad_0", found["tables"], {"x": 1})
    with pytest.raises(InputError, match=r"its units/zh_sad_0.json differs from that of .*a"):
        cli_merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m", n_units=1)
    assert not (tmp_path / "m").exists()


# --- Ray


def test_ray_makes_the_same_bytes_and_leaves_nothing_behind(
    tmp_path: Path, serial: dict[str, bytes]
) -> None:
    """Nobody else hears the session; a worker that is killed is replaced."""
    (home := tmp_path / "home").mkdir()
    driver = start(run_toy_at_home, home, out := tmp_path / "run", **SETTINGS)
    wait_for(lambda: len(events(out, "unit")) >= 3, seconds=200)  # of a busy machine
    family = psutil.Process(driver.pid).children(recursive=True)
    heard = [one.laddr.ip for some in family for one in some.net_connections("tcp")]
    assert {ip.removeprefix("::ffff:") for ip in heard} == {"127.0.0.1"}
    os.kill(max(pids(out)), signal.SIGKILL)
    driver.join()
    assert driver.exitcode == 0
    assert len(pids(out)) >= 2
    assert results(out, *FREE) == serial
    assert all(map(is_gone, pids(out)))
    assert {path.name for path in home.iterdir()} <= {".cache", ".config"}  # matplotlib's


def test_a_killed_driver_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    if not (child := os.fork()):
        with ray_executor._session_folder(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    (tmp_path / f"{left.name}-no-session").mkdir()
    with ray_executor._session_folder(tmp_path) as first:
        assert not left.exists()
        with ray_executor._session_folder(tmp_path) as second:
            assert first.is_dir()
            assert second.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [f"{left.name}-no-session"]


# --- Real experiments


def small(name: str, folder: Path) -> Experiment[Any]:
    """An experiment that takes some seconds."""
    clips = folder / "clips"
    if not clips.exists():
        clips.mkdir()
        for clip in ("zh_sad_strong", "zh_cheerful_strong", "zh_cheerful_normal"):
            (clips / f"{clip}.wav").symlink_to(CLIPS / f"{clip}.wav")
    settings: dict[str, dict[str, Any]] = {
        "activations": {"audio": str(clips), "batch_size": 1, "unit_batches": 1},
        "head_statistics": {"max_samples": 8, "batch_size": 2, "unit_batches": 1},
        "tuned_lens": {
            "audio": str(clips), "n_steps": 4, "steps_per_checkpoint": 2, "prompts_per_step": 2,
        },
        "emotion_conflict": {
            "audio": str(clips), "modes": ("audio_only", "conflict"), "donors": ("self",),
            "patch_layers": (2, 9),
        },
    }  # fmt: skip
    kind = load_experiment(name)
    return kind(kind.Config(n_resamples=1000, **settings[name]))


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        ("activations", None),
        ("head_statistics", None),
        ("tuned_lens", Processes(2)),
        ("emotion_conflict", None),
    ],
)
def test_experiments_make_the_same_bytes(
    tmp_path: Path, name: str, executor: Processes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`scripts/kill_runs.py` compares all of them, on every executor, reports included."""
    for drawing in ("conclude", "render"):  # takes longer than the runs
        monkeypatch.setattr(runner, drawing, lambda *_: None)

    def run(out: str, **how: Any) -> dict[str, bytes]:
        return results(runner.run(small(name, tmp_path), tmp_path / out, **how).path, "lock")

    expected = run("serial")
    if executor is not None:
        assert run("processes", executor=executor) == expected
    shards = [RunFolder(tmp_path / f"{i}") for i in (1, 2, 3)]
    for i in (1, 2, 3):
        run(f"{i}", shard=(i, 3))
    merge(small(name, tmp_path), shards, RunFolder(tmp_path / "merged"))
    assert run("merged", shard=NO_PART) == expected


# --- What is said of them


def test_status_of_a_run_at_work_and_after(tmp_path: Path) -> None:
    out = tmp_path / "run"
    driver = start(run_toy, out, n_units=30, stays_at=27)
    wait_for(lambda: (out / "run.json").exists() and RunFolder(out).claimed() == ["zh_sad_27"])
    first, begun, done, work, *_ = status_lines(RunFolder(out))
    assert first == "toy of bundled:follows_text: at work"
    assert re.fullmatch(r"begun 2\S+; the last event, unit, 2\S+", begun)
    assert done == "2 units are done"
    assert work == "in work: zh_sad_27"
    kill(driver)
    lines = [*status_lines(RunFolder(out))]
    assert lines[0].endswith("not at work")
    assert lines[-1] == "begun and not ended: zh_sad_27"
    time.sleep(0.01)
    with (out / "events.jsonl").open("a") as file:
        file.write('{"time": "cut sho')
    assert [*status_lines(RunFolder(out))] == lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard", "4/3"], "reading --shard: got '4/3', expected"),
        (["--shard", "a"], "reading --shard: got 'a', expected"),
        (["--workers", "2"], "--executor serial: got --workers, which it does not take"),
        (["--executor", "process", "--ray-address", "x"], "process: got --ray-address"),
    ],
)
def test_options_that_do_not_fit(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["hooked-alm", "run", "head_statistics", "--out", str(tmp_path / "x"), *words]
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_experiment_of_a_users_own_file_travels(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    kind = load_experiment(str(tmp_path / "own.py"))
    folder = runner.run(kind(kind.Config()), tmp_path / "run", executor=Processes(1))
    assert folder.read_table("rows")["number"].tolist() == [0, 1, 2]
    assert os.getpid() not in pids(folder.path)
