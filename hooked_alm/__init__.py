"""Hooked audio language models: look inside, patch, and trust the numbers.

``HookedALM`` is the decoder of an audio language model rewritten with TransformerLens' hook names;
``hooked_alm.axes`` is the glossary of tensor axes. Names are imported on first use, so that
``import hooked_alm`` stays light.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import HookedALMConfig as HookedALMConfig
    from .inputs import ALMInput as ALMInput
    from .model import HookedALM as HookedALM
    from .spans import SpanMap as SpanMap

from .errors import ConversionError as ConversionError
from .errors import HookedALMError as HookedALMError
from .errors import HookNameError as HookNameError
from .errors import InputError as InputError

__version__ = version("hooked_alm")

_HOME = {
    "ALMInput": "inputs",
    "HookedALM": "model",
    "HookedALMConfig": "config",
    "SpanMap": "spans",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
