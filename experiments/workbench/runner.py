"""Runs an experiment into a run folder, from wherever an earlier run of it stopped."""

import hashlib
import random
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hooked_alm.errors import InputError

from . import provenance
from .conclude import conclude
from .experiment import Experiment, Unit, UnitResult
from .identity import fingerprint
from .inert import for_terminal
from .progress import Progress
from .render import render
from .run_folder import RunFolder
from .settings import ExperimentConfig

FILE_NAME_SAFE = re.compile(r"[\w+=@,-][\w+=@,.-]*")
LONGEST_ID = 240
"""Bytes: a unit's id and what is put around it name a file, and systems take 255."""
LONGEST_MODEL = 80
"""Characters of a model's name in the name of a run."""


def default_out(experiment: str, config: ExperimentConfig) -> Path:
    """``runs/{experiment}-{model}-{hash of the settings}``: the same command finds its own run."""
    settings = fingerprint(config.model_dump(mode="json"))
    model = re.sub(r"[^A-Za-z0-9._]+", "-", config.model.rstrip("/").split("/")[-1]).strip("-.")
    return Path("runs") / f"{experiment}-{model[:LONGEST_MODEL] or 'model'}-{settings[:8]}"


def opened(experiment: Experiment[Any], folder: RunFolder) -> tuple[dict[str, Any], Sequence[Unit]]:
    """What identifies the run's inputs, and its units; the experiment is then ready to measure."""
    experiment.folder = folder
    return experiment.open(), _checked(experiment.units())


def set_threads(n_threads: int | None) -> int:
    """Threads that torch computes with from now on; None leaves torch's own number."""
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    return torch.get_num_threads()


def run(
    experiment: Experiment[Any], out: Path | str | None = None, *, is_verbose: bool = False
) -> RunFolder:
    """Runs what is left to run, merges, concludes, and writes the report.

    Args:
        experiment: with its settings.
        out: the run's folder; `default_out` if none is given.
        is_verbose: say every event on stderr, in place of a bar.

    Raises:
        KeyboardInterrupt: after saying how to resume; finished units are kept.
    """
    config = experiment.config
    folder = RunFolder(out or default_out(experiment.name, config), is_verbose=is_verbose)
    identity = {
        "experiment": experiment.name,
        "schema_version": experiment.schema_version,
        "config": config.model_dump(mode="json"),
        # Sums depend on it, so a run keeps the number it began with.
        "n_threads": set_threads(config.n_threads),
    }
    # Before the model is loaded: that the folder is none of a run's, or in use.
    folder.check({})
    if folder.has("lock"):
        with folder.lock():
            pass
    inputs, units = opened(experiment, folder)
    with folder.lock():
        about = {key: identity[key] for key in ("config", "schema_version")} | {"inputs": inputs}
        made_with = {
            **identity,
            "question": experiment.question,
            "command": provenance.command_line(experiment.source(), config),
            "known_defects": experiment.known_defects(),
            "inputs": inputs,
            "environment": provenance.environment(experiment.location),
            "config_hash": fingerprint(about),
        }
        resumes = folder.start(made_with)
        _warn_of_defects(experiment.known_defects())
        if resumes:
            _warn_of_other_versions(folder, made_with["environment"])
        try:
            _measure_units(experiment, units, folder, "resume" if resumes else "start")
            if further := experiment.further_units(_merged(units, folder)):
                units = _checked([*units, *further])
                _measure_units(experiment, units, folder, "further")
            _finish(experiment, inputs, units, folder)
        except KeyboardInterrupt:
            folder.log("interrupted")
            _say_how_to_resume(experiment, folder)
            raise
    return folder


def _say_how_to_resume(experiment: Experiment[Any], folder: RunFolder) -> None:
    settings, out = shlex.quote(str(folder.path / "config.yaml")), shlex.quote(str(folder.path))
    resume = f"  hooked-alm run {shlex.quote(experiment.source())} --config {settings} --out {out}"
    print("\nStopped; finished units are kept. The same command resumes, as does:", file=sys.stderr)
    print(for_terminal(resume), file=sys.stderr)


