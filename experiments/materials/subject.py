"""The model that an experiment is about: loaded from its settings, and named in its record."""

import hashlib
import re
from pathlib import Path
from typing import Any

from hooked_alm import HookedALM
from hooked_alm.converters.folders import READ_FILES
from hooked_alm.converters.loading import Layout, lay_out, load_weights
from hooked_alm.errors import InputError

from ..workbench.files import refusals
from ..workbench.identity import file_hashes
from ..workbench.settings import ExperimentConfig

WEIGHT_FILES = {".safetensors", ".pt", ".pth"}


def lay_out_subject(config: ExperimentConfig) -> Layout:
    """The model that the settings name, still without weights: enough to make every prompt.

    Raises:
        InputError: a model that is not there.
    """
    return lay_out(
        config.model,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        revision=config.revision,
        components=dict(config.components),
        lora=config.lora,
    )


def lay_out_hearing_subject(config: ExperimentConfig, experiment: str) -> Layout:
    """`lay_out_subject` for an experiment whose model must have ears.

    Raises:
        InputError: a text model, or a folder without processor files.
    """
    layout = lay_out_subject(config)
    model = layout.model
    if model.audio is None or model.prompts is None:
        raise InputError(
            f"running {experiment} on {config.model!r}: the model has no audio front-end, or its "
            "folder no processor files. Give an audio model with both."
        )
    return layout


def load_subject(layout: Layout, config: ExperimentConfig, **placement: Any) -> HookedALM:
    """The model of a layout with its weights, where the settings want it.

    Args:
        layout: of the model; it is filled in place.
        config: of the experiment.
        placement: ``device_map``, instead of the setting ``device``.

    Raises:
        InputError: a device or kernel that is not there.
    """
    return load_weights(layout, **(placement or {"device": config.device}))


def described(model: HookedALM, config: ExperimentConfig) -> dict[str, Any]:
    """What ``run.json`` says of the model; a run resumes only with the same."""
    weights = {name: weights_of(folder) for name, folder in model.sources.items()}
    own = weights.pop("model")
    files: dict[str, str] = {}
    for name, folder in model.sources.items():
        beside = "" if name == "model" else f"{name}/"
        files |= {f"{beside}{file}": one for file, one in hashes_beside_weights(folder).items()}
    return {
        "name": config.model,
        "architecture": model.cfg.original_architecture,
        **own,
        "files": files,
        **({"parts": weights} if weights else {}),
        "dtype": config.dtype,
        "blocks": len(model.path),
        "heads": model.cfg.n_heads,
    }


def hashes_beside_weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but its weights that loading may read, by its path."""
    patterns = (*READ_FILES, "additional_chat_templates/*.jinja")
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return file_hashes(sorted(one for one in found if one.suffix not in WEIGHT_FILES), folder)


def weights_of(folder: Path) -> dict[str, Any]:
    """Identity of a folder's weights: the commit of a hub snapshot, or a SHA-256 over its files."""
    # As huggingface_hub's cache names them; any other folder could change under its name.
    if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
        return {"revision": folder.name, "weights_sha256": None}
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES):
        with refusals(f"reading {path}"), path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return {"revision": None, "weights_sha256": digest.hexdigest()}
