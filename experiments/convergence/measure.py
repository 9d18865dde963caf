"""What is measured of a clip at every depth: transcripts, and the encoder's own stream."""

from collections.abc import Iterator
from typing import get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_alm.methods.statistics.similarity import linear_cka

from ..materials.read_by_depth import ReadByDepth
from ..materials.transcription import whose
from ..workbench.experiment import UnitResult
from ..workbench.results import Row
from .settings import ConvergenceConfig, FrameRows

FrameStates = Float[Tensor, "depth row d_audio"]
MIN_ROWS = 4
"""Of fewer rows, the unbiased estimator of CKA is not defined."""


class DepthMeasures(ReadByDepth):
    """The rows of a clip."""

    @torch.no_grad()
    def result(self, config: ConvergenceConfig) -> UnitResult:
        """All of them."""
        log_p = self.log_probs(self.final)
        tables: dict[str, list[Row]] = {
            "transcripts": [
                {"depth": depth, "distance": far, "log_p": float(log_p[depth].double().mean())}
                for depth, far in enumerate(self.distances())
            ],
            "tokens": [
                {"place": place, "depth": int(depth)}
                for place, depth in enumerate(self.saturation(self.streams()))
            ],
            "streams": [*self._streams(config.massive)],
            "checks": [self.check(log_p[-1])],
        }
        who = whose(self.clip)
        return UnitResult.of(who, tables)

    def _streams(self, factor: float) -> Iterator[Row]:
        """Norms and similarity to the last state, at every depth and over each choice of rows."""
        states, is_own = self._states()
        chosen = rows_of_a_clip(states, is_own, factor)
        for name in get_args(FrameRows):
            some = states[:, torch.from_numpy(chosen[name])]
            for depth, one in enumerate(some):
                centred = one - one.mean(dim=-1, keepdim=True)
                yield {
                    "rows": name, "depth": depth, "n_rows": len(one),
                    "raw_norm": float(one.norm()), "centred_norm": float(centred.norm()),
                    "cka": _cka(one, some[-1], debiased=True),
                    "plain_cka": _cka(one, some[-1], debiased=False),
                }  # fmt: skip

    def _states(self) -> tuple[FrameStates, Bool[np.ndarray, " row"]]:
        """The encoder's stream in float64, and which of its rows hear the clip."""
        heard = self.model.towards("encoder")
        names, rows = heard.depth_names(), self.model.encoder_rows(self.x)
        _, kept = heard.run_with_cache(self.x, names_filter=names, return_cache_object=False)
        states = torch.stack([rows.by_prompt(name, kept[name])[0] for name in names])
        is_own: Bool[np.ndarray, " row"] = rows.prompts.spans.mask("audio")[0].cpu().numpy()
        return states.double().cpu(), is_own


def rows_of_a_clip(
    states: FrameStates, is_own: Bool[np.ndarray, " row"], factor: float
) -> dict[FrameRows, Bool[np.ndarray, " row"]]:
    """Which rows of the stream each choice means; a massive row is so at some depth."""
    norms = states.norm(dim=-1).numpy()
    is_massive = (norms > factor * np.median(norms, axis=1, keepdims=True)).any(axis=0)
    return {"own": is_own, "all": np.ones_like(is_own), "without_massive": is_own & ~is_massive}


def _cka(one: Tensor, last: Tensor, *, debiased: bool) -> float:
    return linear_cka(one, last, debiased=debiased) if len(one) >= MIN_ROWS else float("nan")
