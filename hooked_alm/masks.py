"""Attention masks, made by transformers so that the same kernels run on the same masks."""

from functools import cache
from typing import Any

from torch import Tensor

from .axes import Resid
from .config import HookedALMConfig, LayerType


def attention_masks(
    cfg: HookedALMConfig,
    implementation: str,
    attention_mask: Tensor,
    position_ids: Tensor | None,
    resid: Resid,
    cache: Any,
) -> dict[LayerType, Any]:
    """One mask per layer type that occurs, in the form that an implementation wants.

    Args:
        cfg: says which layer types occur, and the window.
        implementation: "eager" gives masks to add to scores; "sdpa" booleans, or None where the
            kernel's own causal masking is enough.
        attention_mask: ``[batch, key_pos]``, 1 at real positions.
        position_ids: ``[batch, pos]`` of the positions that run; None for several rotary axes.
        resid: what enters the first block; only its shape, dtype and device are read.
        cache: transformers ``Cache`` before this run, or None.

    Source: transformers 5.23 ``masking_utils``, as called by ``Qwen2Model.forward``.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    makers = {
        "full_attention": create_causal_mask,
        "sliding_attention": create_sliding_window_causal_mask,
    }
    carrier = _config_for_masks(implementation, cfg.sliding_window)
    return {
        layer_type: makers[layer_type](
            config=carrier,
            inputs_embeds=resid,
            attention_mask=attention_mask.to(resid.device),
            past_key_values=cache,
            position_ids=position_ids,
        )
        for layer_type in dict.fromkeys(cfg.layer_types)
    }


@cache
def _config_for_masks(implementation: str, sliding_window: int | None) -> Any:
    """The fields of a config that ``masking_utils`` reads; making one is slow."""
    from transformers import PreTrainedConfig

    carrier = PreTrainedConfig(sliding_window=sliding_window)
    carrier._attn_implementation = implementation
    return carrier
