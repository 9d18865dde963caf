"""A model family, as the loader sees it."""

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
    """Entry of the table of models for a family."""

    audio: str
    """Positions per second, and the longest clip."""
    readout: str
    """The last token of a prompt, which predicts the first one of the answer."""
    reference: Literal["Hugging Face", "composed"] = "Hugging Face"
    """Reference of the tests: the published class, or one composed in ``tests/`` from transformers'
    blocks, because transformers has no class for the family."""
    is_encoder_hooked: bool | None = True
    """Whether the audio encoder has hook points inside, or only those around it; None is wherever
    the checkpoint's folder has the encoder."""
    notes: str = ""
    """Facts that a user has to know besides."""

    @property
    def encoder(self) -> str:
        """Points of the audio encoder, as the table of models says it."""
        if self.audio == "none":
            return ""
        return {
            True: "hooked block by block",
            False: "points around it alone",
            None: "hooked block by block where the folder has it",
        }[self.is_encoder_hooked]

    @property
    def evidence(self) -> str:
        """Degree to which the family is checked, as the table of models says it."""
        if self.reference == "Hugging Face":
            return "equal to HF"
        return "equal to a composed reference, not checked against the published code"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Description of a family from which its checkpoints become a ``HookedALM``."""

    name: str
    """Name of the family in tables and messages."""
    architectures: tuple[str, ...]
    """Class names in ``config.json`` that this family answers to."""
    config_class: Any
    """transformers' config class, which supplies what a sparse file leaves out; or one with the
    same ``from_dict`` where transformers has none."""
    decoder_config: Callable[..., HookedALMConfig]
    """Function ``(config, published, **identity)`` -> config of the decoder, all fields accounted
    for."""
    front_end: Callable[[Any, frozenset[int]], FrontEnd] | None
    """Function ``(config, marker ids)`` -> empty front-end; None for text-only families."""
    rules: Sequence[Rule]
    """Rules that map checkpoint names to parameters; the first that fits a name decides."""
    card: Card
    marker_tokens: tuple[str, ...] = ()
    """Tokens around a clip in the prompt."""
    chat_template: str | None = None
    """Template of the published code, where that has one of its own instead of the tokenizer's; a
    file in the folder goes before both."""
    audio_text: str | None = None
    """Text that stands for a clip where the chat template takes messages of plain text."""
    prompts: type[PromptBuilder] = PromptBuilder
    """Class that makes inputs from waveforms and text."""
    read_extractor: Callable[[Path], Any] | None = None
    """Folder -> its feature extractor, where transformers' class needs packages that nothing else
    does. It has a ``sampling_rate``; anything else is agreed with the front-end alone."""
    feature_extractor: Callable[[Any], Any] | None = None
    """Function ``config`` -> feature extractor, for folders that come without."""
    components: Mapping[str, Callable[[Published, Path], str | Path | None]] = field(
        default_factory=dict
    )
    """Parts whose weights are elsewhere: name -> ``(published, folder)`` -> the folder or hub id
    that the checkpoint names, or the same ``folder`` if it has the part itself. Their tensors come
    as ``name/...``, and their ``config.json`` reaches ``config_class.from_dict`` under the
    component's name."""
    tokenizer: str | None = None
    """Component whose tokenizer is used, for folders that come without one."""
    pickled: tuple[str, str | None] | None = None
    """File pattern, and key in the pickled dict, where no safetensors are published."""
    check: Callable[[HookedALM, Checkpoint], None] | None = None
    """Last check of the filled model beside its checkpoint; raises ConversionError."""
    hf_class: str | None = None
    """transformers' class to verify against, where it is not the architecture's own."""
    hf_logits: Callable[[Tensor, HookedALMConfig], Tensor] = lambda logits, cfg: logits
    """Correction of the logits of that class, where they are not what the config describes."""
