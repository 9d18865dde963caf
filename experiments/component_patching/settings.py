"""Settings of ``component_patching``."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hooked_alm.bundled import ASSETS
from hooked_alm.methods.patching.options import Engine

from ..materials.transcription import TranscriptionConfig
from ..workbench.settings import EngineBytes

CONFUSABLE = ASSETS / "confusable"
"""Clips that the package carries: sentences that call for another word than is said in them."""
PatchedStack = Literal["encoder", "decoder"]
PatchedSite = Literal["block", "attn", "cross_attn", "mlp", "head"]
Strength = Annotated[float, Field(ge=0, le=1)]


class ComponentPatchingConfig(TranscriptionConfig):
    """Which sentences are asked about, and what components are patched towards."""

    stacks: tuple[PatchedStack, ...] = Field(
        default=("encoder", "decoder"), min_length=1, max_length=2, description="that are patched"
    )
    sites: tuple[PatchedSite, ...] = Field(
        default=("block", "attn", "cross_attn", "mlp", "head"), min_length=1, max_length=5,
        description="that are patched, at all positions at once: the stream behind a block, what "
        "its parts write, and what each of its heads does",
    )  # fmt: skip
    alphas: tuple[Strength, ...] = Field(
        default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=2, max_length=100,
        description="strengths α of (1 − α) a + α a_ref towards noise, 0 and 1 among them; other "
        "references, and one draw of noise for heads, at 1 alone",
    )  # fmt: skip
    n_noise: int = Field(
        default=5, ge=1, le=1000, description="draws of white noise, of each clip's length and RMS"
    )
    discovery_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of the clips on which the best component is "
        "chosen; it is judged on the others"
    )  # fmt: skip
    engine: Engine = Field(default="fast", description="hooks is one whole forward per cell")
    max_bytes: EngineBytes = 2**28

    @field_validator("alphas")
    @classmethod
    def _have_their_ends(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if not {0.0, 1.0} <= {*alphas} or len({*alphas}) < len(alphas):
            raise ValueError("different strengths, with 0 and 1 among them")
        return alphas

    @property
    def source(self) -> Any:
        """Where the clips are."""
        return CONFUSABLE if self.audio == "bundled" else self.audio
