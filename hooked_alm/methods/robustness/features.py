"""Features of a dictionary in the place of neurons: how far an attack moves them, and patches.

Source: M-SP-5.
"""

from collections.abc import Sequence

import torch

from ...inputs import ALMInput
from ...model import HookedALM
from ..dictionary.autoencoder import SparseAutoencoder
from ..dictionary.splice import SpliceHook, splice_hooks
from ..dictionary.steering import as_far, exchange
from ..patching.row_edits import aligned_rows
from .sensitivity import SensitivityLog

SPAN = "audio"
"""Rows whose features are read and written: those that hear the clip."""


@torch.no_grad()
def feature_log(
    model: HookedALM, sae: SparseAutoencoder, point: str, clean: ALMInput, attacked: ALMInput
) -> SensitivityLog:
    """The log of a dictionary's features, one block of them; see ``sensitivity_log``.

    Args:
        model: to run.
        sae: the dictionary.
        point: hook point of its rows.
        clean: prompts.
        attacked: the same, with attacked clips of the same length.
    """
    log = SensitivityLog.empty(1, sae.cfg.d_sae)
    both = (aligned_rows(model, x, x, point, SPAN) for x in (clean, attacked))
    for mine, theirs in zip(*both, strict=True):
        log.add(0, sae.encode(mine.float()), sae.encode(theirs.float()))
        log.items += 1
        log.rows += len(mine)
    return log


@torch.no_grad()
def feature_hooks(
    model: HookedALM,
    sae: SparseAutoencoder,
    point: str,
    latents: Sequence[int],
    x: ALMInput,
    donor: ALMInput,
    *,
    is_dense: bool = False,
) -> list[SpliceHook]:
    """Hooks that write a donor's features: x' = x + sum over some of (f' - f) W_dec.

    Args:
        model: that runs.
        sae: the dictionary.
        point: hook point of its rows.
        latents: features that are written.
        x: the prompts that it will run on.
        donor: the same prompts with other clips of the same length.
        is_dense: move every row towards the donor's instead, as far as the features would: the
            control of equal size.
    """
    theirs = torch.cat(aligned_rows(model, x, donor, point, SPAN)).float()
    edit = exchange(sae, torch.tensor([*latents], dtype=torch.int64), sae.encode(theirs))
    if is_dense:
        edit = as_far(lambda rows: theirs.to(rows), edit)
    return splice_hooks(model, x, {point: edit}, SPAN)
