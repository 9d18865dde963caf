"""Features of clips, kept in files of a run's folder, and read again by later units."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32
from safetensors.numpy import load_file

from hooked_alm.errors import InputError

from ..workbench.experiment import UnitResult
from ..workbench.identity import file_sha256
from ..workbench.results import Row
from ..workbench.run_folder import RunFolder

FEATURES = {"features": "a file with features of some clips, and its hash"}
"""The table of what `keep_features` kept."""
FeatureSource = Literal["model", "untrained", "baseline"]
ClipFeatures = Mapping[str, Float32[np.ndarray, " feature"]]
"""What is known of a clip, by the name of a point or of a baseline."""
Features = Float[np.ndarray, "item feature"]
FeatureFiles = tuple[tuple[str, str], ...]
"""Units that kept features, in the order of the clips, each with the hash of its file."""


def keep_features(
    folder: RunFolder, unit_id: str, source: FeatureSource, clips: Sequence[ClipFeatures]
) -> UnitResult:
    """Keeps the features of some clips in ``arrays``; returns where, as a row of a table."""
    folder.write_arrays(
        unit_id, {name: np.stack([one[name] for one in clips]) for name in clips[0]}
    )
    sha256 = arrays_sha256(folder, unit_id)
    row: Row = {"file": unit_id, "source": source, "n_clips": len(clips), "sha256": sha256}
    return UnitResult({"features": [row]})


def files_of(features: pd.DataFrame) -> FeatureFiles:
    """The files that rows of that table name."""
    return tuple(zip(features.file, features.sha256, strict=True))


def kept_features(
    folder: RunFolder, name: str, files: FeatureFiles
) -> Float32[np.ndarray, "clip feature"]:
    """A point's features of all clips.

    Raises:
        InputError: a file that is not as its unit left it.
    """
    return np.concatenate([one[name] for one in kept_arrays(folder, files)])


def kept_arrays(folder: RunFolder, files: FeatureFiles) -> Iterator[dict[str, np.ndarray]]:
    """What some units left in ``arrays``, one after the other.

    Raises:
        InputError: a file that is not as its unit left it.
    """
    for unit_id, sha256 in files:
        path = _file(folder, unit_id)
        if not path.is_file() or file_sha256(path) != sha256:
            done = folder.path / "units" / f"{unit_id}.json"
            raise InputError(
                f"reading {path}: got another file than its unit left. Delete {done}: the unit "
                "is then redone."
            )
        yield load_file(path)


def arrays_sha256(folder: RunFolder, unit_id: str) -> str:
    """The hash of what a unit left in ``arrays``."""
    return file_sha256(_file(folder, unit_id))


def finite_features(folder: RunFolder, name: str, files: FeatureFiles) -> Features:
    """A point's features of all clips, in float64, as probes take them.

    Raises:
        InputError: some are not finite, or a file is not as its unit left it.
    """
    found = kept_features(folder, name, files)
    if not np.isfinite(found).all():
        raise InputError(
            f"probing {name}: got values that are NaN or infinite, expected finite ones. Run the "
            "model in a wider dtype, or look at its input."
        )
    return found.astype(np.float64)


def _file(folder: RunFolder, unit_id: str) -> Path:
    return folder.inside(f"arrays/{unit_id}.safetensors")
