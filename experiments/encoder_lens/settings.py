"""Settings of ``encoder_lens``."""

from pydantic import Field

from ..materials.transcription import TranscriptionConfig


class EncoderLensConfig(TranscriptionConfig):
    """Which clips are read at every depth, and when a transcript counts as settled."""

    near: float = Field(
        default=0.1, ge=0, le=1,
        description="distance from the final transcript, as a share of the longer one's "
        "characters, up to which a transcript counts as it",
    )  # fmt: skip
