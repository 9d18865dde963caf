"""Perturbations of clips, and what they move, kept in files of a run and read by later units."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hooked_alm.methods.robustness.choices import packed, unpacked
from hooked_alm.methods.robustness.sensitivity import SensitivityLog

from ..workbench.results import Row
from ..workbench.run_folder import RunFolder
from .attacks import AttackedClip, Wave
from .kept_features import FeatureFiles, arrays_sha256, kept_arrays

KEPT = {"kept": "a file with perturbations and logs of some clips, and its hash"}
"""The table of what `keep_attacks` kept."""
DELTA = "delta/"
"""Begins the name of a clip's perturbation in a file; others are logs of places."""


def keep_attacks(
    folder: RunFolder,
    unit_id: str,
    deltas: Mapping[str, Wave],
    logs: Mapping[str, SensitivityLog],
) -> Row:
    """Keeps perturbations by clip, and logs by place, in ``arrays``; returns where, as a row."""
    arrays = {f"{DELTA}{clip}": np.asarray(delta) for clip, delta in deltas.items()}
    arrays |= {name: value.numpy() for name, value in packed(logs).items()}
    folder.write_arrays(unit_id, arrays)
    return {"file": unit_id, "sha256": arrays_sha256(folder, unit_id)}


def kept_deltas(
    folder: RunFolder, files: FeatureFiles, clips: Sequence[AttackedClip]
) -> list[Wave]:
    """The perturbations of some clips.

    Raises:
        InputError: a file that is not as its unit left it.
    """
    names, found = [f"{DELTA}{one.recording.name}" for one in clips], dict[str, Wave]()
    for arrays in kept_arrays(folder, files):
        found |= {name: arrays[name] for name in names if name in arrays}
    return [found[name] for name in names]


def kept_logs(folder: RunFolder, files: FeatureFiles) -> dict[str, SensitivityLog]:
    """The logs of every place, of all files together.

    Raises:
        InputError: a file that is not as its unit left it.
    """
    return unpacked(
        {k: torch.from_numpy(v) for k, v in arrays.items() if not k.startswith(DELTA)}
        for arrays in kept_arrays(folder, files)
    )
