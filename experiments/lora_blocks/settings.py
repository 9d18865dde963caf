"""Settings of ``lora_blocks``."""

from pydantic import Field

from ..materials.conflict_settings import ConflictConfig
from ..materials.instructions import PromptMode

N_COMBINED = 10
"""Blocks of which Shapley values are computed, at most: 2 ** 10 sets."""


class LoraBlocksConfig(ConflictConfig):
    """An adapter, and what the model is asked with and without it."""

    model: str = Field(
        default="bundled:follows_text+lora_early",
        description="id, folder or bundled:NAME of the base, with lora=FOLDER; or BASE+ADAPTER",
    )
    conditions: tuple[PromptMode, ...] = Field(
        default=("conflict",),
        min_length=1,
        description="what is asked of every clip: conflict names another label, audio_only none",
    )
    n_compared: int = Field(
        default=256, ge=4, le=100_000, description="clips, at most, whose states with and without "
        "the adapter are compared: each once, under the first of conditions; more are drawn"
    )  # fmt: skip
    shapley: bool = Field(
        default=False,
        description=f"run every set of blocks, of adapters of at most {N_COMBINED} blocks",
    )
