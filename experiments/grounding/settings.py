"""Settings of ``grounding``, and what seed 003's own choices get wrong."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from hooked_alm.methods.statistics.grounding import CoefficientForm

from ..materials.conflict_settings import ConflictConfig
from ..workbench.claims import Defect

ALL = "all"
"""Every position of a prompt: patched at depth 0, it is the other run."""
SPANS: dict[str, tuple[str, ...]] = {
    "audio": ("audio",),
    "text": ("text",),
    "struct": ("audio_struct", "struct", "sink"),
    "readout": ("readout",),
    ALL: ("text", "audio", "audio_struct", "struct", "readout", "sink"),
}
"""What is patched together, under which name."""
NodeSpan = Literal["readout", "audio"]


class GroundingConfig(ConflictConfig):
    """What is asked of which clips, and where it is patched."""

    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {"gc_form": "ratio"}

    model: str = Field(
        default="bundled:follows_voice",
        description="id, folder, bundled:NAME, or BASE+DELTA: a localised twin",
    )
    condition: Literal["conflict", "audio_only"] = Field(
        default="conflict",
        description="what is asked: audio_only names no label, so that no instruction can be "
        "exchanged, and the coefficient is NaN",
    )
    node_spans: tuple[NodeSpan, ...] = Field(
        default=("readout",),
        min_length=1,
        description="where heads and MLPs are patched, each place apart; readout decides which "
        "head carries a part",
    )
    gc_form: CoefficientForm = Field(
        default="share", description="e_a/(e_a + e_t); the seed's ratio is e_a/e_t"
    )

    @model_validator(mode="after")
    def _has_the_readout(self) -> "GroundingConfig":
        if "readout" not in self.node_spans or len({*self.node_spans}) < len(self.node_spans):
            raise ValueError("node_spans must include readout, and each only once")
        return self

    @property
    def even(self) -> float:
        """The coefficient where both inputs have an equal part."""
        return 0.5 if self.gc_form == "share" else 1.0


DEFECTS = (
    Defect("C10", ("grounding", "nodes"), lambda config: config.align == "min_len",
           "Positions are matched from the start: after a length change, wrongly."),
    Defect("C13", ("grounded",), lambda config: config.gc_form == "ratio",
           "The coefficient is a ratio: it has no bound, is undefined where the text does nothing, "
           "and the largest values make its mean."),
)  # fmt: skip
