"""The folder of a checkpoint, its config, and the hash of its weights."""

import hashlib
from pathlib import Path
from typing import Any

from hooked_alm.bundled import model_folder
from hooked_alm.errors import ConversionError, InputError, reason_of
from hooked_alm.text_files import read_json

from .strict_config import object_parts

WEIGHT_FILES = {".safetensors", ".pt", ".pth"}
READ_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def find_folder(name_or_dir: str | Path, revision: str | None, *, also: str | None = None) -> Path:
    """Path of a folder, ``bundled:NAME`` among them, or of a snapshot from the hub.

    ``also`` is one more pattern to download.

    Raises:
        InputError: no such folder, no such bundled model, and no such id on the hub.
    """
    name, folder = str(name_or_dir), model_folder(name_or_dir)
    if name and folder.is_dir():
        return folder
    is_path = isinstance(name_or_dir, Path) or name.startswith(("/", ".", "~"))
    if is_path or not name or name.count("/") > 1:  # the hub's ids are owner/name
        raise InputError(f"loading {name!r}: there is no such folder. Check the spelling.")
    from huggingface_hub import snapshot_download

    try:
        patterns = [*READ_FILES, *([] if also is None else [also])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise InputError(
            f"loading {name!r}: it is no folder, and the Hugging Face hub gave none "
            f"({reason_of(error)}). Check the spelling, or "
            "download the checkpoint and give its folder."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Content of ``config.json``, refused if the weights are quantised.

    Raises:
        InputError: the folder has no ``config.json``.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"loading {folder}: it has no config.json. Is it a model folder?")
    published = read_json(path)
    parts = [published, *(part for part in published.values() if isinstance(part, dict))]
    for part in parts:
        if quantised := part.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise ConversionError(
                f"loading {folder}: it is quantised ({method or 'unknown'!s:.60}). "
                "Quantised weights are not supported; use the original checkpoint."
            )
    return object_parts(published)


def weights_sha256(folder: Path) -> str:
    """SHA-256 over a folder's files of weights, one after the other.

    Raises:
        InputError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_FILES):
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise InputError(
                f"reading {path}: got '{error.strerror or error}' from the system, expected a file "
                "of weights. Check the path and its disk."
            ) from error
    return digest.hexdigest()
