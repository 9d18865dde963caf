"""The text files of a checkpoint: UTF-8, whatever the locale of the machine."""

import json
from pathlib import Path
from typing import Any

from .errors import ConversionError


def read_text(path: Path) -> str:
    """Content of a text file.

    Raises:
        ConversionError: it cannot be read, is no UTF-8, or begins with a byte order mark.
    """
    try:
        found = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"reading {path}: it is no UTF-8 ({error}). Download it again, or save it as UTF-8."
        ) from error
    except OSError as error:
        raise ConversionError(
            f"reading {path}: {error.strerror or error}. Check that it is a file that you may read."
        ) from error
    if found.startswith("\ufeff"):
        raise ConversionError(
            f"reading {path}: it begins with a byte order mark, which would become a part of what "
            "it says. Save it as UTF-8 without one, or download it again."
        )
    return found


def extractor_config(folder: Path) -> tuple[Path, Any] | None:
    """The file that describes a folder's feature extractor, and what it says; None without one.

    In transformers' order: ``processor_config.json`` wins, where it has an extractor.

    Raises:
        ConversionError: a file is damaged.
    """
    if (path := folder / "processor_config.json").exists():
        parts = read_json(path)
        written = parts.get("feature_extractor", parts.get("audio_processor"))
        if written is not None:
            return path, written
    path = folder / "preprocessor_config.json"
    return (path, read_json(path)) if path.exists() else None


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        ConversionError: it cannot be read, is no UTF-8, or holds no JSON object.
    """
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversionError(
            f"reading {path}: it is no JSON object ({error}). It is damaged; download it again."
        ) from error
    if not isinstance(found, dict):
        raise ConversionError(
            f"reading {path}: it is no JSON object, but {type(found).__name__}. It is damaged; "
            "download it again."
        )
    return found
