"""Runs an experiment into a run folder, from wherever an earlier run of it stopped."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_alm.errors import InputError

from . import provenance
from .conclude import conclude
from .executors import Executor, InProcess, Workers
from .experiment import Experiment, Unit
from .identity import fingerprint
from .inert import for_terminal
from .progress import Progress
from .render import render
from .run_folder import RunFolder
from .settings import ExperimentConfig
from .work import Part, checked, identified, seed_everything, set_threads, share

LONGEST_MODEL = 80
"""Characters of a model's name in the name of a run."""


def default_out(experiment: str, config: ExperimentConfig, shard: Part | None = None) -> Path:
    """``runs/{experiment}-{model}-{hash of the settings}``: the same command finds its own run.

    A shard has a folder of its own, ``...-{i}-of-{n}``.
    """
    settings = fingerprint(config.model_dump(mode="json"))
    model = re.sub(r"[^A-Za-z0-9._]+", "-", config.subject.rstrip("/").split("/")[-1]).strip("-.")
    name = f"{experiment}-{model[:LONGEST_MODEL] or 'model'}-{settings[:8]}"
    return Path("runs") / (name if shard is None else f"{name}-{shard[0]}-of-{shard[1]}")


def run(
    experiment: Experiment[Any],
    out: Path | str | None = None,
    *,
    executor: Executor | None = None,
    shard: Part | None = None,
    is_verbose: bool = False,
) -> RunFolder:
    """Runs what is left to run, merges, concludes, and writes the report.

    Args:
        experiment: with its settings.
        out: the run's folder; `default_out` if none is given.
        executor: where units are measured; None is this process.
        shard: measure this part of the units alone; the run ends there unless all are done.
        is_verbose: say every event on stderr, in place of a bar.

    Raises:
        KeyboardInterrupt: after saying how to resume; finished units are kept.
    """
    config = experiment.config
    folder = RunFolder(out or default_out(experiment.name, config, shard), is_verbose=is_verbose)
    # Before anything is read: that the folder is none of a run's, or in use.
    folder.check({})
    if folder.is_locked():
        with folder.lock():
            pass
    set_threads(config.n_threads)
    inputs, units = identified(experiment, folder)
    made_with = {
        "experiment": experiment.name,
        "source": experiment.source(),
        "schema_version": experiment.schema_version,
        "config": config.model_dump(mode="json"),
        "inputs": inputs,
    }
    folder.check(made_with)
    with (executor or InProcess()).open(experiment) as workers:
        # What cannot be loaded is refused before anything is written.
        device = None if _are_done(share(units, shard), folder) else workers.load()
        with folder.lock():
            _start(experiment, folder, made_with, device)
            try:
                if all_units := _measured(workers, experiment, units, shard, folder):
                    _finish(experiment, inputs, all_units, folder)
                else:
                    folder.log("shard done")
            except KeyboardInterrupt:
                folder.log("interrupted")
                _say_how_to_resume(experiment, folder, shard)
                raise
    return folder


def _start(
    experiment: Experiment[Any], folder: RunFolder, made_with: dict[str, Any], device: str | None
) -> None:
    about = {key: made_with[key] for key in ("config", "schema_version", "inputs")}
    _check_device(folder, device)
    environment = provenance.environment(experiment.location) | {"device": device}
    resumes = folder.start(
        {
            **made_with,
            "question": experiment.question,
            "command": provenance.command_line(experiment.source(), experiment.config),
            "known_defects": experiment.known_defects(),
            "environment": environment,
            "config_hash": fingerprint(about),
        }
    )
    _warn_of_defects(experiment.known_defects())
    if resumes:
        _warn_of_other_versions(folder, environment)
    folder.log("resume" if resumes else "start", done=len(folder.done()))


