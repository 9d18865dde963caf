"""How far an adapter turns a model's states, and the gradients of what is asked of it, by depth.

Source: Behind the Scenes, harryporry77/Behind-the-Scenes@affd12b; M-LO-6, C22.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ..attribution.gradients import embeddings_of, gradient_runs
from ..patching.measurement import Measurement
from ..patching.metrics import Metric
from ..statistics.similarity import linear_cka
from .switching import adapted_blocks, switched

LEAST_CLIPS = 4
PooledRows = Float[Tensor, "depth batch d_model"]


class PooledStream(NamedTuple):
    """Means over some positions of every prompt, at every depth 0..L."""

    states: PooledRows
    """Of the residual stream."""
    gradients: PooledRows
    """Of the metric's gradient at it."""


class DepthSimilarity(NamedTuple):
    """How alike clips are arranged at a depth with the adapter and without."""

    span: str
    of: str
    """States or gradients."""
    depth: int
    cka: float
    """Debiased; 1 where a rotation and a scale are all that differs, NaN where clips do not."""
    dealt: float
    """The same of clips that are dealt out anew."""
    n: int
    """Clips."""


def pooled_stream(
    model: HookedALM,
    x: ALMInput,
    metric: Metric,
    spans: Sequence[str],
) -> dict[str, PooledStream]:
    """States and gradients of the stream, averaged over the positions of every span.

    A batch is run once and differentiated once; weights are not.

    Args:
        model: to run, as its adapter acts.
        x: prompts.
        metric: one number per prompt, such as the log-probability of an answer.
        spans: names, such as audio or readout.

    Raises:
        InputError: no such span, or a prompt that has none of its positions.
    """
    masks = {name: x.spans.mask(name) for name in spans}
    if empty := [name for name, mask in masks.items() if not mask.any(dim=1).all()]:
        raise InputError(
            f"averaging over {', '.join(empty)}: some prompts have no such position. Leave these "
            "prompts out, or name another span."
        )
    measured = Measurement(model, x, None, metric)
    names = model.depth_names()
    [run] = gradient_runs(measured, embeddings_of(measured.base_runs, x), names)

    def pooled(values: dict[str, Tensor], mask: Tensor) -> PooledRows:
        found = []
        for name in names:
            own = values[name].double()
            weight = mask.to(own)[..., None]
            found.append(((own * weight).sum(dim=1) / weight.sum(dim=1)).cpu())
        return torch.stack(found)

    return {
        name: PooledStream(pooled(run.values, mask), pooled(run.gradients, mask))
        for name, mask in masks.items()
    }


def cka_by_depth(
    one: Float[Tensor, "depth clip d_model"], other: Float[Tensor, "depth clip d_model"]
) -> list[float]:
    """Debiased CKA of the same clips in two models, at every depth; see `linear_cka`.

    1 where they differ by a rotation and a scale alone, NaN where a depth does not vary over clips.
    """
    return [linear_cka(a, b) for a, b in zip(one, other, strict=True)]


class TurnedStream:
    """Pooled streams of many clips, without the adapter and with it."""

    def __init__(self, model: HookedALM) -> None:
        """Has seen no clip yet."""
        self.model, self.blocks = model, adapted_blocks(model)
        self._parts: dict[str, tuple[list[PooledStream], list[PooledStream]]] = {}

    def add(self, x: ALMInput, metric: Metric, spans: Sequence[str]) -> None:
        """Runs a batch of one prompt per clip both ways; see `pooled_stream`."""
        for way, on in enumerate(([], self.blocks)):
            with switched(self.model, on):
                found = pooled_stream(self.model, x, metric, spans)
            for name, pooled in found.items():
                self._parts.setdefault(name, ([], []))[way].append(pooled)

    def similarity(self, seed: int) -> Iterator[DepthSimilarity]:
        """Debiased CKA of every span and depth, beside that of clips that are dealt out anew.

        Raises:
            InputError: fewer than `LEAST_CLIPS`, of which there is no unbiased estimator.
        """
        for span, (base, adapted) in self._parts.items():
            for i, of in enumerate(PooledStream._fields):
                one, other = (torch.cat([part[i] for part in some], 1) for some in (base, adapted))
                dealt = np.random.default_rng(seed).permutation(one.shape[1])
                both = cka_by_depth(one, other), cka_by_depth(one, other[:, dealt])
                for depth, (cka, by_chance) in enumerate(zip(*both, strict=True)):
                    yield DepthSimilarity(span, of, depth, cka, by_chance, len(dealt))
