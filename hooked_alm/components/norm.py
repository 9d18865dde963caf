"""RMSNorm with TransformerLens' two hook points."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..hooks import HookPoint, is_hooked, tap


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale: ``w * x / sqrt(mean(x^2) + eps)``.

    The square, mean and division run in fp32; the result is cast to the input's dtype and only
    then multiplied by ``w``. The order matters in bf16.

    Hook points:
        ``hook_scale [..., 1]``, fp32, ``sqrt(mean(x^2) + eps)``: computed only when hooked.
        ``hook_normalized [..., d_model]``: before the multiplication by ``w``.

    Source: transformers 5.23 ``Qwen2RMSNorm``.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        """Allocate ``w``; ``eps`` is the checkpoint's."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def reset_parameters(self) -> None:
        """Scale 1, as an untrained norm has."""
        nn.init.ones_(self.weight)

    @property
    def w(self) -> Float[Tensor, " d_model"]:
        """The scale, under TransformerLens' name."""
        return self.weight

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Normalise the last axis."""
        scale = tap(self.hook_scale, self.scale(x)) if is_hooked(self.hook_scale) else None
        normalized = self.normalize(x) if scale is None else (x.float() / scale).to(x.dtype)
        return self.weight * self.hook_normalized(normalized)

    def scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Scale ``sqrt(mean(x^2) + eps)`` of the last axis, in fp32."""
        return (x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def normalize(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Normalised ``x / scale(x)``, without hooks and ``w``, by Hugging Face's formula."""
        x32 = x.to(torch.float32)
        mean_square = x32.pow(2).mean(-1, keepdim=True)
        return (x32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
