"""Rotary position embedding: tables in fp32, cast to the activations' dtype."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import HookedALMConfig
from ..errors import ConversionError, InputError, reason_of

RotaryTables = tuple[Float[Tensor, "batch pos d_head"], Float[Tensor, "batch pos d_head"]]


class Rotary(nn.Module):
    """Cosine and sine tables for given positions.

    Positions ``[3, batch, pos]`` count along three axes (time, height, width of a picture): each
    section of the frequencies follows one of them. Where the axes agree, as in a prompt without
    pictures, that is the rotation by one position.

    The frequencies are ``theta ** (-2i / d_head)``, rescaled as ``rope_parameters`` says. They are
    kept out of the parameters so that ``.to(bfloat16)`` cannot round them.

    Source: transformers 5.23 ``Qwen2RotaryEmbedding``, ``Qwen2_5OmniRotaryEmbedding`` (three axes)
    and ``ROPE_INIT_FUNCTIONS``.
    """

    def __init__(self, cfg: HookedALMConfig) -> None:
        """Compute the frequencies; nothing is learned."""
        super().__init__()
        self.inv_freq, self.attention_scaling = rotary_frequencies(cfg)
        self.sections: list[int] | None = cfg.rope_parameters.get("mrope_section")
        if cfg.rope_parameters.get("mrope_interleaved"):
            self.sections = None  # another layout; without pictures it is one axis as well
        """Frequencies of each section, for three axes."""

    @torch.no_grad()
    def forward(
        self, position_ids: Int[Tensor, "*axis batch pos"], dtype: torch.dtype
    ) -> RotaryTables:
        """Tables ``cos`` and ``sin`` of every position and rotary dimension.

        Raises:
            InputError: three axes, and a model that has one.
        """
        inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids[..., None].float() * inv_freq
        if position_ids.ndim == 3:
            if self.sections is None:
                raise InputError(
                    f"rotating by position ids {list(position_ids.shape)}: this model has one "
                    "rotary axis, expected [batch, pos]."
                )
            by_section = enumerate(angles.split(self.sections, dim=-1))
            angles = torch.cat([part[i % 3] for i, part in by_section], dim=-1)
        angles = torch.cat((angles, angles), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(dtype), sin.to(dtype)


def rotary_frequencies(cfg: HookedALMConfig) -> tuple[Float[Tensor, " half_d_head"], float]:
    """Inverse frequencies (fp32) and the factor on cos and sin.

    Raises:
        ConversionError: constants that give none, or not one for each pair of a head.
    """
    rope = cfg.rope_parameters
    if rope["rope_type"] == "default":
        exponent = torch.arange(0, cfg.d_head, 2, dtype=torch.float, device="cpu") / cfg.d_head
        return 1.0 / (rope["rope_theta"] ** exponent), 1.0
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        carrier = PreTrainedConfig(
            rope_parameters=dict(rope),
            head_dim=cfg.d_head,
            hidden_size=cfg.d_model,
            num_attention_heads=cfg.n_heads,
            max_position_embeddings=cfg.n_ctx,
        )
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](carrier, device="cpu")
    except Exception as error:  # each variant fails in its own way
        raise _no_frequencies(cfg, reason_of(error)) from error
    if inv_freq.shape != (cfg.d_head // 2,) or not (inv_freq * scaling).isfinite().all():
        raise _no_frequencies(cfg, f"{inv_freq.tolist()} times {scaling}")
    return inv_freq, float(scaling)


def _no_frequencies(cfg: HookedALMConfig, found: str) -> ConversionError:
    return ConversionError(
        f"computing the rotary positions of {cfg.model_name!r} from {cfg.rope_parameters}: got "
        f"{found:.200}, expected {cfg.d_head // 2} finite frequencies. Take the published config."
    )


def rotate(
    x: Float[Tensor, "batch head pos d_head"], tables: RotaryTables
) -> Float[Tensor, "batch head pos d_head"]:
    """Rotate pairs ``(i, i + d_head/2)`` by their position's angle.

    Source: transformers 5.23 ``modeling_qwen2.apply_rotary_pos_emb``.
    """
    cos, sin = tables[0].unsqueeze(1), tables[1].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)
