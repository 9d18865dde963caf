"""Localised twins: a model of which one component has other weights, kept as a delta.

A delta is a folder. ``delta.safetensors`` has the new values of slices of the base's tensors, under
their names in its checkpoint; ``delta.json`` says where in them (``slices``: tensor -> half-open
range on every axis) and of which weights (``base_sha256``); what else it says is about the truth.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hooked_alm.checkpoint import Checkpoint, OverlaidCheckpoint, SafetensorsCheckpoint
from hooked_alm.errors import ConversionError
from hooked_alm.text_files import read_json

from .folders import WEIGHT_FILES, weights_sha256

DELTA = "delta.json"
Slices = Mapping[str, tuple[slice, ...]]
"""Tensor -> its part that is changed, a range on every axis."""


def overlaid(own: Checkpoint, delta: Path) -> OverlaidCheckpoint:
    """A checkpoint with a delta's values in the place of its own.

    Raises:
        ConversionError: a delta that is damaged, or whose slices the checkpoint does not have.
    """
    written = read_json(delta / DELTA).get("slices")
    values = SafetensorsCheckpoint(delta, "delta")
    if not isinstance(written, dict) or written.keys() != values.keys():
        raise ConversionError(
            f"reading {delta / DELTA}: its slices are not those of the tensors beside it, expected "
            f"a range on every axis of {', '.join(values)}. It is damaged; take it anew."
        )
    return OverlaidCheckpoint(own, values, {n: _ranges(n, at, delta) for n, at in written.items()})


def _ranges(name: str, written: Any, delta: Path) -> tuple[slice, ...]:
    """The ranges of one tensor.

    Raises:
        ConversionError: something else.
    """
    pairs: list[Any] = written if isinstance(written, list) else [None]
    if not all(isinstance(p, list) and [type(n) for n in p] == [int, int] for p in pairs):
        raise ConversionError(
            f"reading {delta / DELTA}: got {written!r:.60} as the slice of {name}, expected "
            "[start, stop] for every axis. It is damaged; take it anew."
        )
    return tuple(slice(*pair) for pair in pairs)


def check_base(folder: Path, delta: Path) -> None:
    """Check that a delta was made of the weights in a folder.

    Raises:
        ConversionError: it was made of others.
    """
    expected, found = read_json(delta / DELTA).get("base_sha256"), weights_sha256(folder)
    if found != expected:
        raise ConversionError(
            f"laying {delta} over {folder}: got weights with the SHA-256 {found:.12}..., expected "
            f"{expected!s:.12}..., of which the delta was made. Give the base that it belongs to."
        )


def write_delta(
    folder: Path,
    base: Path,
    tensors: Mapping[str, Tensor],
    slices: Slices,
    about: Mapping[str, Any],
) -> None:
    """Write the delta of a model whose base has been trained within some slices.

    Args:
        folder: where; its other files stay.
        base: folder of the base's checkpoint.
        tensors: the trained tensors by their names there, whole; others are not looked at. Each is
            kept in its own dtype, be it another than the base's.
        slices: the parts of them that were trained.
        about: what else ``delta.json`` says: base, component, rule, seed, accuracies.
    """
    values = {name: tensors[name][at].detach().contiguous() for name, at in slices.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(values, folder / "delta.safetensors", metadata={"format": "pt"})
    (folder / "delta.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    where = {name: [[one.start, one.stop] for one in at] for name, at in slices.items()}
    record = {**about, "base_sha256": weights_sha256(base), "slices": where}
    (folder / DELTA).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint as one that Hugging Face reads: a twin, with base and delta in one file.

    Args:
        checkpoint: of one folder, whose other files are copied.
        folder: where; it must be there.
    """
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_FILES and "safetensors" not in path.name:
            shutil.copy(path, folder)
    tensors = {n: checkpoint.read(n, getattr(torch, checkpoint.dtypes[n])) for n in checkpoint}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
