"""How far a run has come: a bar in a terminal, plain lines elsewhere."""

import os
import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts units; ``TQDM_DISABLE`` silences both forms.

    Plain lines come at most every `SECONDS_BETWEEN_LINES`, and one at the end.
    """

    def __init__(self, name: str, n: int, n_done: int, *, is_silent: bool = False) -> None:
        is_silent |= os.environ.get("TQDM_DISABLE", "0") not in {"", "0"}
        is_terminal = sys.stderr.isatty()
        self._lines = not is_terminal and not is_silent
        off = is_silent or not is_terminal
        self._bar = tqdm(total=n, initial=n_done, desc=name, unit="unit", disable=off)
        self._name, self._n, self._first, self._done = name, n, n_done, n_done
        self._began = self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.close()

    def update(self) -> None:
        """Counts one more unit."""
        self._bar.update()
        self._done += 1
        now = time.monotonic()
        is_due = now - self._said >= SECONDS_BETWEEN_LINES or self._done == self._n
        if self._lines and is_due:
            self._said = now
            each = (now - self._began) / (self._done - self._first)
            left = f"{each * (self._n - self._done):.0f} s left"
            print(
                f"{self._name}: {self._done} of {self._n} units, {each:.2g} s each, {left}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
