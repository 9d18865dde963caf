"""Settings of ``sae_steering``."""

from typing import Annotated, Any

from pydantic import Field

from ..materials.dictionaries import DictionaryReaderConfig
from ..materials.transcription import SPOKEN_OR_NOT, TranscriptionConfig
from ..workbench.batches import BatchedConfig, BatchSize

SteeringStrength = Annotated[float, Field(gt=0, le=1000)]


class SAESteeringConfig(TranscriptionConfig, BatchedConfig, DictionaryReaderConfig):
    """Which clips are written down, and what is taken out of the encoder while they are heard."""

    dictionary: str = Field(
        default="bundled:tiny_whisper_sae",
        description="of rows of the encoder, best of its last depth: its folder, such as "
        "RUN/sae/POINT/seed_0 of sae_train or one of SAELens, or an ae.pt of dictionary_learning; "
        "bundled:NAME",
    )
    n_latents: int = Field(
        default=20, ge=1, le=10**6, description="features that are taken out: those whose mean in "
        "clips without speech is most above that in speech"
    )  # fmt: skip
    alpha: SteeringStrength = Field(
        default=1.0, description="strength at which claims are judged: 1 takes features out, more "
        "pushes against them"
    )  # fmt: skip
    further_alphas: tuple[SteeringStrength, ...] = Field(
        default=(0.5, 2.0, 3.0), max_length=20, description="strengths beside it, for the curves"
    )
    n_random: int = Field(
        default=3, ge=1, le=1000, description="draws of as many other features, each one's nearest "
        "in mean activation in clips without speech"
    )  # fmt: skip
    choice_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of the clips, of speech and of none, on which "
        "features are chosen; the others are written down"
    )  # fmt: skip
    batch_size: BatchSize = 24

    @property
    def source(self) -> Any:
        """Where the clips are."""
        return SPOKEN_OR_NOT if self.audio == "bundled" else self.audio

    @property
    def alphas(self) -> tuple[float, ...]:
        """All strengths, ascending."""
        return tuple(sorted({self.alpha, *self.further_alphas}))
