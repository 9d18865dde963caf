"""Rows through a dictionary in training, with gradients at the cost of what is active."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import SparseAutoencoder
from .codes import Active, above_threshold, batch_top_k, decoded, encoded, top_k
from .losses import jumped, stepped


class Reconstruction(NamedTuple):
    """What a dictionary makes of a batch."""

    pre: Float[Tensor, "row latent"]
    """Pre-activations, without a gradient."""
    active: Active
    value: Float[Tensor, " active"]
    """Activations of the pairs, some of which may be 0."""
    rows: list[Float[Tensor, "_row d_in"]]
    """Reconstructions by each prefix of matryoshka; the whole dictionary's comes last."""
    l0: Float[Tensor, ""]
    """Active latents a row; its gradient moves the thresholds of jumprelu."""


def reconstructed(
    sae: SparseAutoencoder,
    x: Float[Tensor, "row d_in"],
    *,
    bandwidth: float = 0.001,
    above: float = 0.0,
) -> Reconstruction:
    """Reconstructs rows as in training: batchtopk and matryoshka choose among the whole batch.

    Args:
        sae: the dictionary.
        x: rows.
        bandwidth: of jumprelu's pseudo-derivative.
        above: see ``batch_top_k``.
    """
    cfg, centred = sae.cfg, x - sae.b_dec
    with torch.no_grad():
        pre = F.linear(centred, sae.encoder, sae.b_enc)
        if cfg.architecture == "topk":
            active = top_k(pre, cfg.n_active)
        elif cfg.architecture == "jumprelu":
            # Those just below it, too, move their threshold.
            active = above_threshold(pre, sae.threshold - bandwidth / 2)
        elif cfg.architecture == "standard":
            active = above_threshold(pre, torch.zeros_like(sae.b_enc))
        else:
            active = batch_top_k(pre, cfg.n_active, above=above)
    value = encoded(pre, centred, sae.encoder, sae.b_enc, active)
    if cfg.architecture == "jumprelu":
        threshold = sae.threshold[active.latent]
        l0 = stepped(value, threshold, bandwidth).sum() / len(x)
        value = jumped(value, threshold, bandwidth)
    else:
        value = value.relu()
        l0 = (value > 0).sum() / len(x)
    return Reconstruction(pre, active, value, _by_prefix(sae, active, value), l0)


def _by_prefix(sae: SparseAutoencoder, active: Active, value: Tensor) -> list[Tensor]:
    if not sae.cfg.prefixes:
        return [sae.b_dec + decoded(value, sae.W_dec, active)]
    first, found, total = 0, list[Tensor](), sae.b_dec.expand(active.n_rows, -1)
    for stop in sae.cfg.prefixes:
        some, kept = active.part(first, stop)
        total = total + decoded(value[kept], sae.W_dec, some)
        found.append(total)
        first = stop
    return found
