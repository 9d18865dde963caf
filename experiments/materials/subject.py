"""The model that an experiment is about: loaded from its settings, and named in its record."""

import re
from pathlib import Path
from typing import Any, ClassVar

from hooked_alm import HookedALM
from hooked_alm.converters.folders import READ_FILES, WEIGHT_FILES, weights_sha256
from hooked_alm.converters.loading import Layout, lay_out, load_weights
from hooked_alm.errors import InputError

from ..workbench.experiment import Experiment
from ..workbench.identity import file_hashes
from ..workbench.results import C
from ..workbench.settings import ExperimentConfig


class ModelExperiment(Experiment[C]):
    """An experiment about the one model that its settings name."""

    model: HookedALM
    """Without weights until `load`, which is enough to make every prompt."""
    merges_lora: ClassVar[bool] = True
    """Whether an adapter is added to the weights; else it can be switched."""

    def lay_out(self, *, hears: bool = False) -> HookedALM:
        """The model, still without weights.

        Args:
            hears: whether it must have ears.

        Raises:
            InputError: a model that is not there; or a text model, or a folder without processor
                files, where it must hear.
        """
        config = self.config
        self._layout: Layout = lay_out(
            config.model,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            revision=config.revision,
            components=dict(config.components),
            lora=config.lora,
        )
        model = self._layout.model
        if hears and model.audio is not None and model.audio.no_prompts:
            raise InputError(
                f"running {self.name} on {config.model!r}, which has to make prompts: "
                f"{model.audio.no_prompts}."
            )
        if hears and (model.audio is None or model.prompts is None):
            raise InputError(
                f"running {self.name} on {config.model!r}: the model has no audio front-end, or "
                "its folder no processor files. Give an audio model with both."
            )
        return model

    def load(self) -> None:
        """Fills the model with its weights, where the settings want them.

        Raises:
            InputError: a device or kernel that is not there.
        """
        config = self.config
        where: dict[str, Any] = {"device": config.device}
        if config.device_map is not None:
            where = {"device_map": config.device_map, "offload_folder": config.offload_folder}
        load_weights(self._layout, merge_lora=self.merges_lora, **where)


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
    return {"revision": None, "weights_sha256": weights_sha256(folder)}
