"""How far a run has come: a bar in a terminal, plain lines elsewhere, and events of the run."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Collection
from types import TracebackType

import psutil
from tqdm.auto import tqdm

from .inert import for_terminal
from .run_folder import RunFolder

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 0.5
"""At the run's folder, for the bar."""


class Progress:
    """Watches a run's folder while units are measured, by whomever.

    ``TQDM_DISABLE`` silences bar and lines. Lines come every `SECONDS_BETWEEN_LINES`, with one at
    the end; the same goes into ``events.jsonl``.
    """

    def __init__(self, name: str, ids: Collection[str], folder: RunFolder) -> None:
        is_silent = folder.is_verbose or os.environ.get("TQDM_DISABLE", "0") not in {"", "0"}
        is_terminal = sys.stderr.isatty()
        self._has_lines = not is_terminal and not is_silent
        self._name, self._ids, self._folder = name, {*ids}, folder
        self._first = self._n_done()
        off = is_silent or not is_terminal
        n = len(self._ids)
        self._bar = tqdm(total=n, initial=self._first, desc=name, unit="unit", disable=off)
        self._began = time.monotonic()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _: BaseException | None,
        __: TracebackType | None,
    ) -> None:
        self._ends.set()
        self._thread.join()
        self._look()
        self._bar.close()
        if kind is None:
            self._say()

    def _n_done(self) -> int:
        return len(self._folder.done() & self._ids)

    def _watch(self) -> None:
        said = time.monotonic()
        while not self._ends.wait(SECONDS_BETWEEN_LOOKS):
            if not self._bar.disable:
                self._look()
            if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                self._say()

    def _look(self) -> None:
        self._bar.update(self._n_done() - self._bar.n)

    def _say(self) -> None:
        n_done, n = self._n_done(), len(self._ids)
        seconds = time.monotonic() - self._began
        rate = max(0, n_done - self._first) / seconds
        left = (n - n_done) / rate if rate else None
        mebibytes = memory_bytes() >> 20
        # What a verbose folder is told, it says.
        RunFolder(self._folder.path).log(
            "progress", done=n_done, units=n, units_per_second=round(rate, 4),
            seconds_left=None if left is None else round(left), memory_mib=mebibytes,
        )  # fmt: skip
        if self._has_lines:
            line = progress_line(n_done, n, rate, left, mebibytes)
            print(for_terminal(f"{self._name}: {line}"), file=sys.stderr, flush=True)


def progress_line(
    n_done: int, n: int, rate: float, seconds_left: float | None, mebibytes: int
) -> str:
    """How far a run has come, for people."""
    speed = f"{rate:.3g} a second" if rate >= 1 else f"{1 / rate:.3g} s each" if rate else "none"
    left = "unknown time" if seconds_left is None else duration(seconds_left)
    return f"{n_done} of {n} units, {speed}, {left} left, {mebibytes / 1024:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to two digits of the next smaller unit."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def memory_bytes() -> int:
    """What this process and those that it started hold in memory now."""
    total, own = 0, psutil.Process()
    every = [own]
    # A process may end while it is looked at.
    with contextlib.suppress(psutil.Error):
        every += own.children(recursive=True)
    for one in every:
        with contextlib.suppress(psutil.Error):
            total += one.memory_info().rss
    return total
