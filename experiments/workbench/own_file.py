"""A user's own experiment: a Python file that declares one."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from hooked_alm.errors import InputError

from .experiment import Experiment


def load_file(path: Path) -> type[Experiment[Any]]:
    """The experiment that a Python file declares; its classes can then be pickled.

    Raises:
        InputError: no such file, or it declares none, or several.
    """
    name = f"own_experiment_{path.stem}"  # shadows no module, whatever the file is called
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(
            f"loading the experiment {path}: got no such file, expected a Python file that "
            "declares one. Check the path."
        )
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pydantic look their module up by name.
    sys.modules[name] = module
    # Beside it may lie modules of its own.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    found = [
        one
        for one in vars(module).values()
        if isinstance(one, type)
        and issubclass(one, Experiment)
        and one.__module__ == name
        and not one.__abstractmethods__
    ]
    if len(found) != 1:
        raise InputError(
            f"loading the experiment {path}: got {len(found)} experiments "
            f"({', '.join(one.__name__ for one in found) or 'no subclass of Experiment'}), "
            "expected one class that has open, units, measure and page. Give each a file of its "
            "own."
        )
    found[0].location = path
    return found[0]
