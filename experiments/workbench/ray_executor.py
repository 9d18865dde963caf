"""Units of work measured by Ray: on this machine, or on a cluster.

A session of our own is seen by nobody else: it listens on the loopback device, asks for a token,
reports nothing, and keeps what it writes in a folder that ends with it.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import pickle
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from hooked_alm.errors import InputError, reason_of

from .executors import Workers, one_kind
from .experiment import Experiment, Unit
from .worker import Brief, Worker, wants_gpus

LOOPBACK = "127.0.0.1"
MOST_RESTARTS = 10
"""Of one worker."""
FOLDER, LOCK = "halm-ray-", "lock"
"""How names of sessions' folders begin; and the file in each that its driver holds."""
LONGEST_FOLDER = 40
"""Bytes: the names of sockets in a session's folder have 107, of which Ray takes the rest."""


class RayActors:
    """Workers that Ray starts, and starts again where they die."""

    def __init__(self, n_workers: int | None = None, address: str | None = None) -> None:
        """Checks that Ray is installed.

        Args:
            n_workers: number of actors; None is one for every GPU.
            address: of a cluster; None is a session of our own on this machine.

        Raises:
            InputError: it is not.
        """
        if importlib.util.find_spec("ray") is None:
            raise InputError(
                "running with --executor ray: got no package ray, expected it installed. "
                "pip install 'hooked_alm[scale]'"
            )
        self.n_workers, self.address = n_workers, address

    @contextlib.contextmanager
    def open(self, experiment: Experiment[Any]) -> Iterator["Workers"]:
        """Actors that have the experiment.

        Raises:
            InputError: no number of workers, or more than the cluster has room for.
        """
        is_verbose, n_threads = experiment.folder.is_verbose, experiment.config.n_threads
        with _session(self.n_workers, n_threads, self.address, is_verbose) as ray:
            nodes = [one["Resources"] for one in ray.nodes() if one["Alive"]]
            n, n_gpus = self._n_actors(nodes, wants_gpus(experiment.config), n_threads)
            options = {
                "num_cpus": n_threads, "num_gpus": n_gpus,
                "max_restarts": MOST_RESTARTS, "max_task_retries": -1,
            }  # fmt: skip
            brief = ray.put(Brief.of(experiment))
            actors = [ray.remote(**options)(Worker).remote() for _ in range(n)]
            try:
                yield _Actors(ray, brief, actors)
            finally:
                for actor in actors:
                    ray.kill(actor)

    def _n_actors(
        self, nodes: Sequence[dict[str, float]], wants_gpu: bool, n_threads: int
    ) -> tuple[int, int]:
        """How many actors there are to be, and GPUs of each; there is room for all of them."""
        n_gpus = sum(int(node.get("GPU", 0)) for node in nodes) if wants_gpu else 0
        n = self.n_workers or n_gpus
        if not n:
            raise InputError(
                "running with Ray: got no number of workers and no GPU to give one each, expected "
                "a number. Add --workers 2, or as many as the memory holds models."
            )
        each = n_gpus // n
        room = 0
        for node in nodes:
            fits = int(node.get("CPU", 0)) // n_threads
            room += min(fits, int(node.get("GPU", 0)) // each) if each else fits
        if room < n or (n_gpus and not each):
            raise InputError(
                f"running with Ray: got {n} workers of {n_threads} threads and {each} GPUs for "
                f"{len(nodes)} machines, expected room for all of them, of which there is for "
                f"{room}. Give another number of --workers, or of threads."
            )
        return n, each


class _Actors:
    def __init__(self, ray: Any, brief: Any, actors: Sequence[Any]) -> None:
        self.ray, self.brief, self.actors = ray, brief, actors
        self.device: str | None = None

    def load(self) -> str:
        """See `Workers.load`."""
        if self.device is None:
            self.device = one_kind(self._each(()))
        return self.device

    def work(self, units: Sequence[Unit]) -> None:
        """See `Workers.work`."""
        one_kind([self.load(), *self._each(units)])

    def _each(self, units: Sequence[Unit]) -> list[str]:
        """What the actors answer that live; those that die for good leave the work to them."""
        given = self.ray.put(pickle.dumps(units))
        left = [actor.answer.remote(self.brief, given) for actor in self.actors]
        found = []
        while left:
            ended, left = self.ray.wait(left, timeout=1.0)
            for one in ended:
                try:
                    is_answer, answer = self.ray.get(one)
                except self.ray.exceptions.RayActorError:
                    continue
                if not is_answer:
                    raise answer
                found.append(answer)
        if not found:
            raise InputError(
                f"running with Ray: all {len(self.actors)} workers died more than {MOST_RESTARTS} "
                "times, expected that one lives. Is the memory enough for them? Give fewer."
            )
        return found


@contextlib.contextmanager
def _session(
    n_workers: int | None, n_threads: int, address: str | None, is_verbose: bool
) -> Iterator[Any]:
    """Ray, joined to a cluster or with a session of our own."""
    ours: dict[str, Any] = {"address": address}
    with contextlib.ExitStack() as stack:
        environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        if address is None:
            folder = stack.enter_context(_session_folder(_short_folder()))
            (token := folder / "token").touch(mode=0o600)
            token.write_text(_token(), "utf-8")
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            # Ray takes the loopback device for a mistake unless it knows of one machine alone.
            environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            ours = {
                "address": "local", "include_dashboard": False, "_temp_dir": str(folder),
                "_node_ip_address": LOOPBACK,
            }  # fmt: skip
            if n_workers is not None:
                ours["num_cpus"] = n_workers * n_threads
        stack.enter_context(_environment(environment))
        ray: Any = importlib.import_module("ray")
        with _unreachable(address):
            ray.init(
                **ours,
                logging_level=logging.ERROR,
                log_to_driver=is_verbose,
                configure_logging=False,
            )
        stack.callback(ray.shutdown)
        if address is None and ray.util.get_node_ip_address() != LOOPBACK:
            raise InputError(
                "starting Ray on this machine: got a session that other machines can reach, "
                f"expected one at {LOOPBACK}. Ray was imported before: run from a program that "
                "does not import it, or give the --ray-address of a cluster."
            )
        yield ray


@contextlib.contextmanager
def _unreachable(address: str | None) -> Iterator[None]:
    """A cluster that does not answer, as an error of the user's."""
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "on this machine" if address is None else f"at {address}"
        raise InputError(
            f"starting Ray {where}: {reason_of(error)}. Check the address, `ray status`, or leave "
            "--ray-address out."
        ) from error


@cache
def _token() -> str:
    """The token of this process's sessions; Ray reads it once."""
    return secrets.token_hex(32)


def _short_folder() -> Path:
    """The system's place for temporary files, if names of sockets in it are not too long."""
    usual = tempfile.gettempdir()
    n_bytes = len(os.fsencode(usual)) + len(f"/{FOLDER}12345678")
    return Path(usual if n_bytes <= LONGEST_FOLDER else "/tmp")


@contextlib.contextmanager
def _session_folder(where: Path) -> Iterator[Path]:
    """A new folder, which ends with the block; those of drivers that were killed end before it."""
    for lock in where.glob(f"{FOLDER}*/{LOCK}"):
        with contextlib.suppress(OSError), lock.open("rb") as file:
            if os.fstat(file.fileno()).st_uid == os.getuid():
                _hold(file)
                shutil.rmtree(lock.parent, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=FOLDER, dir=where))
    try:
        with (path / "new").open("wb") as file:
            # Where nobody can hold a file, nobody removes the folder of another.
            with contextlib.suppress(OSError):
                _hold(file)
            # It has its name once it is held, lest another driver finds it without.
            (path / "new").rename(path / LOCK)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _hold(file: BinaryIO) -> None:
    """Hold a file, until it is closed or the process ends.

    Raises:
        OSError: another process holds it, or the file system has no locks.
    """
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of the environment, for this process and those that it starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
