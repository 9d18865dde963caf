"""What one model family brings to the loader."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hooked_alm.config import HookedALMConfig
from hooked_alm.frontend import FrontEnd

from .rules import Rule


@dataclass(frozen=True, kw_only=True)
class Family:
    """How checkpoints of one family become a ``HookedALM``."""

    name: str
    """As a person says it."""
    architectures: tuple[str, ...]
    """Class names in ``config.json`` that this family answers to."""
    config_class: Any
    """transformers' config class, which supplies what a sparse file leaves out."""
    decoder_config: Callable[..., HookedALMConfig]
    """``(config, published, **identity)`` -> sizes and variants, every field accounted for."""
    front_end: Callable[[Any, frozenset[int]], FrontEnd] | None
    """``(config, marker ids)`` -> empty audio front-end; None for text-only families."""
    rules: Sequence[Rule]
    """Checkpoint names -> parameters."""
    marker_tokens: tuple[str, ...] = ()
    """Tokens around a clip in the prompt."""
