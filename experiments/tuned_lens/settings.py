"""Settings of ``tuned_lens``."""

from typing import ClassVar

from pydantic import Field, model_validator

from hooked_alm.errors import InputError
from hooked_alm.methods.reading.tuned_lens import LensOptimizer, LensTraining

from ..materials.checkpoints import StepsPerCheckpoint
from ..materials.sources import Source
from ..materials.trained_lens import Scored
from ..workbench.batches import BatchedConfig
from ..workbench.settings import MOST_BYTES, Truncate

SCORED: dict[Scored, str] = {
    "all": "every position, audio included",
    "without_audio": "every position but the audio's",
    "readout": "the readout alone",
}
"""Positions that the loss counts, in words."""


class TunedLensConfig(BatchedConfig):
    """Which prompts, which positions of them, and how the translators are trained."""

    KNOWN_WITH: ClassVar = ("audio", "prompts")

    audio: Source = Field(
        default="bundled",
        description="folder of OB1-named clips, or with a manifest; put under OB1's instructions",
    )
    prompts: Source | None = Field(
        default=None,
        description="a JSONL file of your own prompts instead (see experiments/tuned_lens_prompts)",
    )
    truncate: Truncate = False
    scored: Scored = Field(
        default="all",
        description="positions that the loss counts; with readout a prompt is one token, so give "
        "many of them",
    )
    held_out_share: float = Field(
        default=0.4, gt=0, lt=1, description="share of the groups (clips) that no step trains on"
    )
    n_steps: int = Field(default=250, ge=1, le=10**6, description="of training")
    prompts_per_step: int = Field(
        default=8, ge=1, le=10**6, description="the authors' code takes 2^18 tokens a step"
    )
    optimizer: LensOptimizer = Field(default="sgd", description="sgd has Nesterov momentum")
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="at its highest; None is 0.1 for sgd, 0.001 for adam",
    )
    weight_decay: float = Field(
        default=1e-3, ge=0, le=1000, description="pull of each translator towards no change"
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=1e9, description="of all depths together; longer gradients are cut"
    )
    steps_per_checkpoint: StepsPerCheckpoint = 50
    chunk: int = Field(
        default=128,
        ge=1,
        le=10**6,
        description="tokens whose vocabulary-sized tensors are held at once",
    )
    max_bytes: int = Field(
        default=2**30,
        ge=0,
        le=MOST_BYTES,
        description="residual streams that are kept between steps; prompts whose are not run one "
        "by one, again and again",
    )

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "TunedLensConfig":
        if self.prompts is not None and self.audio != "bundled":
            raise ValueError("prompts name their own audio: give prompts or audio, not both")
        try:
            self.training()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def training(self) -> LensTraining:
        """Optimiser and schedule."""
        return LensTraining(
            n_steps=self.n_steps,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )
