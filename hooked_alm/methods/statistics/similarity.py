"""Similarity of two representations of the same samples: linear CKA (block S-10)."""

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError


def linear_cka(
    x: Float[Tensor, "sample x_feature"],
    y: Float[Tensor, "same y_feature"],
    *,
    debiased: bool = True,
) -> float:
    """Linear centred kernel alignment: ``‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F)`` of centred columns.

    1 for representations that differ by a rotation and a scale. The plain estimator (0 to 1) rises
    towards 1 for unrelated representations once features outnumber samples; the debiased one puts
    the unbiased estimator of HSIC in all three places, is near 0 for unrelated ones at any size,
    and can be slightly negative.

    Rows must be independent units, such as the mean over the valid frames of a clip: frames of one
    clip, or padded ones, are alike in any representation.

    Args:
        x: a row per sample; features in any number.
        y: another representation of the samples of ``x``, row by row.
        debiased: use the unbiased estimator.

    Returns:
        The similarity, computed in float64; NaN where a representation does not vary over samples,
        or where its own debiased HSIC is not positive.

    Raises:
        InputError: different samples, fewer than 4 of them (2 for the plain estimator), or NaN.

    Source: Kornblith et al. 2019, equation 5; unbiased HSIC: Song et al. 2012, equation 5.
    """
    _check(x, y, 4 if debiased else 2)
    kernels = _centred_gram(x, debiased), _centred_gram(y, debiased)
    n = len(x)
    cross, own_x, own_y = (
        _unbiased_hsic(a, b) if debiased else (a * b).sum() / (n - 1) ** 2
        for a, b in ((kernels[0], kernels[1]), (kernels[0],) * 2, (kernels[1],) * 2)
    )
    if not (own_x > 0 and own_y > 0):
        return float("nan")
    return float(cross / (own_x.sqrt() * own_y.sqrt()))


def _centred_gram(x: Tensor, debiased: bool) -> Float[Tensor, "sample sample"]:
    """Inner products of the samples; centred, or for the unbiased estimator without a diagonal.

    The unbiased estimator does not depend on the features' means, but rounding does.
    """
    x = x.double()
    centred = x - x.mean(dim=0)
    # What is left of a constant feature is rounding, and CKA would scale it up.
    rounding = 16 * torch.finfo(x.dtype).eps * x.abs().amax(dim=0)
    centred = centred.where((centred.abs() > rounding).any(dim=0), 0.0)
    gram = centred @ centred.T
    return gram.fill_diagonal_(0) if debiased else gram


def _unbiased_hsic(a: Tensor, b: Tensor) -> Float[Tensor, ""]:
    """Unbiased HSIC of two kernels with zero diagonals."""
    n = len(a)
    means = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * a.sum(0) @ b.sum(0) / (n - 2)
    return ((a * b).sum() + means) / (n * (n - 3))


def _check(x: Tensor, y: Tensor, n_needed: int) -> None:
    n_bad = [int((~torch.isfinite(one)).any(dim=1).sum()) for one in (x, y)]
    if len(x) != len(y) or len(x) < n_needed or any(n_bad):
        raise InputError(
            f"comparing representations: got {len(x)} and {len(y)} samples, {n_bad[0]} and "
            f"{n_bad[1]} of them with NaN or infinite features; expected the same samples in both, "
            f"at least {n_needed}, all finite. Leave out the samples that could not be measured."
        )
