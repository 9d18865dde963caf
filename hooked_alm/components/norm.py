"""RMSNorm and LayerNorm with TransformerLens' two hook points."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import StackConfig
from ..hooks import HookPoint, is_hooked, tap


def norm_of(cfg: StackConfig) -> "RMSNorm | LayerNorm":
    """A norm over the residual stream, of the kind that the blocks have."""
    kind = LayerNorm if cfg.normalization_type == "LN" else RMSNorm
    return kind(cfg.d_model, cfg.eps)


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
        normalized = self.normalize(x) if scale is None else self.divided(x, scale)
        return self.affine(self.hook_normalized(normalized))

    def affine(self, normalized: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Output for the normalised input."""
        return self.weight * normalized

    def divided(
        self, x: Float[Tensor, "... d_model"], scale: Float[Tensor, "... 1"]
    ) -> Float[Tensor, "... d_model"]:
        """Normalised input, by a scale that need not be its own."""
        return (x.float() / scale).to(x.dtype)

    def scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Scale ``sqrt(mean(x^2) + eps)`` of the last axis, in fp32."""
        return (x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def normalize(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Normalised ``x / scale(x)``, without hooks and ``w``, by Hugging Face's formula."""
        x32 = x.to(torch.float32)
        mean_square = x32.pow(2).mean(-1, keepdim=True)
        return (x32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Subtract the mean and divide by the standard deviation, then scale and shift.

    ``w * (x - mean(x)) / sqrt(var(x) + eps) + b``, by PyTorch's fused kernel, which rounds
    otherwise than the formula. So both points are on demand, and the formula is used where hooks
    changed something.

    Hook points:
        ``hook_scale [..., 1]``, fp32, ``sqrt(var(x) + eps)``.
        ``hook_normalized [..., d_model]``: before the scale and the shift.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        """Allocate ``w`` and ``b``."""
        super().__init__(d_model, eps=eps)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    @property
    def w(self) -> Float[Tensor, " d_model"]:
        """The scale, under TransformerLens' name."""
        return self.weight

    @property
    def b(self) -> Float[Tensor, " d_model"]:
        """The shift, under TransformerLens' name."""
        return self.bias

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Normalise the last axis."""
        normalized = None
        if is_hooked(self.hook_scale):
            scale = tap(self.hook_scale, self.scale(x))
            normalized = None if scale is None else self.divided(x, scale)
        if is_hooked(self.hook_normalized):
            value = self.normalize(x) if normalized is None else normalized
            changed = tap(self.hook_normalized, value)
            normalized = normalized if changed is None else changed
        if normalized is not None:
            return self.affine(normalized)
        if x.dtype != self.weight.dtype:  # a stream that is read out in fp32
            w, b = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, w, b, self.eps)
        return super().forward(x)

    def affine(self, normalized: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Output for the normalised input."""
        return normalized * self.weight + self.bias

    def divided(
        self, x: Float[Tensor, "... d_model"], scale: Float[Tensor, "... 1"]
    ) -> Float[Tensor, "... d_model"]:
        """Normalised input, by a scale that need not be its own."""
        return (_centred(x) / scale).to(x.dtype)

    def scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Scale ``sqrt(var(x) + eps)`` of the last axis, in fp32."""
        return (_centred(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def normalize(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Normalised ``(x - mean(x)) / scale(x)``, without hooks, ``w`` and ``b``."""
        return self.divided(x, self.scale(x))


def _centred(x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    return x.float() - x.float().mean(-1, keepdim=True)
