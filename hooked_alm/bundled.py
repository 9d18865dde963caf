"""The models and clips that the package carries, by name: ``bundled:follows_text``.

They are files of ``hooked_alm.experiments``, which is looked up and not imported.
"""

import difflib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

from .errors import InputError
from .storage import expanded

PREFIX = "bundled:"
"""Begins the name of a model, a clip or of items that the package carries."""

_SPEC = find_spec("hooked_alm.experiments")
assert _SPEC is not None
assert _SPEC.submodule_search_locations is not None
ASSETS = Path(_SPEC.submodule_search_locations[0]) / "assets"
MODELS = ASSETS / "models"
CLIPS = ASSETS / "ob1"


def model_folder(name: str | Path) -> Path:
    """Folder of ``bundled:NAME``; any other name as a path (``~`` is home).

    Raises:
        InputError: the package carries no such model.
    """
    if not is_bundled(name):
        return expanded(name)
    return _known(name, {path.parent.name: path.parent for path in MODELS.glob("*/config.json")})


def bundled_models() -> list[str]:
    """``bundled:NAME`` of every model that the package carries."""
    return [PREFIX + path.parent.name for path in sorted(MODELS.glob("*/config.json"))]


def clip_file(name: str | Path) -> Path:
    """File of ``bundled:NAME``, without its ending; any other name as a path (``~`` is home).

    Raises:
        InputError: the package carries no such clip.
    """
    if not is_bundled(name):
        return expanded(name)
    clips = (path for ending in ("wav", "ogg") for path in ASSETS.rglob(f"*.{ending}"))
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
