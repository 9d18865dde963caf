"""The size of a run's batches, measured: the largest that fits, and is worth it."""

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from hooked_alm.errors import InputError

from .experiment import Experiment
from .run_folder import RunFolder
from .settings import ExperimentConfig
from .work import identified
from .worker import Brief, loaded, portable

MOST_SHARE = 0.8
"""Of the memory that is free once the model is loaded."""
LEAST_GAIN = 0.02
"""Share of a prompt's time that a batch of twice as many has to save."""
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may hold."""


@runtime_checkable
class TriesBatches(Protocol):
    """An experiment whose batches can be measured."""

    def try_batch(self, size: int) -> int:
        """Runs the heaviest batches of a size, leaves nothing; returns how large they were."""


def auto_batched(
    experiment: Experiment[Any],
    folder: RunFolder,
    *,
    environment: Mapping[str, str],
    n_workers: int = 1,
) -> ExperimentConfig:
    """An experiment's settings with the batches that its run has begun with, or the largest.

    They are measured by a process of its own, which then gives all memory back.

    Args:
        experiment: not yet identified.
        folder: of the run.
        environment: variables of a worker's environment, such as the GPUs that it sees.
        n_workers: see `largest_batch`.

    Raises:
        InputError: an experiment without batches, a batch size that was given, or what the
            experiment refuses itself.
    """
    config = experiment.config
    if not isinstance(experiment, TriesBatches):
        raise InputError(
            f"running {experiment.name} with --auto-batch: got an experiment that runs one prompt "
            "at a time. Leave --auto-batch out."
        )
    if "batch_size" in config.model_fields_set:
        raise InputError(
            f"running {experiment.name} with --auto-batch: got batch_size too, expected one of "
            "them. Leave one out."
        )
    begun = folder.provenance if folder.has("run.json") else {"config": {}}
    if "batch_size" in begun["config"]:
        size = begun["config"]["batch_size"]
    else:
        folder.check({})
        with tempfile.TemporaryDirectory() as scratch:
            identified(experiment, RunFolder(scratch))
            size = _asked(Brief.of(experiment), environment, n_workers)
    return config.model_copy(update={"batch_size": size})


def _asked(brief: Brief, environment: Mapping[str, str], n_workers: int) -> int:
    """What a process of its own finds to be the largest batch.

    Raises:
        Exception: what it raised.
    """
    process = subprocess.run(
        [sys.executable, "-P", "-m", __name__], input=pickle.dumps((brief, n_workers)),
        stdout=subprocess.PIPE, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    if not process.stdout:
        raise InputError(
            f"measuring the largest batch: the process ended with {process.returncode}, expected "
            "an answer; it may have been killed for want of memory. Set -s batch_size=... yourself."
        )
    is_answer, found = pickle.loads(process.stdout)
    if not is_answer:
        raise found
    return int(found)


def main() -> None:
    """Answers with the largest batch of the experiment that standard input holds, loaded here."""
    # What is printed on the way must not reach the answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    brief, n_workers = pickle.load(sys.stdin.buffer)
    answer: tuple[bool, Any]
    try:
        experiment = brief.read()
        loaded(experiment)
        answer = True, largest_batch(experiment, n_workers=n_workers)
    except BaseException as error:
        answer = False, portable(error)
    pickle.dump(answer, answers)
    answers.close()


def largest_batch(
    experiment: TriesBatches, *, n_workers: int = 1, say: Callable[[str], object] = print
) -> int:
    """The largest power of two that fits, of which each took less time a prompt than its half.

    Args:
        experiment: loaded.
        n_workers: that will share this memory.
        say: told of every size that was tried.

    Raises:
        InputError: not even single prompts fit.
    """
    memory, before, best, seconds = _Memory(n_workers), 0.0, 0, float("inf")
    for size in (2**power for power in count()):
        try:
            if not best:
                experiment.try_batch(1)  # whatever is made once is made now
            began = time.perf_counter()
            with memory.watched():
                n = experiment.try_batch(size)
            each = (time.perf_counter() - began) / n
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            say(f"batches of {size}: out of memory")
            break
        say(f"batches of {size}: {1000 * each:.0f} ms a prompt, {memory.share:.0%} of the memory")
        if n < size or each > (1 - LEAST_GAIN) * seconds:
            break
        best, seconds = size, each
        # As a line through the last two would go on.
        if memory.share + 2 * (memory.share - before) > MOST_SHARE:
            break
        before = memory.share
    if not best:
        raise InputError(
            "measuring the largest batch: got no memory for a single prompt. Set max_bytes lower, "
            "choose a smaller dtype, or give device_map."
        )
    say(f"batch_size={best}")
    return best


class _Memory:
    """What is free now, and the share of it that something took: of every GPU, or of this host."""

    def __init__(self, n_workers: int) -> None:
        self.n_gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
        self.share, self._process = 0.0, psutil.Process()
        self._held, self._free = self._now(), self._room(n_workers)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Takes the share of what runs meanwhile."""
        for gpu in range(self.n_gpus):
            torch.cuda.reset_peak_memory_stats(gpu)
        ended, most = threading.Event(), [self._now()]

        def watch() -> None:
            while not ended.wait(0.005):
                most.append([max(pair) for pair in zip(most.pop(), self._now(), strict=True)])

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
        peaks = [torch.cuda.max_memory_allocated(gpu) for gpu in range(self.n_gpus)] or most[0]
        taken = zip(peaks, self._held, self._free, strict=True)
        self.share = max((peak - held) / free for peak, held, free in taken)

    def _now(self) -> list[int]:
        gpus = range(self.n_gpus)
        return [torch.cuda.memory_allocated(gpu) for gpu in gpus] or [
            int(self._process.memory_info().rss)
        ]

    def _room(self, n_workers: int) -> list[int]:
        found = []
        for gpu in range(self.n_gpus):
            unused = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
            found.append(torch.cuda.mem_get_info(gpu)[0] + unused)
        return found or [host_room() // n_workers]


def host_room() -> int:
    """Bytes that this process may still take, by the host and by the container it is in."""
    room = int(psutil.virtual_memory().available)
    try:
        limit, held = (
            (CGROUP / f"memory.{name}").read_text("ascii") for name in ("max", "current")
        )
        return room if limit.strip() == "max" else min(room, int(limit) - int(held))
    except (OSError, ValueError):  # no container, or none that says so
        return room


if __name__ == "__main__":
    main()
