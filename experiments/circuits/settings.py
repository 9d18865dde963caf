"""Settings of ``circuits``."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hooked_alm.methods.patching.alignment import AlignPolicies, AlignPolicy
from hooked_alm.methods.patching.options import Engine, PathMode

from ..materials.exchange import PlaceName
from ..materials.sources import Source
from ..workbench.batches import BatchedConfig
from ..workbench.settings import EngineBytes, Truncate

MetricName = Literal["logit_diff", "log_prob", "prob"]
UNITS: dict[MetricName, str] = {"logit_diff": "logits", "log_prob": "nats", "prob": "probability"}
"""Metric -> its unit, in words."""


class CircuitsConfig(BatchedConfig):
    """Which pairs, what is patched, and how strictly it is tested."""

    KNOWN_WITH: ClassVar = ("pairs",)

    pairs: Source = Field(
        default="bundled",
        description="a JSONL file of minimal pairs (see experiments/materials/pairs.py)",
    )
    pairs_per_clip: int = Field(
        default=1, ge=1, le=3, description="bundled pairs of each clip and contrast"
    )
    truncate: Truncate = False
    metric: MetricName = Field(
        default="logit_diff", description="of the two answers' first tokens, at the readout"
    )
    places: tuple[PlaceName, ...] = Field(
        default=("readout", "text", "struct", "audio"),
        description="where nodes are patched, each place apart; readout has to be among them",
    )
    align: AlignPolicy = Field(default="error", description="for spans of unequal length")
    n_heads: int = Field(default=12, ge=1, le=10_000, description="most heads of a circuit")
    n_mlps: int = Field(default=6, ge=0, le=10_000, description="most MLPs of a circuit")
    n_followed: int = Field(
        default=6, ge=0, le=10_000, description="winning heads whose q, k and v are followed back"
    )
    path_modes: tuple[PathMode, ...] = Field(
        default=("edge",), description="of the paths into heads; direct effects are given in both"
    )
    n_paths: int = Field(
        default=12, ge=1, le=10_000, description="paths that are tested, and drawn"
    )
    n_random: int = Field(default=2, ge=1, le=1000, description="random circuits to compare with")
    min_effect: float = Field(
        default=0.05,
        gt=0,
        le=1e6,
        description="in units of the metric; a node that moves it less on average is no winner",
    )
    fdr: float = Field(default=0.05, gt=0, lt=1, description="false discovery rate")
    discovery_share: float = Field(
        default=0.6, gt=0, lt=1, description="share of the groups that winners are chosen on"
    )
    engine: Engine = Field(default="fast", description="hooks is one whole forward per cell")
    max_bytes: EngineBytes = 2**30

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "CircuitsConfig":
        if "readout" not in self.places or len(set(self.places)) < len(self.places):
            raise ValueError("places must include readout, and each only once")
        if not self.path_modes or len(set(self.path_modes)) < len(self.path_modes):
            raise ValueError("path_modes must be edge, ioi, or both, each only once")
        if self.align in ("dtw", "min_len"):
            raise ValueError(f"align {self.align} moves positions that the circuit's edges keep")
        return self

    @property
    def unit(self) -> str:
        """Unit of the metric, in words."""
        return UNITS[self.metric]

    def align_policies(self) -> AlignPolicies:
        """What is set, for clips of unequal duration; for words of unequal length, nearest."""
        if self.align == "error":
            return "error"
        return {"audio": self.align, "text": "nearest"}
