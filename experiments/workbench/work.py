"""Units of work, measured: by one process, or by several that share a run folder."""

import hashlib
import os
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hooked_alm.errors import InputError

from .experiment import Experiment, Unit, UnitResult
from .run_folder import RunFolder

FILE_NAME_SAFE = re.compile(r"[\w+=@,-][\w+=@,.-]*")
LONGEST_ID = 240
"""Bytes: a unit's id and what is put around it name a file, and systems take 255."""
SECONDS_BETWEEN_TRIES = 0.1
"""For a unit that another worker has, or that waits for the result of one."""
Part = tuple[int, int]
"""Part i of n, counted from one."""
NO_PART: Part = (0, 1)
"""None of the units: a run whose units are all done concludes, any other stays as it is."""


def identified(
    experiment: Experiment[Any], folder: RunFolder
) -> tuple[dict[str, Any], Sequence[Unit]]:
    """What identifies the run's inputs, and its units."""
    experiment.folder = folder
    return experiment.identify(), checked(experiment.units())


def checked(units: Sequence[Unit]) -> Sequence[Unit]:
    """The units, whose ids can be names of files and which come after what they go on from.

    Raises:
        InputError: they do not.
    """
    ids = [unit.id for unit in units]
    # Two names that differ in case only are one file on some systems.
    count = Counter(unit_id.casefold() for unit_id in ids)
    bad = {unit_id for unit_id in ids if not FILE_NAME_SAFE.fullmatch(unit_id)}
    bad |= {unit_id for unit_id in ids if len(unit_id.encode()) > LONGEST_ID}
    bad |= {unit_id for unit_id in ids if count[unit_id.casefold()] > 1}
    if bad or not units:
        raise InputError(
            f"listing the units of work: got {sorted(bad)[:20] or 'none'}, expected unique ids of "
            f"up to {LONGEST_ID} bytes that can be file names. Rename the items or labels that "
            "they are made of, or change the experiment's units()."
        )
    before: set[str] = set()
    for unit in units:
        if unit.after and unit.after not in before:
            raise InputError(
                f"ordering the units of work: got {unit.id} before what it comes after "
                f"({unit.after}), expected it later. Change the order of the experiment's units()."
            )
        before.add(unit.id)
    return units


def share(units: Sequence[Unit], shard: Part | None) -> list[Unit]:
    """The units of one part; those that go on from each other stay together."""
    if shard is None:
        return list(units)
    number, n = shard
    part: dict[str, int] = {}
    n_chains = 0
    for unit in units:
        if unit.after in part:
            part[unit.id] = part[unit.after]
        else:
            part[unit.id], n_chains = n_chains % n + 1, n_chains + 1
    return [unit for unit in units if part[unit.id] == number]


def set_threads(n_threads: int) -> None:
    """Sets how many threads this process computes with: torch's, and those of numpy and scipy."""
    # Its own BLAS is limited only where it is loaded already.
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(n_threads)
    threadpool_limits(n_threads)


def seed_everything(seed: int, name: str) -> None:
    """Seeds Python, numpy and torch from a seed and a name, the same in every process."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    value = int.from_bytes(digest[:4], "big")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def rng_of(seed: int, *names: str) -> np.random.Generator:
    """Draws that depend on a seed and some names alone, whatever else is run."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def measured(experiment: Experiment[Any], unit: Unit) -> UnitResult:
    """The result of a unit, with a seed of its own."""
    seed_everything(experiment.config.seed, unit.id)
    return experiment.measure(unit)


def work(experiment: Experiment[Any], units: Sequence[Unit]) -> None:
    """Measures units until all are done, each that no other worker has claimed.

    Raises:
        Exception: what a unit raised, with a note that names it.
    """
    folder, left = experiment.folder, list(units)
    while left:
        waiting = []
        for unit in left:
            if unit.after is not None and not folder.is_done(unit.after):
                waiting.append(unit)
                continue
            with folder.claim(unit.id) as is_ours:
                if is_ours:
                    _measure(experiment, unit)
                elif not folder.is_done(unit.id):
                    waiting.append(unit)
        if len(waiting) == len(left):
            time.sleep(SECONDS_BETWEEN_TRIES)
        left = waiting


def _measure(experiment: Experiment[Any], unit: Unit) -> None:
    folder, began = experiment.folder, time.perf_counter()
    try:
        result = measured(experiment, unit)
        if strange := {*result.tables} - {*experiment.tables}:
            raise InputError(
                f"measuring {unit.id}: got rows of {', '.join(sorted(strange))}, expected tables "
                f"that the experiment declares: {', '.join(experiment.tables)}. Add it to `tables`."
            )
        folder.write_unit(unit.id, result.tables, result.record)
    except Exception as error:
        folder.log("failed", unit=unit.id, error=str(error))
        error.add_note(f"This happened in unit {unit.id}; finished units are kept.")
        raise
    seconds, worker = round(time.perf_counter() - began, 3), f"{socket.gethostname()}:{os.getpid()}"
    folder.log("unit", unit=unit.id, seconds=seconds, worker=worker)
