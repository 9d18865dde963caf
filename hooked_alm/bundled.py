"""The models and clips that the package carries, by name: ``bundled:follows_text``.

``BASE+DELTA`` is a localised twin: a model of which one component has other weights; or a model
under a LoRA adapter.

They are files of ``hooked_alm.experiments``, which is looked up and not imported.
"""

import difflib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

from .errors import InputError, nearest
from .storage import expanded
from .text_files import read_json

PREFIX = "bundled:"
"""Begins the name of a model, a clip or of items that the package carries."""

_SPEC = find_spec("hooked_alm.experiments")
assert _SPEC is not None
assert _SPEC.submodule_search_locations is not None
ASSETS = Path(_SPEC.submodule_search_locations[0]) / "assets"
MODELS = ASSETS / "models"
TRUTHS = ASSETS / "truths"
"""Deltas of localised twins, and adapters."""
ADAPTER = "adapter_config.json"
"""What a PEFT adapter's folder has."""
DICTIONARIES = ASSETS / "dictionaries"
"""Sparse autoencoders of bundled models."""
CLIPS = ASSETS / "ob1"
EMOTIONAL = ASSETS / "emotions"
"""Five emotions by twenty speakers."""


def model_folder(name: str | Path) -> Path:
    """Folder of ``bundled:NAME``; any other name as a path (``~`` is home).

    Raises:
        InputError: the package carries no such model.
    """
    if not is_bundled(name):
        return expanded(name)
    return _known(name, {path.parent.name: path.parent for path in MODELS.glob("*/config.json")})


def dictionary_folder(name: str | Path) -> Path:
    """Folder of the dictionary ``bundled:NAME``; any other name as a path (``~`` is home).

    Raises:
        InputError: the package carries no such dictionary.
    """
    if not is_bundled(name):
        return expanded(name)
    return _known(name, {path.parent.name: path.parent for path in DICTIONARIES.glob("*/cfg.json")})


def parts_of_twin(name: str | Path) -> tuple[str | Path, Path | None]:
    """Base, and folder of the delta or adapter, of ``BASE+DELTA``; any other name, and None.

    The delta is a truth that the package carries, or else a folder.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(name, str) or "+" not in name or expanded(name).is_dir():
        return name, None
    base, _, delta = name.partition("+")
    known = {path.parent.name: path.parent for path, _ in _truths()}
    folder = known.get(delta, expanded(delta))
    if not delta or not folder.is_dir():
        raise InputError(
            f"loading {name!r}: got {delta!r} behind the plus, expected a truth that the package "
            f"carries (nearest: {nearest(delta, known)}) or a folder with a delta or an adapter. "
            "The package "
            f"carries {', '.join(sorted(known)) or 'none'}."
        )
    return base, folder


def bundled_models() -> list[str]:
    """``bundled:NAME`` of every model that the package carries, localised twins among them."""
    models = [path.parent.name for path in MODELS.glob("*/config.json")]
    twins = [f"{base}+{path.parent.name}" for path, base in _truths()]
    return sorted(PREFIX + name for name in (*models, *twins))


def _truths() -> Iterator[tuple[Path, str]]:
    """File that says what a truth is, and the bundled model that is its base."""
    for path in TRUTHS.glob("*/delta.json"):
        yield path, read_json(path)["base"]
    for path in TRUTHS.glob(f"*/{ADAPTER}"):
        yield path, read_json(path)["base_model_name_or_path"].removeprefix(PREFIX)


def clip_file(name: str | Path) -> Path:
    """File of ``bundled:NAME``, without its ending; any other name as a path (``~`` is home).

    Raises:
        InputError: the package carries no such clip.
    """
    if not is_bundled(name):
        return expanded(name)
    clips = (path for ending in ("wav", "ogg", "flac") for path in ASSETS.rglob(f"*.{ending}"))
    return _known(name, {path.stem: path for path in clips})


def is_bundled(name: str | Path) -> TypeGuard[str]:
    """Whether it is a name of ours; a ``Path`` never is."""
    return isinstance(name, str) and name.startswith(PREFIX)


def _known(name: str, known: Mapping[str, Path]) -> Path:
    own, few = name.removeprefix(PREFIX), 10
    if own not in known:
        near = difflib.get_close_matches(own, known, n=few, cutoff=0)
        listed = ", ".join(PREFIX + one for one in sorted(near))
        more = f", the nearest of {len(known)}" if len(known) > few else ""
        raise InputError(f"loading {name!r}: the package carries {listed}{more}.")
    return known[own]
