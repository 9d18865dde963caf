"""How far an adapter turns a model's states, and the gradients of what is asked of it, by depth.

Source: Behind the Scenes, harryporry77/Behind-the-Scenes@affd12b; M-LO-6, C22.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ..attribution.gradients import embeddings_of, gradient_runs
from ..patching.measurement import Measurement
from ..patching.metrics import Metric
from ..statistics.similarity import linear_cka

PooledRows = Float[Tensor, "depth batch d_model"]


class PooledStream(NamedTuple):
    """Means over some positions of every prompt, at every depth 0..L."""

    states: PooledRows
    """Of the residual stream."""
    gradients: PooledRows
    """Of the metric's gradient at it."""


def pooled_stream(
    model: HookedALM,
    x: ALMInput,
    metric: Metric,
    places: Mapping[str, Bool[Tensor, "batch pos"]],
) -> dict[str, PooledStream]:
    """States and gradients of the stream, averaged over the positions of every place.

    A batch is run once and differentiated once; weights are not.

    Args:
        model: to run, as its adapter acts.
        x: prompts.
        metric: one number per prompt, such as the log-probability of an answer.
        places: name -> positions of every prompt.

    Raises:
        InputError: a prompt without a position in a place.
    """
    if empty := [name for name, mask in places.items() if not mask.any(dim=1).all()]:
        raise InputError(
            f"averaging over {', '.join(empty)}: some prompts have no such position. Leave these "
            "prompts out, or name another place."
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
        for name, mask in places.items()
    }


def cka_by_depth(
    one: Float[Tensor, "depth clip d_model"], other: Float[Tensor, "depth clip d_model"]
) -> list[float]:
    """Debiased CKA of the same clips in two models, at every depth; see `linear_cka`.

    1 where they differ by a rotation and a scale alone, NaN where a depth does not vary over clips.
    """
    return [linear_cka(a, b) for a, b in zip(one, other, strict=True)]


def stacked(parts: Sequence[PooledStream]) -> PooledStream:
    """The prompts of several batches, one after the other."""
    states, gradients = (torch.cat(some, dim=1) for some in zip(*parts, strict=True))
    return PooledStream(states, gradients)
