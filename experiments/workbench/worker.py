"""A worker: loads an experiment by itself and measures the units that nobody else has claimed.

As a program it is asked over its standard input and answers over its standard output, a pickle
each; it ends with the process that started it.
"""

import contextlib
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hooked_alm.errors import HookedALMError

from ..registry import load_experiment
from .experiment import Experiment, Unit
from .run_folder import RunFolder
from .work import set_threads, work


@dataclass(frozen=True)
class Brief:
    """An identified experiment, as it travels to a worker."""

    location: Path | None
    """File of a user's own experiment, whose classes are known once it is loaded."""
    paths: tuple[str, ...]
    """Where Python looks for modules."""
    experiment: bytes

    @classmethod
    def of(cls, experiment: Experiment[Any]) -> "Brief":
        """The brief of an experiment that has identified its inputs."""
        folder = experiment.folder
        # Another process may stand elsewhere.
        there = RunFolder(folder.path.absolute(), is_verbose=folder.is_verbose)
        experiment.folder = there
        try:
            pickled = pickle.dumps(experiment)
        finally:
            experiment.folder = folder
        location = experiment.location and experiment.location.absolute()
        return cls(location, tuple(str(Path(one).absolute()) for one in sys.path), pickled)

    def read(self) -> Experiment[Any]:
        """The experiment, in this process."""
        sys.path += [path for path in self.paths if path not in sys.path]
        if self.location is not None:
            load_experiment(str(self.location))
        experiment: Experiment[Any] = pickle.loads(self.experiment)
        return experiment


class Worker:
    """Measures units of one experiment; in whatever process it is made."""

    def __init__(self, brief: Brief) -> None:
        self.experiment = brief.read()
        self.device: str | None = None

    def load(self) -> str:
        """Loads the experiment, once; the kind of device that it computes on."""
        if self.device is None:
            self.device = loaded(self.experiment)
        return self.device

    def work(self, units: Sequence[Unit]) -> None:
        """Measures units until all of them are done; see `work.work`."""
        self.load()
        work(self.experiment, units)


def loaded(experiment: Experiment[Any]) -> str:
    """The kind of device that an experiment computes on, once it is loaded."""
    set_threads(experiment.config.n_threads)
    experiment.load()
    return device_kind(experiment.config.device)


def device_kind(device: str) -> str:
    """What decides how a device rounds: the name of a GPU, or what a CPU's kernels are made for."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    return kind if kind != "cpu" else f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def portable(error: BaseException) -> BaseException:
    """An error that another process can raise, with where it happened unless that is the user's."""
    if not isinstance(error, HookedALMError):
        error.add_note("".join(traceback.format_exception(error)))
    with contextlib.suppress(Exception):
        if type(copy := pickle.loads(pickle.dumps(error))) is type(error):
            return copy
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    plain.__notes__ = getattr(error, "__notes__", [])
    return plain


def _listen(source: BinaryIO, requests: "queue.SimpleQueue[Any]") -> None:
    while True:
        try:
            requests.put(pickle.load(source))
        except (EOFError, pickle.UnpicklingError):
            # Whoever started it has ended, or wants it to.
            os._exit(0)


def main() -> None:
    """Answers requests until its input ends: a `Brief`, then names of methods with arguments."""
    # What is printed on the way must not reach the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True)
    listener.start()
    worker: Worker | None = None
    while True:
        request = requests.get()
        answer: tuple[bool, Any]
        try:
            if worker is None:
                worker, answer = Worker(request), (True, None)
            else:
                name, *arguments = request
                answer = True, getattr(worker, name)(*arguments)
        except BaseException as error:
            answer = False, portable(error)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