def _checked(units: Sequence[Unit]) -> Sequence[Unit]:
    ids = [unit.id for unit in units]
    # Two names that differ in case only are one file on some systems.
    folded = [unit_id.casefold() for unit_id in ids]
    bad = {unit_id for unit_id in ids if not FILE_NAME_SAFE.fullmatch(unit_id)}
    bad |= {unit_id for unit_id in ids if len(unit_id.encode()) > LONGEST_ID}
    bad |= {unit_id for unit_id in ids if folded.count(unit_id.casefold()) > 1}
    if bad or not units:
        raise InputError(
            f"listing the units of work: got {sorted(bad) or 'none'}, expected unique ids of up to "
            f"{LONGEST_ID} bytes that can be file names. Rename the items or labels that they are "
            "made of, or change the experiment's units()."
        )
    late = [unit.id for n, unit in enumerate(units) if unit.after and unit.after not in ids[:n]]
    if late:
        raise InputError(
            f"ordering the units of work: got {', '.join(late)} before what they come after, "
            f"expected it earlier. Change the order of the experiment's units()."
        )
    return units


def _warn_of_defects(defects: dict[str, str]) -> None:
    if defects:
        lines = [f"{key}: {why}" for key, why in defects.items()]
        _warn("these settings have known defects", lines)


def _warn_of_other_versions(folder: RunFolder, environment: dict[str, Any]) -> None:
    before = folder.provenance["environment"]
    changed = [key for key in environment if environment[key] != before.get(key)]
    if changed:
        lines = [f"{key}: {before.get(key)} -> {environment[key]}" for key in changed]
        folder.log("other versions", changed=lines)
        _warn("this run began with other versions", lines)


def _warn(of: str, lines: Sequence[str]) -> None:
    print(f"Warning: {of}:", *map(for_terminal, lines), sep="\n  ", file=sys.stderr)


def _measure_units(
    experiment: Experiment[Any], units: Sequence[Unit], folder: RunFolder, event: str
) -> None:
    left, damaged = [], []
    for unit in units:
        if not folder.is_done(unit.id):
            left.append(unit)
            continue
        try:
            folder.read_unit(unit.id)  # a damaged one is better found before the work than after
        except InputError as error:
            damaged.append(str(error))
    if damaged:
        raise InputError("\n  ".join(damaged))
    n_done = len(units) - len(left)
    folder.log(event, units=len(units), done=n_done)
    with Progress(experiment.name, len(units), n_done, is_silent=folder.is_verbose) as progress:
        for unit in left:
            _measure(experiment, unit, folder)
            progress.update()


def measured(experiment: Experiment[Any], unit: Unit) -> UnitResult:
    """The result of a unit, with a seed of its own."""
    seed_everything(experiment.config.seed, unit.id)
    return experiment.measure(unit)


def _measure(experiment: Experiment[Any], unit: Unit, folder: RunFolder) -> None:
    began = time.perf_counter()
    try:
        result = measured(experiment, unit)
        if strange := {*result.tables} - {*experiment.tables}:
            raise InputError(
                f"measuring {unit.id}: got rows of {', '.join(sorted(strange))}, expected tables "
                f"that the experiment declares: {', '.join(experiment.tables)}. Add it to `tables`."
            )
    except Exception as error:
        folder.log("failed", unit=unit.id, error=str(error))
        error.add_note(f"This happened in unit {unit.id}; finished units are kept.")
        raise
    folder.write_unit(unit.id, result.tables, result.record)
    folder.log("unit", unit=unit.id, seconds=round(time.perf_counter() - began, 3))


def seed_everything(seed: int, unit_id: str) -> None:
    """A seed of its own for each unit, so that results do not depend on what ran before."""
    digest = hashlib.sha256(f"{seed}/{unit_id}".encode()).digest()
    value = int.from_bytes(digest[:4], "big")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


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
