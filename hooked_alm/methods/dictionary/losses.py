"""What a dictionary is trained to make small."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import SparseAutoencoder


def unexplained(
    x: Float[Tensor, "row d_in"], reconstruction: Float[Tensor, "row d_in"]
) -> Float[Tensor, ""]:
    """Fraction of the rows' variance that a reconstruction leaves unexplained (FVU).

    ``sum |x - x'|^2 / sum |x - mean(x)|^2``; 0 where rows have neither variance nor error.
    """
    error = (x - reconstruction).square().sum()
    return error / (x - x.mean(0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)


def dead_latent_loss(
    sae: SparseAutoencoder,
    x: Float[Tensor, "row d_in"],
    residual: Float[Tensor, "row d_in"],
    dead: Bool[Tensor, " latent"],
    k: int,
) -> Float[Tensor, ""]:
    """How badly the dead latents alone reconstruct what the others have left (AuxK).

    Source: Gao et al. 2024 (arXiv 2406.04093), A.2, with the residual's own variance as the unit
    (``TopKTrainer.get_auxiliary_loss`` of dictionary_learning 0.1.0). The gradient reaches the
    encoder of the dead latents (sparsify 1.3.3 drops it: C42), and what is reconstructed is
    ``x - x'`` (FREUD has its negative: C43). Pre-activations pass a ReLU first, so that a latent
    which is never positive is not revived.

    Args:
        sae: the dictionary.
        x: rows.
        residual: of their reconstruction, ``x - x'``; without a gradient.
        dead: latents to revive.
        k: most dead latents that may be active in a row.
    """
    numbers = dead.nonzero().flatten()
    if not len(numbers):
        return x.new_zeros(())
    pre = F.linear(x - sae.b_dec, sae.encoder[numbers], sae.b_enc[numbers]).relu()
    if k < len(numbers):
        kept = pre.topk(k, dim=-1, sorted=False).indices
        pre = pre * torch.zeros_like(pre).scatter_(-1, kept, 1.0)
    return unexplained(residual, pre @ sae.W_dec[numbers])


class _Step(torch.autograd.Function):
    """1 above a threshold and else 0; see ``stepped``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(value, threshold)
        ctx.bandwidth = bandwidth
        return (value > threshold).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (value, threshold) = grads, ctx.saved_tensors
        is_near = (value - threshold).abs() < ctx.bandwidth / 2
        return None, is_near * -grad / ctx.bandwidth, None


def stepped(
    value: Float[Tensor, " active"], threshold: Float[Tensor, " active"], bandwidth: float
) -> Float[Tensor, " active"]:
    """1 above the threshold and else 0, whose pseudo-derivative moves the threshold alone.

    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), eq. 12, with a rectangle as the kernel.

    Args:
        value: pre-activations.
        threshold: of each value's latent.
        bandwidth: of the kernel.
    """
    return _Step.apply(value, threshold, bandwidth)  # type: ignore[no-untyped-call]


def jumped(
    value: Float[Tensor, " active"], threshold: Float[Tensor, " active"], bandwidth: float
) -> Float[Tensor, " active"]:
    """JumpReLU of values, with the pseudo-derivative of eq. 11; see ``stepped``.

    The threshold's is that of a step as high as the threshold, which the second term adds.
    """
    is_above = (value > threshold).to(value.dtype)
    step = stepped(value.detach(), threshold, bandwidth)
    return value * is_above + threshold.detach() * (step - is_above)
