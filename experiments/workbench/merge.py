"""Shards of a run, brought together: the units of several folders in one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hooked_alm.errors import InputError

from .experiment import Experiment
from .identity import differences
from .provenance import rounding
from .run_folder import IDENTITY, RunFolder


def check_shards(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """What is known of the run that all folders are shards of: one's ``run.json``.

    Raises:
        InputError: folders of several runs, or made with other versions or kinds of devices.
    """
    if not runs or len({one.path.resolve() for one in runs}) < len(runs):
        raise InputError(
            f"merging runs: got {', '.join(str(one.path) for one in runs) or 'none'}, expected "
            "the folders of all shards, each once."
        )
    every = [(one, one.provenance) for one in runs]
    # One that had nothing to measure has loaded nothing, and knows no device.
    first, *others = sorted(every, key=lambda one: one[1]["environment"].get("device") is None)
    for run, found in others:
        compared = [_identity(about) for about in (found, first[1])]
        if compared[0]["environment"]["device"] is None:
            compared[0]["environment"]["device"] = compared[1]["environment"]["device"]
        if changed := differences(*compared):
            raise InputError(
                f"merging {run.path} with {first[0].path}: got a different {', '.join(changed)}, "
                "expected shards of one run, made with the same versions on devices of one kind. "
                "Make them so: their numbers would not be those of any one run."
            )
    return first[1]


def _identity(about: dict[str, Any]) -> dict[str, Any]:
    identity = {key: about.get(key) for key in IDENTITY}
    return {**identity, "environment": rounding(about["environment"])}


def merge(experiment: Experiment[Any], runs: Sequence[RunFolder], out: RunFolder) -> None:
    """Copies into a run's folder what the shards have measured.

    ``runner.run`` of the same folder then goes on from there: to the report, or with what is left.

    Args:
        experiment: of the run, with its settings.
        runs: folders of the shards.
        out: a new folder, or one that holds a part of the same run.

    Raises:
        InputError: see `check_shards`; a damaged unit, or two shards that have different results
            of one unit.
    """
    about = check_shards(runs)
    units = [(run, unit_id) for run in runs for unit_id in sorted(run.done())]
    made: dict[str, Path] = {}
    for run, unit_id in units:
        run.read_unit(unit_id)
        _claim_name(made, f"units/{unit_id}.json", run)
    for folder in experiment.leaves:
        for run in runs:
            for path in sorted((run.path / folder).rglob("*")):
                if path.is_file() and path.name[0] != ".":
                    _claim_name(made, path.relative_to(run.path).as_posix(), run)
    out.check({key: about.get(key) for key in IDENTITY})
    with out.lock():
        out.start(about)
        # Units last: what they say is done has left its files.
        for name in sorted(made, key=lambda one: one.startswith("units/")):
            out.write(name, RunFolder(made[name]).read(name))
        out.log("merged", runs=[str(one.path) for one in runs], units=len(out.done()))


def _claim_name(made: dict[str, Path], name: str, run: RunFolder) -> None:
    earlier = made.setdefault(name, run.path)
    if earlier != run.path and RunFolder(earlier).read(name) != run.read(name):
        raise InputError(
            f"merging {run.path}: its {name} differs from that of {earlier}, expected the same "
            "result, or one of it. Delete the wrong one; its unit is then redone."
        )
