"""A worker: loads an experiment by itself and measures the units that nobody else has claimed.

As a program it is asked over its standard input and answers over its standard output, a pickle
each; it ends with the process that started it.
"""

import contextlib
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hooked_alm.errors import HookedALMError, InputError

from .experiment import Experiment
from .files import refusals
from .identity import differences
from .own_file import load_file
from .provenance import environment, rounding
from .settings import ExperimentConfig
from .work import set_threads, work


@dataclass(frozen=True)
class Brief:
    """An identified experiment, as it travels to a worker."""

    location: Path | None
    """File of a user's own experiment, whose classes are known once it is loaded."""
    start: Path
    """Folder that relative paths begin in."""
    paths: tuple[str, ...]
    """Where Python looks for modules."""
    environment: dict[str, Any]
    """What decides numbers where the run was started."""
    experiment: bytes

    @classmethod
    def of(cls, experiment: Experiment[Any]) -> "Brief":
        """The brief of an experiment that has identified its inputs.

        Raises:
            InputError: one that no other process can find.
        """
        if type(experiment).__module__ == "__main__":
            raise InputError(
                f"sending {type(experiment).__name__} to workers: got a class of the program that "
                "was started, which they cannot import. Put it into a file of its own, and import "
                "it, or give the file to `hooked-alm run`."
            )
        paths = tuple(str(Path(one).absolute()) for one in sys.path)
        made_with = rounding(environment(experiment.location))
        return cls(experiment.location, Path.cwd(), paths, made_with, pickle.dumps(experiment))

    def read(self) -> Experiment[Any]:
        """The experiment, in this process, which from now on stands where the first one stood.

        Raises:
            InputError: its folder is not there on this machine, or other versions are.
        """
        with refusals(f"starting a worker in {self.start}"):
            os.chdir(self.start)
        sys.path += [path for path in self.paths if path not in sys.path]
        here = rounding(environment(self.location))
        if changed := differences(here, self.environment, old_is="where the run began"):
            raise InputError(
                f"starting a worker on {socket.gethostname()}: got a different "
                f"{', '.join(changed)}, expected the same versions on all machines. Install them "
                "there: the numbers would not be those of any one run."
            )
        if self.location is not None:
            load_file(self.location)
        experiment: Experiment[Any] = pickle.loads(self.experiment)
        return experiment


class Worker:
    """Measures units of one experiment; one that stands in for a dead one needs nothing of it."""

    def __init__(self) -> None:
        self.experiment: Experiment[Any] | None = None
        self.device = ""

    def answer(self, brief: Brief, units: bytes) -> tuple[bool, Any]:
        """True and the kind of device, once the units are done; or False and what was raised.

        Args:
            brief: of the experiment, in whose file the units' own classes may be.
            units: pickled; none loads the experiment alone.
        """
        try:
            if self.experiment is None:
                experiment = brief.read()
                self.device = loaded(experiment)
                self.experiment = experiment
            work(self.experiment, pickle.loads(units))
            return True, self.device
        except BaseException as error:
            return False, portable(error)


def loaded(experiment: Experiment[Any]) -> str:
    """The kind of device that an experiment computes on, once it is loaded."""
    set_threads(experiment.config.n_threads)
    experiment.load()
    return device_kind(experiment.config)


def wants_gpus(config: ExperimentConfig) -> bool:
    """Whether a run computes on GPUs, or on those that there are."""
    return config.device.startswith("cuda") or config.device_map is not None


def device_kind(config: ExperimentConfig) -> str:
    """What decides how a run rounds: the name of a GPU, or what a CPU's kernels are made for."""
    if wants_gpus(config) and torch.cuda.is_available():
        return torch.cuda.get_device_name(config.device if config.device_map is None else 0)
    kind = torch.device(config.device).type
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
    try:
        while True:
            requests.put(pickle.load(source))
    finally:
        # Whoever started it has ended, wants it to, or says what cannot be understood.
        os._exit(0)


def main() -> None:
    """Answers requests, a `Brief` with units each, until its input ends."""
    # What is printed on the way must not reach the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True)
    listener.start()
    worker = Worker()
    while True:
        pickle.dump(worker.answer(*requests.get()), answers)
        answers.flush()


if __name__ == "__main__":
    main()
