"""Runs of an experiment on the models that its truths are about."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooked_alm.bundled import PREFIX

from . import runner
from .experiment import Experiment
from .truths import TruthRow, compared


def run_truths(
    kind: type[Experiment[Any]], out: Path, settings: Mapping[str, Any] | None = None
) -> list[TruthRow]:
    """Runs an experiment on every model that its truths are about, and compares.

    Args:
        kind: the experiment.
        out: folder of the runs, a folder for every model; finished ones are found again.
        settings: in place of those that it has for its truths.
    """
    models = dict.fromkeys(model for truth in kind.truths for model in truth.known)
    given = kind.truth_settings if settings is None else settings
    folders = {
        model: runner.run(kind(kind.Config(model=PREFIX + model, **given)), out / model)
        for model in models
    }
    return [*compared(kind.truths, folders)]
