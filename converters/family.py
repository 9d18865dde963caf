"""What one model family brings to the loader."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from hooked_alm.checkpoint import Checkpoint
from hooked_alm.config import HookedALMConfig
from hooked_alm.frontend import FrontEnd
from hooked_alm.model import HookedALM
from hooked_alm.prompts import PromptBuilder

from .rules import Rule

Published = dict[str, Any]
"""A ``config.json`` as written."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the table of models says of a family."""

    audio: str
    """Positions per second, and the longest clip."""
    readout: str
    """The last token of a prompt, which predicts the first one of the answer."""
    reference: Literal["Hugging Face", "composed"] = "Hugging Face"
    """What the tests hold it against: the published class, or one composed in ``tests/`` from
    transformers' blocks, because transformers has no class for it."""
    notes: str = ""
    """What a user has to know besides."""

    @property
    def evidence(self) -> str:
        """How far it is proved."""
        if self.reference == "Hugging Face":
            return "equal to HF"
        return "equal to a composed reference, not checked against the published code"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How checkpoints of one family become a ``HookedALM``."""

    name: str
    """As a person says it."""
    architectures: tuple[str, ...]
    """Class names in ``config.json`` that this family answers to."""
    config_class: Any
    """transformers' config class, which supplies what a sparse file leaves out; or one with the
    same ``from_dict`` where transformers has none."""
    decoder_config: Callable[..., HookedALMConfig]
    """``(config, published, **identity)`` -> sizes and variants, every field accounted for."""
    front_end: Callable[[Any, frozenset[int]], FrontEnd] | None
    """``(config, marker ids)`` -> empty audio front-end; None for text-only families."""
    rules: Sequence[Rule]
    """Checkpoint names -> parameters."""
    card: Card
    marker_tokens: tuple[str, ...] = ()
    """Tokens around a clip in the prompt."""
    chat_template: str | None = None
    """Where the published code has one of its own, instead of the tokenizer's; a file in the folder
    goes before both."""
    audio_text: str | None = None
    """What stands for a clip where the chat template takes messages of plain text."""
    prompts: type[PromptBuilder] = PromptBuilder
    """Makes inputs from waveforms and text."""
    read_extractor: Callable[[Path], Any] | None = None
    """Folder -> its feature extractor, where transformers' class needs packages that nothing else
    does. It has a ``sampling_rate``; what else, is between it and the front-end."""
    feature_extractor: Callable[[Any], Any] | None = None
    """``config`` -> one, for folders that come without."""
    components: Mapping[str, Callable[[Published, Path], str | Path | None]] = field(
        default_factory=dict
    )
    """Parts whose weights are elsewhere: name -> ``(published, folder)`` -> the folder or hub id
    that the checkpoint names, or the same ``folder`` if it has the part itself. Their tensors come
    as ``name/...``, and their ``config.json`` reaches ``config_class.from_dict`` under the
    component's name."""
    tokenizer: str | None = None
    """Component whose tokenizer it is, for folders that come without one."""
    pickled: tuple[str, str | None] | None = None
    """File pattern, and key in the pickled dict, where no safetensors are published."""
    check: Callable[[HookedALM, Checkpoint], None] | None = None
    """A last look at the model beside its checkpoint; raises ConversionError."""
    hf_class: str | None = None
    """transformers' class to verify against, where it is not the architecture's own."""
    hf_logits: Callable[[Tensor, HookedALMConfig], Tensor] = lambda logits, cfg: logits
    """What the logits of that class should have been."""
