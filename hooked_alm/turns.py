"""One thread at a time on a model, and nothing left behind when a run is broken off."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

from .errors import InputError

PATIENCE_S = 10.0
"""How long a thread waits for another that keeps the model without running it."""
F = TypeVar("F", bound=Callable[..., Any])


class Turn:
    """A model's lock: the thread that has it may enter again, others wait until it leaves.

    Hooks, switches and the KV offset are the model's, so that a second run amid a first would read
    the first one's. A thread that keeps the model without running it, inside ``with model.hooks``,
    may be waiting for the very thread that waits for it, and is not waited for long.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._n_runs = 0
        """Runs under way in the thread that has the lock, each within the one before."""
        self._n_changes = 0
        """Runs that began or ended so far."""
        self.n_blocks = 0
        """Blocks ``with model.hooks`` that it is in; hooks of one are removed when it ends."""

    def __enter__(self) -> None:
        while True:
            n_changes = self._n_changes
            if self._lock.acquire(timeout=PATIENCE_S):
                return
            if not self._n_runs and n_changes == self._n_changes:
                raise InputError(
                    "using a model: another thread has kept it for "
                    f"{PATIENCE_S:g} s without running it, inside `with model.hooks(...)` or `with "
                    "model.turn`, expected it to be free. Leave that block before other threads "
                    "use the model, or load one for each thread."
                )

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        """A copy of a model, or a model that was pickled, has a lock of its own."""
        return Turn, ()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Held for a run, which ends by itself: others wait however long it takes."""
        with self:
            n_runs = self._n_runs
            self._n_runs, self._n_changes = n_runs + 1, self._n_changes + 1
            try:
                yield
            finally:
                self._n_runs, self._n_changes = n_runs, self._n_changes + 1


def in_turn(run: F) -> F:
    """A function of a model (its first argument) that runs it, while no other thread does."""

    @wraps(run)
    def alone(model: Any, *args: Any, **kwargs: Any) -> Any:
        with model.turn.running():
            return run(model, *args, **kwargs)

    return cast(F, alone)


@contextmanager
def restored(restore: Callable[[], Any]) -> Iterator[None]:
    """Calls ``restore`` at the end; once more if that was interrupted, so that it is done whole."""
    try:
        yield
    finally:
        try:
            restore()
        except BaseException:
            restore()
            raise
