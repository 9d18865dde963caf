"""What a run is: hashes of all that decides its numbers, and where two runs differ."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import encoded, refusals

NAMES = ("name", "id", "item", "condition")
"""Keys by which the entries of a list are told apart."""


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON with Python's ``NaN`` and ``Infinity``; numpy scalars become plain numbers."""

    def plain(item: Any) -> Any:
        if isinstance(item, np.generic):
            return item.item()
        raise TypeError(f"{type(item).__name__} is not JSON: {item!r}")

    return json.dumps(value, ensure_ascii=False, indent=indent, default=plain)


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter."""
    ordered = json.dumps(json.loads(to_json(value)), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(encoded(ordered)).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        InputError: it cannot be read.
    """
    with refusals(f"reading {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """SHA-256 of files, by their paths from a folder where they are in it."""
    return {
        (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix(): file_sha256(
            path
        )
        for path in files
    }


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def by_name(value: Any) -> Any:
    """The value with lists of mappings as mappings, by what the entries are called."""
    if isinstance(value, Mapping):
        return {key: by_name(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        names = [" ".join(str(item[key]) for key in NAMES if key in item) for item in value]
        is_enough = all(names) and len({*names}) == len(names)
        keys = names if is_enough else [str(number) for number in range(len(value))]
        return {key: by_name(item) for key, item in zip(keys, value, strict=True)}
    return value


def differences(
    new: Mapping[str, Any], old: Mapping[str, Any], *, old_is: str = "in the folder"
) -> list[str]:
    """One line for every dotted key whose values differ."""
    left, right = flatten(by_name(new)), flatten(by_name(old))
    lines = []
    for key in sorted(left.keys() | right.keys()):
        # Compared as text, because NaN is not equal to itself.
        shown = [to_json(flat[key]) if key in flat else "nothing" for flat in (left, right)]
        if shown[0] != shown[1]:
            shown = [text if len(text) <= 80 else text[:77] + "..." for text in shown]
            lines.append(f"{key} (now {shown[0]}, {old_is} {shown[1]})")
    return lines
