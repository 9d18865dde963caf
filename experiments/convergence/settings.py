"""Settings of ``convergence``, and what the seed document's own choices got wrong."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from hooked_alm.methods.statistics.critical_layer import CriticalMethod

from ..materials.read_by_depth import ReadByDepthConfig
from ..workbench.claims import Defect

TurningPoint = Literal["stabilisation", "critical", "saturation", "cka", "centred_norm", "raw_norm"]
FrameRows = Literal["own", "all", "without_massive"]


class ConvergenceConfig(ReadByDepthConfig):
    """Which clips, and which measures are to turn at the same depth."""

    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "measures": ("saturation", "raw_norm", "cka"), "rows": "all", "debiased": False,
    }  # fmt: skip

    measures: tuple[TurningPoint, ...] = Field(
        default=("stabilisation", "critical", "cka"), min_length=2, max_length=6,
        description="measures that agree where their depths lie together: the transcript is near "
        "the final one; the final transcript's log-probability turns; the decoder settles its "
        "tokens; similarity to the last state, or a norm, takes its largest step",
    )  # fmt: skip
    tolerance: int = Field(
        default=1, ge=0, le=1000, description="depths between the first and the last that agree"
    )
    rows: FrameRows = Field(
        default="own", description="of the encoder's stream: of the clip; of the padding, too; of "
        "the clip, without those whose norm is many times the median's"
    )  # fmt: skip
    massive: float = Field(
        default=5.0, gt=1, le=1e6, description="multiple of the median row's norm, at any depth, "
        "from which a row is left out by without_massive"
    )  # fmt: skip
    debiased: bool = Field(default=True, description="the estimator of CKA")
    critical_method: CriticalMethod = Field(
        default="half_rise", description="how the log-probability of the final transcript turns"
    )

    @field_validator("measures")
    @classmethod
    def _are_different(cls, measures: tuple[TurningPoint, ...]) -> tuple[TurningPoint, ...]:
        if len({*measures}) < len(measures):
            raise ValueError("each measure only once: one agrees with itself")
        return measures


DEFECTS = (
    Defect("C41", ("same_depth", "clip_by_clip"), lambda c: "raw_norm" in c.measures,
           "The norm of a LayerNorm model's stream has a part that no layer reads: a constant "
           "added to a bias moves its largest step to any block, and changes no logit."),
    Defect("C17", ("same_depth", "clip_by_clip"), lambda c: c.rows == "all",
           "Norms and similarities are taken over the padding, too, of which a short clip has "
           "most, and whose few massive rows hold nearly all of the norm."),
    Defect("C22", ("same_depth", "clip_by_clip"), lambda c: "cka" in c.measures and not c.debiased,
           "The plain estimator of CKA is high for unrelated states once features outnumber "
           "rows."),
)  # fmt: skip
