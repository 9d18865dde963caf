"""The gated MLP of Qwen2 and LLaMA."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..axes import Resid
from ..config import HookedALMConfig
from ..errors import ConversionError, nearest
from ..hooks import HookPoint


class GatedMLP(nn.Module):
    """Gated MLP ``down(act(gate(x)) * up(x))``, without biases.

    Hook points, all ``[batch, pos, d_mlp]``, in firing order: ``hook_pre`` = gate(x);
    ``hook_gate`` = act(gate(x)), which TransformerLens does not have and neuron methods need;
    ``hook_pre_linear`` = up(x); ``hook_post`` = their product.

    Source: transformers 5.23 ``Qwen2MLP``.
    """

    def __init__(self, cfg: HookedALMConfig) -> None:
        """Allocate the three projections.

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
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.down_proj = nn.Linear(cfg.d_mlp, cfg.d_model, bias=False)
        self.act_fn = ACT2FN[cfg.act_fn]
        self.hook_pre = HookPoint()
        self.hook_gate = HookPoint()
        self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Resid) -> Resid:
        """What the MLP writes to the residual stream."""
        gate = self.hook_gate(self.act_fn(self.hook_pre(self.gate_proj(x))))
        post = self.hook_post(gate * self.hook_pre_linear(self.up_proj(x)))
        return self.written(post)

    def neurons(self, x: Resid) -> Float[Tensor, "batch pos d_mlp"]:
        """Values of ``hook_post`` for the normalised ``x``; fires no hook."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def written(self, post: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """What neurons add to the residual stream."""
        out = self.down_proj(post)
        return out if self.cfg.residual_multiplier == 1 else out * self.cfg.residual_multiplier

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """View of the gate projection."""
        return rearrange(self.gate_proj.weight, "f d -> d f")

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
        """Zeros: the MLP has no biases."""
        return self.up_proj.weight.new_zeros(self.up_proj.out_features)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Zeros: the MLP has no biases."""
        return self.down_proj.weight.new_zeros(self.down_proj.out_features)
