"""Settings of ``encoder_lens``."""

from ..materials.read_by_depth import ReadByDepthConfig


class EncoderLensConfig(ReadByDepthConfig):
    """Which clips are read at every depth, and when a transcript counts as settled."""
