"""Settings of experiments on conflicts: clips that carry one label, instructions that name another.

Which clips, what they carry, what is asked about them, and how one run is patched into another.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hooked_alm.bundled import CLIPS
from hooked_alm.methods.patching.alignment import AlignPolicies, AlignPolicy
from hooked_alm.methods.patching.options import Engine, ExactOptions
from hooked_alm.methods.reading.labels import LabelMode

from ..workbench.batches import BatchedConfig
from ..workbench.settings import EngineBytes, Truncate
from .instructions import Instructions
from .sources import Source


class ConflictConfig(BatchedConfig):
    """What a run on conflicts is asked about, and how it is patched."""

    KNOWN_WITH: ClassVar[tuple[str, ...]] = (
        "audio",
        "label_column",
        "labels",
        "prompts",
        "conflict_map",
    )

    audio: Source = Field(
        default="bundled",
        description="a table of clips, a folder with manifest.csv, or one of OB1-named clips",
    )
    n_clips: int | None = Field(
        default=None, ge=1, le=10**6, description="how many clips there must be"
    )
    label_column: str = Field(
        default="emotion",
        min_length=1,
        description="column of the table that says what the voice carries",
    )
    labels: Mapping[str, Mapping[str, str | tuple[str, ...]]] | None = Field(
        default=None,
        description="language -> label -> how answers spell it; None is OB1's five if the clips "
        "have no others, else the labels of the clips as they stand",
    )
    label_mode: LabelMode = Field(
        default="first_token",
        description="an answer's score: of its first token, or of the best of several spellings",
    )
    prompt_language: str = Field(
        default="clip", description="of instruction and labels: the clip's, or one for all clips"
    )
    prompts: Mapping[str, Instructions] = Field(
        default={},
        description="language -> ask, label_only, obey, mention, choose, unrelated (quoted, "
        "between); OB1's are there in zh and en",
    )
    conflict_map: Mapping[str, str] | None = Field(
        default=None,
        description="voice's label -> label that the instruction names; None is OB1's for its "
        "five, else the next label; a column target says it clip by clip",
    )
    pairs: Literal["map", "all_pairs"] = Field(
        default="map", description="instructions name the label of that map, or every other one"
    )
    truncate: Truncate = False
    loudness_dbfs: float | None = Field(
        default=None,
        ge=-120,
        le=0,
        description="scale every clip to this level (RMS), so that it cannot tell the label",
    )
    align: AlignPolicy = Field(
        default="resample_linear", description="spans of unequal length in base and donor"
    )
    engine: Engine = Field(
        default="fast", description="of the patching; hooks is one whole forward per cell"
    )
    max_bytes: EngineBytes = 2**30
    min_effect: float = Field(
        default=0.5,
        gt=0,
        le=1e6,
        description="logits; below this total effect a recovery is undefined",
    )

    @property
    def source(self) -> Source | Path:
        """Where the clips are."""
        return CLIPS if self.audio == "bundled" else self.audio

    @model_validator(mode="after")
    def _scores_one_token(self) -> "ConflictConfig":
        if self.label_mode == "sequence":
            raise ValueError(
                "label_mode 'sequence' has no lens and no patched cell: use first_token or "
                "variants, and labels that begin with different tokens"
            )
        return self

    def patch_options(self) -> ExactOptions:
        """How every sweep of the run is made."""
        policy = self.align_policies()
        return {"policy": policy, "engine": self.engine, "max_bytes": self.max_bytes}

    def align_policies(self) -> AlignPolicies:
        """For clips of unequal duration what is set; for labels of unequal token count, nearest."""
        if self.align in ("error", "min_len"):
            return self.align
        return {"audio": self.align, "text": "nearest"}
