"""Where units are measured: in this process, or in several; Ray's are in `ray_executor`.

Every executor measures the same units with as many threads each, so that tables have the same
bytes. Workers find their work themselves (see `work`): what a dead one had claimed is taken over,
and a new one is started in its place.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, runtime_checkable

import torch

from hooked_alm.errors import InputError

from .experiment import Experiment, Unit
from .run_folder import MOST_DEATHS, RunFolder
from .work import work
from .worker import Brief, loaded, wants_gpus

MODULE = "hooked_alm.experiments.workbench.worker"


@runtime_checkable
class Executor(Protocol):
    """Where the units of a run are measured."""

    def open(self, experiment: Experiment[Any]) -> contextlib.AbstractContextManager["Workers"]:
        """The workers of an experiment that has identified its inputs; they end with the block."""


@runtime_checkable
class Workers(Protocol):
    """Those that measure units of one experiment."""

    def load(self) -> str:
        """Loads the experiment in every worker, once; the kind of device they compute on.

        Raises:
            InputError: workers on devices of different kinds.
        """

    def work(self, units: Sequence[Unit]) -> None:
        """Measures units until all are done.

        Raises:
            Exception: what a unit raised.
        """


class InProcess:
    """One worker: this process."""

    @contextlib.contextmanager
    def open(self, experiment: Experiment[Any]) -> Iterator["Workers"]:
        """This process as a worker."""
        yield _Alone(experiment)


class _Alone:
    def __init__(self, experiment: Experiment[Any]) -> None:
        self.experiment = experiment
        self.device: str | None = None

    def load(self) -> str:
        """See `Workers.load`."""
        if self.device is None:
            self.device = loaded(self.experiment)
        return self.device

    def work(self, units: Sequence[Unit]) -> None:
        """See `Workers.work`."""
        work(self.experiment, units)


class Processes:
    """Several processes on this machine; GPUs are dealt out among them."""

    def __init__(self, n_workers: int | None = None) -> None:
        """Checks nothing yet.

        Args:
            n_workers: number of processes; None is one for every GPU.
        """
        self.n_workers = n_workers

    @contextlib.contextmanager
    def open(self, experiment: Experiment[Any]) -> Iterator["Workers"]:
        """Processes that have the experiment.

        Raises:
            InputError: no number of workers, or more than there are GPUs.
        """
        environments = self.environments(experiment)
        brief = Brief.of(experiment)
        processes = [_Process(brief, one) for one in environments]
        workers = _Processes(processes, experiment.folder)
        try:
            yield workers
        finally:
            workers.close()

    def environments(self, experiment: Experiment[Any]) -> list[dict[str, str]]:
        """Variables of every worker's environment: its threads, and the GPUs that it sees.

        Raises:
            InputError: see `open`.
        """
        config = experiment.config
        n_gpus = torch.cuda.device_count() if wants_gpus(config) else 0
        n = self.n_workers or n_gpus
        if not n:
            raise InputError(
                "running on processes: got no number of workers and no GPU to give one each, "
                "expected a number. Add --workers 2, or as many as the memory holds models."
            )
        if n_gpus and n > n_gpus:
            raise InputError(
                f"running on processes: got {n} workers for {n_gpus} GPUs, expected one GPU or "
                f"more for each. Give --workers {n_gpus} at most."
            )
        if n_gpus and ":" in config.device and n > 1:
            raise InputError(
                f"running on processes: got {n} workers and device={config.device}, expected a "
                "device without a number: GPUs are dealt out. Give device=cuda, or one worker."
            )
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(i) for i in range(n_gpus)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
                                str(config.n_threads))  # fmt: skip
        each = n_gpus // n
        return [
            threads
            | ({"CUDA_VISIBLE_DEVICES": ",".join(names[i * each : (i + 1) * each])} if each else {})
            for i in range(n)
        ]


class _DiedError(Exception):
    """A worker ended without an answer."""


class _Process:
    """A worker's process; a new one stands in for one that died."""

    def __init__(self, brief: Brief, environment: dict[str, str]) -> None:
        self.brief, self.environment = brief, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.is_closed = False
        self._changing = threading.Lock()

    def ask(self, units: Sequence[Unit]) -> str:
        """What the worker answers: the kind of its device, once the units are done.

        Raises:
            _DiedError: it died.
            Exception: what it raised.
        """
        if self.process is None:
            self._start()
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((self.brief, pickle.dumps(units)), process.stdin)
            process.stdin.flush()
            is_answer, found = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.stop()
            raise _DiedError from None
        if not is_answer:
            raise found
        return str(found)

    def _start(self) -> None:
        with self._changing:
            if self.is_closed:
                raise _DiedError
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE],  # not what lies in the folder it stands in
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, **self.environment},
            )  # fmt: skip

    def stop(self) -> None:
        """Ends the process, if there is one."""
        with self._changing:
            process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()

    def close(self) -> None:
        """Ends the process for good."""
        with self._changing:
            self.is_closed = True
        self.stop()


class _Processes:
    def __init__(self, processes: Sequence[_Process], folder: RunFolder) -> None:
        self.processes, self.folder = processes, folder
        self.device: str | None = None

    def load(self) -> str:
        """See `Workers.load`."""
        if self.device is None:
            self.device = one_kind(self._each(lambda one: self._asked(one, ())))
        return self.device

    def work(self, units: Sequence[Unit]) -> None:
        """See `Workers.work`."""
        self._each(lambda one: self._asked(one, units))

    def _asked(self, one: _Process, units: Sequence[Unit]) -> str:
        """What a process answers, or the one that stands in for it when it dies."""
        n_deaths = 0
        while not one.is_closed and n_deaths < MOST_DEATHS:
            try:
                device = one.ask(())
                n_deaths = -1  # in a unit, as `RunFolder.claim` counts them
                return one.ask(units) if units else device
            except _DiedError:
                n_deaths += 1
                if not one.is_closed and self.folder.has("run.json"):
                    self.folder.log("worker died")
        raise _DiedError

    def _each(self, call: Callable[[_Process], Any]) -> list[Any]:
        """What a function returns for every process; all end with the first that fails."""
        with ThreadPoolExecutor(len(self.processes)) as threads:
            calls: list[Future[Any]] = [threads.submit(call, one) for one in self.processes]
            try:
                # By turns: a wait without an end would not hear Ctrl-C on every system.
                while not wait(calls, 0.5, FIRST_EXCEPTION).done.issuperset(calls):
                    if failed := [one for one in calls if one.done() and one.exception()]:
                        failed[0].result()
                return [one.result() for one in calls]
            except BaseException as error:
                self.close()
                if isinstance(error, _DiedError):
                    raise InputError(
                        "starting workers: one ended before it had loaded the model. Is the "
                        "memory enough for all of them? See what it said above, or the system's "
                        "log; try fewer workers."
                    ) from None
                raise

    def close(self) -> None:
        """Ends all processes."""
        for one in self.processes:
            one.close()


def one_kind(devices: Sequence[str]) -> str:
    """The kind of device that all workers have.

    Raises:
        InputError: they have several.
    """
    if len({*devices}) > 1:
        raise InputError(
            f"starting workers: got devices of {len({*devices})} kinds "
            f"({', '.join(sorted({*devices}))}), expected one: they round differently. Choose "
            "workers of one kind."
        )
    return devices[0]
