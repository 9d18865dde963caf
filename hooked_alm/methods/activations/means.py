"""Means of points over a clip or a span: a row for every prompt, whatever its length."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32

from ...inputs import ALMInput
from ...model import HookedALM
from .collect import rows_of
from .selection import KeptPoint

PromptMeans = dict[str, Float32[np.ndarray, "prompt feature"]]
"""Point -> a row for every prompt."""


@torch.no_grad()
def means_of(
    model: HookedALM, x: ALMInput, kept: Sequence[KeptPoint], span: str = "audio"
) -> PromptMeans:
    """The mean of every point over a span of every prompt, in float64, then rounded.

    Args:
        model: to run.
        x: prompts.
        kept: points, from ``kept_points``; those of the encoder are averaged over the frames that
            hear the clip, padding left out, whatever the span.
        span: of the prompts.

    Raises:
        InputError: a span that the prompts lack.
    """
    found: PromptMeans = {}
    for kind, rows in rows_of(model, x, kept, [*dict.fromkeys([span, "audio"])]).items():
        is_ours = rows.index["span"].astype(str) == ("audio" if kind == "encoder" else span)
        places = [
            torch.from_numpy(np.flatnonzero(is_ours & (rows.index["prompt"] == prompt)))
            for prompt in range(len(x))
        ]
        for point, values in rows.values.items():
            means = [values[at.to(values.device)].double().mean(dim=0) for at in places]
            found[point] = torch.stack(means).float().cpu().numpy()
    return found
