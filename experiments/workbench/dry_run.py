"""What a run would take: its units by kind, and the first of each kind, timed and thrown away."""

import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from .experiment import Experiment, Unit
from .run_folder import RunFolder
from .work import Part, identified, measured, share
from .worker import loaded


def dry_run(experiment: Experiment[Any], out: RunFolder, part: Part | None = None) -> Iterator[str]:
    """Lines that say how many units are left, how long they may take, and what memory they need.

    Model and inputs are loaded, and refused, as by the run. What units leave in the folder goes
    into a temporary one.

    Raises:
        InputError: what the run would be refused for before its first unit.
    """
    out.check({})
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        _, units = identified(experiment, RunFolder(scratch))
        loaded(experiment)
        yield f"{experiment.source()}: opened in {time.perf_counter() - began:.1f} s"
        kinds: dict[str, list[Unit]] = {}
        for unit in share(units, part):
            kinds.setdefault(unit.id.partition("__")[0], []).append(unit)
        if len(kinds) > 20:  # the ids begin with the items' names
            kinds = {"all": share(units, part)}
        total, unknown = 0.0, []
        for kind, some in kinds.items():
            left = [unit for unit in some if not out.is_done(unit.id)]
            text = f"  {kind}: {len(some)} units, {len(left)} of them to do"
            if left and left[0].after is None:
                began = time.perf_counter()
                measured(experiment, left[0])
                seconds = time.perf_counter() - began
                total += seconds * len(left)
                text += f"; the first took {seconds:.2f} s, all may take {seconds * len(left):.0f}"
            elif left:
                unknown.append(kind)
            yield text
        yield f"about {total:.0f} s, taking every unit of a kind for as long as its first"
    if unknown:
        yield f"not counted in it: {', '.join(unknown)}, which go on from other units' results"
    if type(experiment).further_units is not Experiment.further_units:
        yield "not counted in it: units that the results of these decide"
    yield from _memory()
    yield f"{out.path} was not written to"


def _memory() -> Iterator[str]:
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; on macOS bytes
        gib = peak / 2 ** (30 if sys.platform == "darwin" else 20)
        yield f"peak memory of this process, with the model and these units: {gib:.1f} GiB"
    if torch.cuda.is_available() and (most := torch.cuda.max_memory_allocated()):
        yield f"peak memory on the GPU: {most / 2**30:.1f} GiB"
