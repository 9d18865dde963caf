"""Clips written down, with all heads or without some, and which heads their failures rest on."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.attribution.head_gates import (
    HeadKind,
    HeadMeans,
    head_point,
    screen_heads,
    without_head,
)  # fmt: skip
from hooked_alm.methods.reading.transcripts import mean_log_p, with_transcripts
from hooked_alm.methods.statistics.repetition import loops, repetition

from ..materials.clips import ClipFile
from ..materials.kept_features import ClipFeatures
from ..materials.transcription import Transcription
from ..workbench.results import Row
from .plan import ALL, Failure, HeadNode


class Decoder:
    """A model that writes clips down, all of a batch at once."""

    def __init__(self, model: HookedALM, ours: Transcription) -> None:
        self.model, self.ours = model, ours

    def write(
        self, x: ALMInput, without: HeadNode | None = None, stead: HeadMeans | None = None
    ) -> list[list[int]]:
        """Greedy tokens of every prompt, without those that end them."""
        if without is None:
            return self.ours.write(x, [])
        points = points_of(self.model, without)
        return self.ours.write(x, without_head(points, without.head, stead))

    @torch.no_grad()
    def means(
        self, x: ALMInput, said: Sequence[Sequence[int]], kinds: Sequence[HeadKind]
    ) -> list[ClipFeatures]:
        """Mean outputs of all heads over each prompt and its transcript, by their points."""
        y, layers = with_transcripts(x, said), range(len(self.model.path))
        points = [head_point(self.model, kind, layer) for kind in kinds for layer in layers]
        _, cache = self.model.run_with_cache(y, names_filter=points)

        def mean(z: Tensor, is_real: Tensor) -> Any:
            return z[is_real.to(z.device)].double().mean(0).flatten().float().cpu().numpy()

        rows = enumerate(y.attention_mask.bool())
        return [{name: mean(cache[name][row], real) for name in points} for row, real in rows]

    def row(self, clip: ClipFile, tokens: Sequence[int]) -> Row:
        """What came of a clip."""
        row = self.ours.row(clip, tokens)
        return {**row, "loops": float(loops(tokens)), "repetition": repetition(tokens, 1)}

    def screen(self, x: ALMInput, tokens: Sequence[int], failure: Failure) -> Iterator[Row]:
        """What closing each head would do to the failing transcript of one clip.

        The objective is the mean of its tokens' log-probabilities.
        """
        said = torch.tensor([tokens], dtype=torch.long, device=x.device)
        found = screen_heads(self.model, x.extend(said), partial(mean_log_p, said))
        for kind, screen in found.items():
            for layer, head in np.ndindex(*screen.effect.shape[:2]):
                yield {
                    "of": failure, "kind": kind, "layer": layer, "head": head,
                    "effect": float(screen.effect[layer, head, 0]),
                    "norm": float(screen.norm[layer, head, 0]),
                }  # fmt: skip


def points_of(model: HookedALM, node: HeadNode) -> list[str]:
    """The hook points that a head writes to."""
    layers = range(len(model.path)) if node.layer == ALL else [node.layer]
    return [head_point(model, node.kind, layer) for layer in layers]
