"""Logs of how neurons are active for classes of items, kept in files of a run's folder."""

from functools import reduce

import torch

from hooked_alm.methods.neurons.activity import ActivityLog

from ..workbench.results import Row
from ..workbench.run_folder import RunFolder
from .kept_features import FeatureFiles, arrays_sha256, kept_arrays

LOGS = {"logs": "a file with what neurons of some items did, and its hash"}
"""The table of what `keep_log` kept."""


def keep_log(folder: RunFolder, unit_id: str, log: ActivityLog) -> Row:
    """Keeps a unit's log in ``arrays``; returns where, as a row of a table."""
    folder.write_arrays(unit_id, {name: value.numpy() for name, value in log.arrays.items()})
    return {
        "file": unit_id, "sha256": arrays_sha256(folder, unit_id),
        "n_items": int(log.items.sum()), "n_rows": int(log.rows.sum()),
    }  # fmt: skip


def read_logs(folder: RunFolder, files: FeatureFiles) -> ActivityLog:
    """The logs of all units together, in their order.

    Raises:
        InputError: a file that is not as its unit left it.
    """
    parts = (
        ActivityLog(**{name: torch.from_numpy(value) for name, value in arrays.items()})
        for arrays in kept_arrays(folder, files)
    )

    def both(log: ActivityLog, other: ActivityLog) -> ActivityLog:
        log.merge(other)
        return log

    return reduce(both, parts)
