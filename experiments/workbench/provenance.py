"""What a run was made with: versions, machine, source revision, the command that repeats it."""

import platform
import shlex
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import hooked_alm

from .identity import file_sha256, flatten, to_json
from .settings import ExperimentConfig

SAME_ROUNDING = ("python", "torch", "transformers", "transformer-lens", "numpy", "hooked_alm",
                 "experiment_sha256", "source_revision", "device")  # fmt: skip
"""What of the environment decides numbers, and so has to be the same in all parts of a run."""
PACKAGES = ("hooked_alm", "torch", "transformers", "transformer-lens", "numpy", "safetensors")


def environment(experiment: Path | None = None) -> dict[str, str | None]:
    """Versions of what the numbers depend on, and the kind of machine.

    Args:
        experiment: the file of a user's own experiment, which is known by its hash.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if experiment is not None:
        found["experiment_sha256"] = file_sha256(experiment)
    return {**found, "platform": platform.platform(), "source_revision": source_revision()}


def rounding(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What of an environment decides numbers."""
    return {key: environment.get(key) for key in SAME_ROUNDING}


def source_revision() -> str | None:
    """The git commit of this package's source, "+changes" if edited; None outside a checkout."""
    folder = Path(hooked_alm.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, encoding="utf-8", check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside some other project's checkout.
    if git("ls-files", "--error-unmatch", "errors.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain") else commit


def command_line(experiment: str, config: ExperimentConfig) -> str:
    """The shortest command that gives these settings, however they were given."""
    words = ["hooked-alm", "run", experiment]
    given = config.model_dump(mode="json", exclude_defaults=True)
    # One word: names of modules have dots, which would be read as settings below settings.
    whole = {key: given.pop(key) for key in ("device_map",) if key in given}
    if config.offload_folder is not None:
        whole["offload_folder"] = config.offload_folder
    for key, value in (flatten(given) | whole).items():
        words += ["-s", f"{key}={value if _is_plain(value) else to_json(value)}"]
    return shlex.join(words)


def _is_plain(value: object) -> bool:
    """Whether it is a string that YAML reads as itself; all else is written as JSON, as YAML is."""
    try:
        return isinstance(value, str) and bool(yaml.safe_load(value) == value)
    except yaml.YAMLError:
        return False
