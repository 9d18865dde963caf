"""The experiments that the command line knows."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hooked_alm.errors import InputError

if TYPE_CHECKING:  # the command line names the experiments in its help, and imports nothing heavy
    from .workbench.experiment import Experiment

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


def load_experiment(name: str) -> "type[Experiment[Any]]":
    """The class of an experiment, by name.

    Raises:
        InputError: no experiment has this name.
    """
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            f"looking up an experiment: got {name!r}, expected one of "
            f"{', '.join(sorted(EXPERIMENTS))}.{hint}"
        )
    module, _, attribute = EXPERIMENTS[name].partition(":")
    return getattr(import_module(module), attribute)
