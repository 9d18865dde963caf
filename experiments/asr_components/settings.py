"""Settings of ``asr_components``."""

from typing import Annotated, Any, Literal

from pydantic import Field

from hooked_alm.methods.attribution.head_gates import HeadKind

from ..materials.transcription import SPOKEN_OR_NOT, TranscriptionConfig
from ..workbench.batches import BatchedConfig, BatchSize

HeadScope = Literal["cell", "all_blocks"]
HeadAblation = Literal["zero", "mean"]
HeadCount = Annotated[int, Field(ge=0, le=10_000)]


class AsrComponentsConfig(TranscriptionConfig, BatchedConfig):
    """Which clips are written down, and which heads are left out while they are."""

    kinds: tuple[HeadKind, ...] = Field(
        default=("cross", "self"), min_length=1, max_length=2,
        description="heads of cross-attention, of self-attention; a language model has the latter",
    )  # fmt: skip
    scopes: tuple[HeadScope, ...] = Field(
        default=("cell", "all_blocks"), min_length=1, max_length=2,
        description="what is left out at once: a head of one block, or of all blocks",
    )  # fmt: skip
    ablation: HeadAblation = Field(
        default="zero", description="what a head that is left out writes instead: nothing, or its "
        "mean over all clips, each over its prompt and transcript"
    )  # fmt: skip
    n_exact: HeadCount = Field(
        default=6, description="of each kind and scope, the heads that the gradient says do most, "
        "left out exactly, while decoding, for circles and for words out of nothing"
    )  # fmt: skip
    n_random: HeadCount = Field(
        default=3, description="heads beside them whose outputs are about as long as theirs"
    )
    discovery_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of the clips on which the best head is chosen; "
        "it is judged on the others"
    )  # fmt: skip
    batch_size: BatchSize = 12

    @property
    def source(self) -> Any:
        """Where the clips are."""
        return SPOKEN_OR_NOT if self.audio == "bundled" else self.audio
