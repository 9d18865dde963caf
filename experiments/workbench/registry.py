"""The experiments that the command line knows."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hooked_alm.errors import InputError

if TYPE_CHECKING:  # the command line names the experiments in its help, and imports nothing heavy
    from .experiment import Experiment

# Name -> module:class; imported only when asked for.
EXPERIMENTS = {
    "circuits": "hooked_alm.experiments.circuits:Circuits",
    "emotion_conflict": "hooked_alm.experiments.emotion_conflict:EmotionConflict",
    "prefix_comparison": "hooked_alm.experiments.prefix_comparison:PrefixComparison",
    "head_statistics": "hooked_alm.experiments.head_statistics:HeadStatistics",
    "tuned_lens": "hooked_alm.experiments.tuned_lens:TuneLens",
    "semantic_vs_prosody": "hooked_alm.experiments.semantic_vs_prosody:SemanticVsProsody",
}


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
