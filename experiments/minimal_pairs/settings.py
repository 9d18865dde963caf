"""Settings of ``minimal_pairs``."""

from typing import ClassVar, Literal

from pydantic import Field

from hooked_alm.bundled import PREFIX
from hooked_alm.methods.patching.options import Engine

from ..materials.pair_settings import PairsConfig
from ..workbench.batches import BatchedConfig, BatchSize
from ..workbench.settings import EngineBytes, ModelId


class MinimalPairsConfig(PairsConfig, BatchedConfig):
    """Which pairs are made and accepted, on which model they are exchanged, and how."""

    KNOWN_WITH: ClassVar = ("audio",)

    model: ModelId = f"{PREFIX}follows_voice"
    batch_size: BatchSize = 6
    probe_point: str | None = Field(
        default=None,
        description="hook point whose mean over a clip probes read; None is where a hooked encoder "
        "begins, else the decoder: what is in the sound, whether the model keeps it or not",
    )
    ablation: Literal["mean", "zero"] = Field(
        default="mean", description="what stands for a removed head; mean of some recordings"
    )
    n_reference: int = Field(
        default=8, ge=1, le=1000, description="recordings behind the mean of an ablation"
    )
    min_effect: float = Field(
        default=0.05, gt=0, le=1e6, description="logits; a head that surely moves less is idle"
    )
    engine: Engine = Field(default="fast", description="hooks is one whole forward per cell")
    max_bytes: EngineBytes = 2**30
