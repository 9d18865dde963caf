"""What a lens reads of each prompt's own label at every depth, and what the lens is worth there.

Source: AudioLens; M-AL-2.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...model import HookedALM
from ..result import MethodResult
from ..statistics.information import Information, information_scores
from .labels import LabelSet
from .lens import LOGIT_LENS, Lens, LensFidelity, Rows, lens_fidelity, read_rows


@dataclass(frozen=True, kw_only=True, repr=False)
class LabelsByDepth(MethodResult):
    """Labels as a lens reads them."""

    best: Int[Tensor, "depth batch pos"]
    """The label with the highest score, the first of equals."""
    information: Information
    """Of each prompt's own label."""
    fidelity: LensFidelity
    """Distance of the lens from the model's output."""


@torch.no_grad()
def read_labels(
    model: HookedALM,
    rows: Rows,
    labels: LabelSet,
    own: Int[Tensor, " batch"],
    lens: Lens = LOGIT_LENS,
) -> LabelsByDepth:
    """The labels at every depth and position.

    Args:
        model: whose lens it is.
        rows: from ``residual_rows``.
        labels: that are told apart.
        own: the right one of each prompt.
        lens: see ``logit_lens``.

    Raises:
        InputError: fewer than two labels; and see ``read_rows``.
    """
    scores: Float[Tensor, "depth batch pos label"]
    scores = labels.scores(read_rows(model, rows, labels.tokens, lens))
    fidelity = lens_fidelity(model, rows, lens=lens)
    right = own.to(scores.device)[:, None].expand(-1, rows.shape[2])
    return LabelsByDepth(
        best=scores.argmax(-1),
        information=information_scores(scores, right, fidelity.normaliser),
        fidelity=fidelity,
    )
