"""The model that an experiment is about: loaded from its settings, and named in its record."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from hooked_alm import HookedALM
from hooked_alm.errors import InputError

from .bundled import model_folder
from .workbench.experiment import ExperimentConfig


def check_device(device: str) -> None:
    """Refuses a device that torch does not know, or that this machine has not.

    Raises:
        InputError: in words of the command line, before anything is loaded.
    """
    try:
        torch.empty(0, device=device)
    # AssertionError: how a torch without CUDA answers.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"using device {device!r}: {reason}. Give one that `hooked-alm doctor` finds; cpu is "
            "always there."
        ) from error


def load_subject(config: ExperimentConfig, **placement: Any) -> HookedALM:
    """The model that the settings name.

    Args:
        config: of the experiment.
        placement: ``device_map``, instead of the setting ``device``.

    Raises:
        InputError: a model, device or kernel that is not there.
    """
    check_device(config.device)
    if config.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise InputError(
            "using attn_implementation 'flash_attention_2': the package flash-attn is missing, or "
            "there is no GPU for it. Install it, or set attn_implementation=sdpa."
        )
    placement = placement or {"device": config.device}
    return HookedALM.from_pretrained(
        model_folder(config.model),
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        revision=config.revision,
        components=dict(config.components),
        lora=config.lora,
        **placement,
    )


def load_hearing_subject(config: ExperimentConfig, experiment: str) -> HookedALM:
    """The same for an experiment that needs a model with ears.

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
    parts = {**config.components, **({} if config.lora is None else {"lora": config.lora})}
    return {
        "name": config.model,
        "architecture": model.cfg.original_architecture,
        "revision": config.revision,
        "weights_sha256": weights_hash(model_folder(config.model)),
        **({"parts": {name: weights_hash(part) for name, part in parts.items()}} if parts else {}),
        "dtype": config.dtype,
        "blocks": len(model.path),
        "heads": model.cfg.n_heads,
    }


def weights_hash(folder: str) -> str | None:
    """SHA-256 over a folder's safetensors files; None for a hub id, which has a revision."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
