"""Runs that end early, by a key or by ``kill -9``, and what of them must not depend on it.

Processes to kill fork from a server that has the imports behind it, which take longer than a run,
and that has never drawn a progress bar. A fork of the test's own process would share tqdm's lock
with it, and one killed while it draws would leave every later bar of the suite waiting.
"""

import itertools
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Collection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from hooked_alm.experiments import cli
from hooked_alm.experiments.registry import load_experiment
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Executor
from hooked_alm.experiments.workbench.experiment import Experiment, Unit, UnitResult

needs_kill = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
IMPORTED = (
    "experiments.cli",
    *(f"experiments.workbench.{name}" for name in ("figures", "runner")),
    *(f"experiments.{name}.experiment" for name in ("emotion_conflict", "semantic_vs_prosody")),
    *(f"experiments.{name}.experiment" for name in ("prefix_comparison", "tuned_lens")),
    *(f"experiments.{name}.experiment" for name in ("activations", "grounding")),
    *(f"converters.families.{name}" for name in ("qwen2", "qwen2_audio")),
)


def results(folder: Path, *free: str) -> dict[str, bytes]:
    """Every file that must not depend on when and how often the run was started."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in {"run.json", "events.jsonl", "report.html", *free}
    }


def units(out: Path) -> set[str]:
    """Names of the finished units' shards."""
    return {path.name for path in out.glob("units/*.json")}


def interrupted(experiment: Experiment[Any], before: Collection[int]) -> Experiment[Any]:
    """The experiment, with Ctrl-C pressed as it begins the given units, counted from one."""
    measure, calls = experiment.measure, itertools.count(1)

    def run_or_stop(unit: Unit) -> UnitResult:
        if next(calls) in before:
            raise KeyboardInterrupt
        return measure(unit)

    vars(experiment)["measure"] = run_or_stop
    return experiment


def start(target: Callable[..., Any], *args: Any, **kwargs: Any) -> ForkServerProcess:
    """Call a function in a process of its own."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([f"hooked_alm.{name}" for name in IMPORTED])
    process = processes.Process(target=_call, args=(target, *args), kwargs=kwargs)
    process.start()
    return process


def _call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    # A shell that starts the suite in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*args, **kwargs)


def run_experiment(name: str, out: Path, executor: Executor | None = None, **settings: Any) -> None:
    """Run an experiment of the registry."""
    kind = load_experiment(name)
    runner.run(kind(kind.Config(**settings)), out, executor=executor)


def command(words: list[str]) -> None:
    """Run the command line."""
    sys.argv = ["hooked-alm", *words]
    cli.main()


def wait_for(is_reached: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a run got somewhere."""
    deadline = time.monotonic() + seconds
    while not is_reached():
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.001)


def kill(process: ForkServerProcess) -> None:
    """``kill -9`` of a process that is still at work."""
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
