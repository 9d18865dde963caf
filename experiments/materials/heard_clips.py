"""Clips under one instruction: the settings that say which, and what a model hears of them."""

from collections.abc import Sequence

from pydantic import Field

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput, AudioClip

from ..workbench.settings import ExperimentConfig, Truncate
from .clips import ClipFile
from .hearing import heard_under


class HeardClipsConfig(ExperimentConfig):
    """Settings of experiments that let a model hear clips, whatever it then answers."""

    prompt: str | None = Field(
        default="What do you hear?",
        description="instruction under which clips are heard; Whisper is given none",
    )
    language: str | None = Field(
        default=None, description="spoken in all clips; Whisper's prompts name one"
    )
    truncate: Truncate = False

    def read(self, model: HookedALM, clip: ClipFile) -> AudioClip:
        """A clip as the encoder reads it, under the name that results have."""
        read = model.read_clip(clip.path, truncate=self.truncate)
        read.name = clip.name
        return read

    def heard(
        self, model: HookedALM, clips: Sequence[AudioClip], *, stand_in: str | None = None
    ) -> ALMInput:
        """The clips under the instruction, left-padded; see ``heard_under``."""
        return heard_under(model, clips, self.prompt, self.language, stand_in=stand_in)
