"""The model that an experiment is about: loaded from its settings, and named in its record."""

import hashlib
from pathlib import Path
from typing import Any

from hooked_alm import HookedALM
from hooked_alm.errors import InputError

from ..workbench.settings import ExperimentConfig

WEIGHT_FILES = {".safetensors", ".pt", ".pth"}


def load_subject(config: ExperimentConfig, **placement: Any) -> HookedALM:
    """The model that the settings name.

    Args:
        config: of the experiment.
        placement: ``device_map``, instead of the setting ``device``.

    Raises:
        InputError: a model, device or kernel that is not there.
    """
    placement = placement or {"device": config.device}
    return HookedALM.from_pretrained(
        config.model,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        revision=config.revision,
        components=dict(config.components),
        lora=config.lora,
        **placement,
    )


def load_hearing_subject(config: ExperimentConfig, experiment: str) -> HookedALM:
    """`load_subject` for an experiment whose model must have ears.

    Raises:
        InputError: a text model, or a folder without processor files.
    """
    model = load_subject(config)
    if model.audio is None or model.prompts is None:
        raise InputError(
            f"running {experiment} on {config.model!r}: the model has no audio front-end, or its "
            "folder no processor files. Give an audio model with both."
        )
    return model


def described(model: HookedALM, config: ExperimentConfig) -> dict[str, Any]:
    """What ``run.json`` says of the model; a run resumes only with the same."""
    weights = {name: weights_of(folder) for name, folder in model.sources.items()}
    own = weights.pop("model")
    return {
        "name": config.model,
        "architecture": model.cfg.original_architecture,
        **own,
        **({"parts": weights} if weights else {}),
        "dtype": config.dtype,
        "blocks": len(model.path),
        "heads": model.cfg.n_heads,
    }


def weights_of(folder: Path) -> dict[str, Any]:
    """Identity of a folder's weights: the commit of a hub snapshot, or a SHA-256 over its files."""
    if folder.parent.name == "snapshots":  # as huggingface_hub's cache names them
        return {"revision": folder.name, "weights_sha256": None}
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return {"revision": None, "weights_sha256": digest.hexdigest()}
