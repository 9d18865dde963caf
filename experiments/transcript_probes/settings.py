"""Settings of ``transcript_probes``."""

from typing import Any, Literal

from pydantic import Field

from ..materials.held_out_labels import ControlLabelsConfig
from ..materials.transcription import SPOKEN_OR_NOT, WrittenDownConfig
from ..workbench.batches import BatchedConfig, BatchSize

TranscriptLabel = Literal["error", "speech", "hallucination"]
"""Whether a transcript is right; whether anything is said; and, of clips in which words are heard,
whether anything is said."""


class TranscriptProbesConfig(WrittenDownConfig, BatchedConfig, ControlLabelsConfig):
    """Which clips are written down, and what is read where their transcripts end."""

    labels: tuple[TranscriptLabel, ...] = Field(
        default=("error", "speech", "hallucination"),
        min_length=1,
        max_length=3,
        description="what is read: error (right or wrong), speech (is anything said), "
        "hallucination (the same of clips in which words are heard)",
    )
    wrong_rate: float = Field(
        default=0.5,
        gt=0,
        le=100,
        description="errors for a word, or character, from which a transcript is wrong; those with "
        "fewer, but not none, are left out of error",
    )
    batch_size: BatchSize = 12

    @property
    def source(self) -> Any:
        """Where the clips are."""
        return SPOKEN_OR_NOT if self.audio == "bundled" else self.audio