def _check_device(folder: RunFolder, device: str | None) -> None:
    """Refuse to go on where numbers are rounded otherwise than in what is done."""
    before = folder.provenance["environment"].get("device") if folder.has("run.json") else None
    if None not in (before, device) and before != device:
        raise InputError(
            f"resuming the run in {folder.path}: got {device} to compute on, expected {before}, on "
            "which it began: they round differently. Go on there, or choose another --out."
        )


def _measured(
    workers: Workers,
    experiment: Experiment[Any],
    units: Sequence[Unit],
    shard: Part | None,
    folder: RunFolder,
) -> Sequence[Unit]:
    """All units, measured; none if other shards have some left."""
    folder.forget_claims()
    _measure(workers, experiment, share(units, shard), folder)
    if not _are_done(units, folder):
        return ()
    if further := experiment.further_units(_merged(units, folder)):
        units = checked([*units, *further])
        _measure(workers, experiment, share(further, shard), folder)
    return units if _are_done(units, folder) else ()


def _measure(
    workers: Workers, experiment: Experiment[Any], units: Sequence[Unit], folder: RunFolder
) -> None:
    """Measures those units that have no result yet.

    Raises:
        InputError: results that are damaged; better found before the work than after.
    """
    left, damaged, done = [], [], folder.done()
    for unit in units:
        if unit.id not in done:
            left.append(unit)
            continue
        try:
            folder.read_unit(unit.id)
        except InputError as error:
            damaged.append(str(error))
    if damaged:
        raise InputError("\n  ".join(damaged))
    if left:
        with Progress(experiment.name, [unit.id for unit in units], folder):
            workers.load()
            workers.work(left)


def _are_done(units: Sequence[Unit], folder: RunFolder) -> bool:
    return folder.done().issuperset(unit.id for unit in units)


def _say_how_to_resume(experiment: Experiment[Any], folder: RunFolder, shard: Part | None) -> None:
    settings, out = shlex.quote(str(folder.path / "config.yaml")), shlex.quote(str(folder.path))
    resume = f"  hooked-alm run {shlex.quote(experiment.source())} --config {settings} --out {out}"
    resume += "" if shard is None else f" --shard {shard[0]}/{shard[1]}"
    print("\nStopped; finished units are kept. The same command resumes, as does:", file=sys.stderr)
    print(for_terminal(resume), file=sys.stderr)


def _warn_of_defects(defects: dict[str, str]) -> None:
    if defects:
        lines = [f"{key}: {why}" for key, why in defects.items()]
        _warn("these settings have known defects", lines)


def _warn_of_other_versions(folder: RunFolder, environment: dict[str, Any]) -> None:
    before = folder.provenance["environment"]
    known = {key: one for key, one in environment.items() if one is not None or key != "device"}
    changed = [key for key in known if known[key] != before.get(key)]
    if changed:
        lines = [f"{key}: {before.get(key)} -> {environment[key]}" for key in changed]
        folder.log("other versions", changed=lines)
        _warn("this run began with other versions", lines)


def _warn(of: str, lines: Sequence[str]) -> None:
    print(f"Warning: {of}:", *map(for_terminal, lines), sep="\n  ", file=sys.stderr)


def _merged(units: Sequence[Unit], folder: RunFolder) -> dict[str, pd.DataFrame]:
    # Always from the shards, in the order of units(): a resumed run ends with the same bytes.
    rows: dict[str, list[dict[str, Any]]] = {}
    for unit in units:
        for name, found in folder.read_unit(unit.id)["tables"].items():
            rows.setdefault(name, []).extend(found)
    return {name: pd.DataFrame(found) for name, found in rows.items()}


def _finish(
    experiment: Experiment[Any], inputs: dict[str, Any], units: Sequence[Unit], folder: RunFolder
) -> None:
    tables = _merged(units, folder)
    for name, table in tables.items():
        folder.write_table(name, table)
    seed_everything(experiment.config.seed, "conclude")
    conclude(experiment, inputs, tables, folder)
    render(folder)
    folder.log("done")
