"""A clip as a model hears it at every depth of its encoder, and what it then writes down."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.reading.encoder_lens import (
    encoder_lens,
    heard_by_depth,
    transcripts_by_depth,
)
from hooked_alm.methods.reading.lens import lens_fidelity, residual_rows
from hooked_alm.methods.reading.transcripts import end_tokens
from hooked_alm.methods.statistics.critical_layer import settling_depths
from hooked_alm.methods.statistics.word_errors import distance

from ..workbench.experiment import Unit, UnitResult
from ..workbench.results import Row
from .clips import ClipFile, Sounds, sound_units
from .transcription import Transcription, TranscriptionConfig, TranscriptionExperiment


class ReadByDepthConfig(TranscriptionConfig):
    """Settings of experiments that ask at which depth a transcript is settled."""

    near: float = Field(
        default=0.1, ge=0, le=1,
        description="distance from the final transcript, as a share of the longer one's "
        "characters, up to which a transcript counts as it",
    )  # fmt: skip


D = TypeVar("D", bound=ReadByDepthConfig)


class ReadByDepth:
    """One encoding of a clip, and a transcript of each of its depths."""

    @torch.no_grad()
    def __init__(self, model: HookedALM, ours: Transcription, clip: ClipFile) -> None:
        """Runs the encoder, and the decoder on every depth."""
        self.model, self.ours, self.clip = model, ours, clip
        self.x = ours.input(clip).to(model.cfg.device)
        self.heard = heard_by_depth(model, self.x)
        most = ours.config.max_new_tokens
        self.said = transcripts_by_depth(
            model, self.x, self.heard, most, suppress=ours.config.suppress
        )
        # With the token that ends it, unless it was cut off.
        is_whole = len(self.said[-1]) < most
        self.final = [*self.said[-1], *(end_tokens(model)[:1] if is_whole else ())]

    def extended(self, tokens: Sequence[int]) -> ALMInput:
        """The prompt with a transcript behind it."""
        return self.x.extend(torch.tensor([tokens], dtype=torch.long, device=self.x.device))

    def log_probs(self, tokens: Sequence[int]) -> Float[Tensor, "depth token"]:
        """Log-probability of every token, given those before it, at every depth."""
        found = encoder_lens(self.model, self.extended(tokens), self.heard)
        return found[:, 0, found.shape[-1] - len(tokens) :]

    def distances(self) -> list[float]:
        """How far the transcript of every depth is from the final one."""
        texts = [self.ours.text(tokens) for tokens in self.said]
        return [distance(texts[-1], text, normalise=self.ours.normalise) for text in texts]

    @torch.no_grad()
    def streams(self) -> Float[Tensor, "depth 1 token d_model"]:
        """The decoder's stream where it predicts each token of the final transcript."""
        y, n = self.extended(self.final), len(self.final)
        first = y.shape[1] - n - 1
        return residual_rows(self.model, y, torch.arange(first, first + n)[None])

    def saturation(
        self, streams: Float[Tensor, "depth 1 token d_model"]
    ) -> Int[np.ndarray, " token"]:
        """The decoder's depth from which the logit lens reads each token for good (M-BT-2)."""
        agrees = lens_fidelity(self.model, streams).agrees[:, 0].T.cpu().numpy() > 0
        return settling_depths(agrees).astype(np.int64)

    def check(self, log_p: Float[Tensor, " token"]) -> Row:
        """The last depth against the model, which knows of no depths.

        Args:
            log_p: of the final transcript at the last depth.
        """
        assert self.model.audio is not None
        with torch.no_grad():
            logits = self.model(self.extended(self.final))[0, -len(self.final) - 1 : -1]
        said = torch.tensor(self.final, device=logits.device)
        own = logits.log_softmax(-1).gather(-1, said[:, None])[:, 0]
        return {
            "memory": float((self.model.audio.heard(self.x) - self.heard[-1]).abs().max()),
            "log_p": float((own - log_p).abs().max()),
            "not_greedy": float((logits.argmax(-1) != said).double().mean()),
        }


class ReadByDepthExperiment(TranscriptionExperiment[D]):
    """An experiment that reads every clip at all depths of the encoder: a unit for each."""

    def check_model(self) -> None:
        """Refuse an encoder without hooks."""
        self.model.towards("encoder")

    def units(self) -> list[Unit]:
        """A unit for each clip, then how the clips sound."""
        units = [Unit(f"clip__{one.name}", one) for one in self.ours.clips]
        return units + sound_units(self.ours.clips)

    @abstractmethod
    def read(self, clip: ClipFile) -> UnitResult:
        """The rows of a clip."""

    def measure(self, unit: Unit) -> UnitResult:
        """All depths of a clip, or the sound of some clips."""
        work = unit.payload
        return work.measured() if isinstance(work, Sounds) else self.read(work)
