"""The models and clips that the package carries."""

from pathlib import Path

from hooked_alm.errors import InputError

from ..workbench.settings import PREFIX

ASSETS = Path(__file__).parents[1] / "assets"
MODELS = ASSETS / "models"
CLIPS = ASSETS / "ob1"


def bundled_models() -> list[str]:
    """``bundled:NAME`` of every model that the package carries."""
    return [PREFIX + path.parent.name for path in sorted(MODELS.glob("*/config.json"))]


def model_folder(name: str) -> str:
    """Folder of ``bundled:NAME``; any other name unchanged.

    Raises:
        InputError: the package carries no such model.
    """
    if not name.startswith(PREFIX):
        return name
    folder = MODELS / name.removeprefix(PREFIX)
    if not (folder / "config.json").exists():
        known = ", ".join(bundled_models())
        raise InputError(f"loading {name!r}: the package carries {known}.")
    return str(folder)
