"""Settings of ``attribute_lens``, and what AudioLens' own choices got wrong.

``variant: seed`` changes the defaults of the switches below to what its published code does; each
switch can also be set by itself. The known defects of a run follow from its switches, not from its
name.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from ..materials.enrichment import EnrichmentConfig
from ..workbench.settings import TunedLensFolder


class AttributeLensConfig(EnrichmentConfig):
    """What is asked about which clips; the switches' defaults are the corrected experiment."""

    KNOWN_WITH: ClassVar = ("audio", "attributes")
    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "prompts": ("prefix",),
        "causal_prompt": "prefix",
        "rotate_options": False,
        "absences": False,
        "enrich_modes": ("add", "average_input"),
        "enrich_controls": (),
    }

    model: str = Field(default="bundled:follows_voice", description="id, folder or bundled:NAME")
    tuned_lens: TunedLensFolder = None
    margin: float = Field(
        default=0.2, ge=0, le=100, description="above chance, as a share of it, where depths begin "
        "to count in the critical layer"
    )  # fmt: skip
    window: int = Field(
        default=3, ge=1, le=10_000, description="blocks in which attention is knocked out at once; "
        "all of them at once are a window too"
    )  # fmt: skip

    @model_validator(mode="after")
    def _labels_are_tokens(self) -> "AttributeLensConfig":
        if self.label_mode == "sequence":
            raise ValueError(
                "label_mode 'sequence' has no lens: use first_token or variants, and labels that "
                "begin with different tokens"
            )
        return self
