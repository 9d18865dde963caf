"""Hooked audio language models: look inside, patch, and trust the numbers.

``HookedALM`` is the decoder of an audio language model rewritten with TransformerLens' hook names;
``hooked_alm.axes`` is the glossary of tensor axes. What a notebook needs is exported here, and
imported on first use, so that ``import hooked_alm`` stays light.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import HookedALMConfig as HookedALMConfig
    from .converters.dictionaries import load_dictionary as load_dictionary
    from .converters.dictionaries import save_dictionary as save_dictionary
    from .converters.parity import compare_with_hf as compare_with_hf
    from .hooks import ActivationCache as ActivationCache
    from .inputs import ALMInput as ALMInput
    from .inputs import AudioClip as AudioClip
    from .methods.activations.reader import ActivationReader as ActivationReader
    from .methods.activations.writer import ActivationWriter as ActivationWriter
    from .methods.attribution.edges import attribute_edges as attribute_edges
    from .methods.attribution.features import attribute_features as attribute_features
    from .methods.attribution.nodes import attribute_nodes as attribute_nodes
    from .methods.attribution.trust import Attribution as Attribution
    from .methods.dictionary.autoencoder import SparseAutoencoder as SparseAutoencoder
    from .methods.dictionary.splice import Splice as Splice
    from .methods.dictionary.splice import feature_edit as feature_edit
    from .methods.dictionary.splice import reconstruction as reconstruction
    from .methods.dictionary.splice import splice_hooks as splice_hooks
    from .methods.dictionary.training import DictionaryTrainer as DictionaryTrainer
    from .methods.patching.alignment import Window as Window
    from .methods.patching.donors import Mean as Mean
    from .methods.patching.donors import Noise as Noise
    from .methods.patching.enrich import enrich as enrich
    from .methods.patching.features import patch_features as patch_features
    from .methods.patching.knock_out import knock_out as knock_out
    from .methods.patching.metrics import JS as JS
    from .methods.patching.metrics import KL as KL
    from .methods.patching.metrics import Accuracy as Accuracy
    from .methods.patching.metrics import LabelScores as LabelScores
    from .methods.patching.metrics import LogitDiff as LogitDiff
    from .methods.patching.metrics import Logits as Logits
    from .methods.patching.metrics import LogProb as LogProb
    from .methods.patching.metrics import OnLogits as OnLogits
    from .methods.patching.metrics import Prob as Prob
    from .methods.patching.patch import patch as patch
    from .methods.patching.paths import all_edges as all_edges
    from .methods.patching.paths import patch_chains as patch_chains
    from .methods.patching.paths import patch_edges as patch_edges
    from .methods.patching.paths import path_patch as path_patch
    from .methods.patching.pruning import PrunedCircuit as PrunedCircuit
    from .methods.patching.pruning import prune_edges as prune_edges
    from .methods.patching.results import PatchResult as PatchResult
    from .methods.patching.row_edits import patch_rows as patch_rows
    from .methods.reading.labels import LabelSet as LabelSet
    from .methods.reading.lens import LensFidelity as LensFidelity
    from .methods.reading.lens import LogitLens as LogitLens
    from .methods.reading.lens import lens_fidelity as lens_fidelity
    from .methods.reading.lens import logit_lens as logit_lens
    from .methods.reading.lens import residual_rows as residual_rows
    from .methods.reading.tuned_lens import TunedLens as TunedLens
    from .model import HookedALM as HookedALM
    from .spans import SpanMap as SpanMap

from .errors import ConversionError as ConversionError
from .errors import HookedALMError as HookedALMError
from .errors import HookNameError as HookNameError
from .errors import InputError as InputError

__version__ = version("hooked_alm")

_EXPORTS = {
    "config": "HookedALMConfig",
    "converters.dictionaries": "load_dictionary save_dictionary",
    "converters.parity": "compare_with_hf",
    "hooks": "ActivationCache",
    "inputs": "ALMInput AudioClip",
    "methods.activations.reader": "ActivationReader",
    "methods.activations.writer": "ActivationWriter",
    "methods.attribution.edges": "attribute_edges",
    "methods.attribution.features": "attribute_features",
    "methods.attribution.nodes": "attribute_nodes",
    "methods.attribution.trust": "Attribution",
    "methods.dictionary.autoencoder": "SparseAutoencoder",
    "methods.dictionary.splice": "Splice feature_edit reconstruction splice_hooks",
    "methods.dictionary.training": "DictionaryTrainer",
    "methods.patching.alignment": "Window",
    "methods.patching.donors": "Mean Noise",
    "methods.patching.enrich": "enrich",
    "methods.patching.features": "patch_features",
    "methods.patching.knock_out": "knock_out",
    "methods.patching.metrics": (
        "JS KL Accuracy LabelScores LogitDiff Logits LogProb OnLogits Prob"
    ),
    "methods.patching.patch": "patch",
    "methods.patching.paths": "all_edges patch_chains patch_edges path_patch",
    "methods.patching.pruning": "PrunedCircuit prune_edges",
    "methods.patching.results": "PatchResult",
    "methods.patching.row_edits": "patch_rows",
    "methods.reading.labels": "LabelSet",
    "methods.reading.lens": "LensFidelity LogitLens lens_fidelity logit_lens residual_rows",
    "methods.reading.tuned_lens": "TunedLens",
    "model": "HookedALM",
    "spans": "SpanMap",
}
"""Module -> its names that are exported from here; above, once more for type checkers."""
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
