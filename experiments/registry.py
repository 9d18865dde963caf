"""The experiments that the command line knows: ours, installed ones, and files of a user's own."""

import ast
import difflib
import importlib.util
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
        "activations": "StoreActivations",
        "asr_components": "AsrComponents",
        "attribute_lens": "AttributeLens",
        "circuits": "Circuits",
        "class_neurons": "ClassNeurons",
        "component_patching": "ComponentPatching",
        "convergence": "Convergence",
        "lora_blocks": "LoraBlocks",
        "minimal_pairs": "MinimalPairs",
        "emotion_conflict": "EmotionConflict",
        "encoder_lens": "EncoderLens",
        "grounding": "Grounding",
        "prefix_comparison": "PrefixComparison",
        "probes": "Probes",
        "sae_compare": "CompareDictionaries",
        "sae_features": "SAEFeatures",
        "sae_steering": "SAESteering",
        "sae_patching": "SAEPatching",
        "sae_train": "TrainDictionaries",
        "head_statistics": "HeadStatistics",
        "transcript_probes": "TranscriptProbes",
        "trigger_defence": "TriggerDefence",
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
        from .workbench.own_file import load_file

        return load_file(Path(name))
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
