"""The experiments that the command line knows: ours, installed ones, and files of a user's own."""

import ast
import difflib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_alm.errors import InputError

if TYPE_CHECKING:  # the command line names the experiments in its help, and imports nothing heavy
    from .workbench.experiment import Experiment

GROUP = "hooked_alm.experiments"
EXPERIMENTS = {
    name: f"hooked_alm.experiments.{name}.experiment:{cls}"
    for name, cls in {
        "circuits": "Circuits",
        "emotion_conflict": "EmotionConflict",
        "prefix_comparison": "PrefixComparison",
        "head_statistics": "HeadStatistics",
        "tuned_lens": "TuneLens",
        "semantic_vs_prosody": "SemanticVsProsody",
    }.items()
}
"""Name -> module:class; imported only when asked for."""


def known_experiments() -> dict[str, str]:
    """Name -> module:class of ours, and of those that other packages declare as entry points."""
    return {**{one.name: one.value for one in entry_points(group=GROUP)}, **EXPERIMENTS}


def question_of(location: str) -> str:
    """The question of the experiment at ``module:class``, read from its source, not imported.

    It is empty where the source is not to be had, or does not state it in so many words.
    """
    module, _, name = location.partition(":")
    try:
        spec = importlib.util.find_spec(module)  # imports the packages above it
    except ImportError:
        return ""
    if spec is None or not (spec.origin or "").endswith(".py"):
        return ""
    for node in ast.walk(ast.parse(Path(spec.origin or "").read_bytes())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for line in node.body:
                match line:
                    case ast.Assign(
                        targets=[ast.Name("question")], value=ast.Constant(str(text))
                    ) | ast.AnnAssign(ast.Name("question"), value=ast.Constant(str(text))):
                        return text
    return ""


def load_experiment(name: str) -> "type[Experiment[Any]]":
    """The class of an experiment, by its name or by the Python file that declares it.

    Raises:
        InputError: no experiment has this name, or the file declares none, or several.
    """
    if name.endswith(".py"):
        return _load_file(Path(name))
    known = known_experiments()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            f"looking up an experiment: got {name!r}, expected one of "
            f"{', '.join(sorted(known))}, or a Python file (path/to/my_experiment.py).{hint}"
        )
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _load_file(path: Path) -> "type[Experiment[Any]]":
    from .workbench.experiment import Experiment

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
