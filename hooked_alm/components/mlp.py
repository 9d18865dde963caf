"""The MLPs of blocks: gated (Qwen2, LLaMA), and plain (Whisper)."""

from typing import ClassVar

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..axes import Resid
from ..config import StackConfig
from ..errors import ConversionError, nearest
from ..hooks import HookPoint


class MLP(nn.Module):
    """Plain MLP ``down(act(up(x)))``.

    Hook points, both ``[batch, pos, d_mlp]``: ``hook_pre`` = up(x); ``hook_post`` = act(up(x)).

    Source: transformers 5.23 ``WhisperEncoderLayer`` (``fc1``, ``fc2``).
    """

    POINTS: ClassVar[tuple[str, ...]] = ("hook_pre", "hook_post")
    hook_pre: HookPoint
    hook_post: HookPoint

    def __init__(self, cfg: StackConfig) -> None:
        """Allocate the projections.

        Raises:
            ConversionError: transformers has no such activation.
        """
        from transformers.activations import ACT2FN

        if cfg.act_fn not in ACT2FN:
            raise ConversionError(
                f"laying out an MLP: got the activation {cfg.act_fn!r}, expected one that "
                f"transformers has (nearest: {nearest(str(cfg.act_fn), ACT2FN)})."
            )
        super().__init__()
        self.cfg = cfg
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.mlp_bias)
        self.act_fn = ACT2FN[cfg.act_fn]
        for name in self.POINTS:
            setattr(self, name, HookPoint())

    def forward(self, x: Resid) -> Resid:
        """What the MLP writes to the residual stream."""
        return self.written(self.hook_post(self.act_fn(self.hook_pre(self.up_proj(x)))))

    def neurons(self, x: Resid) -> Float[Tensor, "batch pos d_mlp"]:
        """Values of ``hook_post`` for the normalised ``x``; fires no hook."""
        neurons: Tensor = self.act_fn(self.up_proj(x))
        return neurons

    def written(self, post: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """What neurons add to the residual stream."""
        out = self.down_proj(post)
        return out if self.cfg.residual_multiplier == 1 else out * self.cfg.residual_multiplier

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """View of the up projection."""
        return rearrange(self.up_proj.weight, "f d -> d f")

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """View of the down projection, unless the config multiplies what it writes."""
        weight = rearrange(self.down_proj.weight, "d f -> f d")
        by = self.cfg.residual_multiplier
        return weight if by == 1 else weight * by

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Bias of the up projection; zeros where it has none."""
        bias: Tensor | None = self.up_proj.bias
        return self.up_proj.weight.new_zeros(self.up_proj.out_features) if bias is None else bias

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Bias of the down projection; zeros where it has none."""
        bias: Tensor | None = self.down_proj.bias
        n = self.down_proj.out_features
        return self.down_proj.weight.new_zeros(n) if bias is None else bias


class GatedMLP(MLP):
    """Gated MLP ``down(act(gate(x)) * up(x))``.

    Hook points, all ``[batch, pos, d_mlp]``, in firing order: ``hook_pre`` = gate(x);
    ``hook_gate`` = act(gate(x)), which TransformerLens does not have and neuron methods need;
    ``hook_pre_linear`` = up(x); ``hook_post`` = their product.

    Source: transformers 5.23 ``Qwen2MLP``.
    """

    POINTS = ("hook_pre", "hook_gate", "hook_pre_linear", "hook_post")
    hook_gate: HookPoint
    hook_pre_linear: HookPoint

    def __init__(self, cfg: StackConfig) -> None:
        """Allocate the three projections; see `MLP` for errors."""
        super().__init__(cfg)
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)

    def forward(self, x: Resid) -> Resid:
        """What the MLP writes to the residual stream."""
        gate = self.hook_gate(self.act_fn(self.hook_pre(self.gate_proj(x))))
        return self.written(self.hook_post(gate * self.hook_pre_linear(self.up_proj(x))))

    def neurons(self, x: Resid) -> Float[Tensor, "batch pos d_mlp"]:
        """Values of ``hook_post`` for the normalised ``x``; fires no hook."""
        neurons: Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return neurons

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """View of the gate projection."""
        return rearrange(self.gate_proj.weight, "f d -> d f")
