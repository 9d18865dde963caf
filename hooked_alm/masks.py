"""Attention masks, made by transformers so that the same kernels run on the same masks."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from .axes import Resid
from .config import HookedALMConfig, LayerType
from .errors import InputError
from .stacks import Stack


def attention_masks(
    cfg: HookedALMConfig,
    stack: Stack,
    implementation: str,
    attention_mask: Tensor,
    position_ids: Tensor | None,
    resid: Resid,
    cache: Any,
) -> dict[LayerType, Any]:
    """Masks by layer type, one for each that occurs, in the form that an implementation wants.

    Args:
        cfg: says which layer types occur, and the window.
        stack: the blocks that attend; says which rows see which.
        implementation: "eager" gives masks to add to scores; "sdpa" booleans, or None where the
            kernel's own causal masking is enough.
        attention_mask: ``[batch, key_pos]``, 1 at real positions.
        position_ids: ``[batch, pos]`` of the positions that run; None for several rotary axes.
        resid: what enters the first block; only its shape, dtype and device are read.
        cache: transformers ``Cache`` before this run, or None.

    Raises:
        InputError: cached keys in a stack whose earlier rows read later ones, or a kernel that
            takes no mask there.

    Source: transformers 5.23 ``masking_utils``, as called by ``Qwen2Model.forward``.
    """
    layer_types: dict[LayerType, None] = dict.fromkeys(cfg.layer_types)
    if cfg.branches:
        # Blocks of a branch attend in full, whatever the trunk's do.
        layer_types["full_attention"] = None
    if stack.reach != "later rows":
        seen = _seen_by_place(stack, attention_mask.to(resid.device), implementation, cache)
        if implementation == "eager":
            # To be added to scores; the dtype's minimum, as in transformers' own masks.
            lowest = torch.finfo(resid.dtype).min
            return dict.fromkeys(layer_types, (~seen).to(resid.dtype) * lowest)
        return dict.fromkeys(layer_types, seen)
    # Here, because importing the package is to load no model code.
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
        for layer_type in layer_types
    }


def key_mask(implementation: str, hidden: Resid, is_real: Bool[Tensor, "batch key_pos"]) -> Any:
    """Mask of a stack in which every position sees every real one, as an implementation wants it.

    Args:
        implementation: see ``attention_masks``.
        hidden: what enters the first block; only its shape, dtype and device are read.
        is_real: False at padding.

    Source: transformers 5.23 ``masking_utils``, as called by ``Qwen2AudioEncoder``'s callers.
    """
    from transformers.masking_utils import create_bidirectional_mask

    return create_bidirectional_mask(
        config=_config_for_masks(implementation, None),
        inputs_embeds=hidden,
        attention_mask=is_real.long(),
    )


def _seen_by_place(
    stack: Stack, attention_mask: Tensor, implementation: str, cache: Any
) -> Bool[Tensor, "batch 1 query_pos key_pos"]:
    """True where a position sees another; a pad sees itself alone, so that no row is empty."""
    if implementation not in ("sdpa", "eager") or cache is not None:
        raise InputError(
            f"running {stack.blocks}, whose rows read later ones, with {implementation} attention"
            + (" and cached keys" if cache is not None else "")
            + ": expected 'sdpa' or 'eager', and no cache."
        )
    real = attention_mask.bool()
    # Stacks count from the first real position. Pads are taken out below.
    places = torch.arange(real.shape[1], device=real.device) - real.long().argmax(-1, keepdim=True)
    seen = stack.sees(places[:, :, None], places[:, None, :])
    seen = seen & real[:, None, :] & real[:, :, None]
    return (seen | torch.eye(real.shape[1], dtype=torch.bool, device=real.device))[:, None]


@cache
def _config_for_masks(implementation: str, sliding_window: int | None) -> Any:
    """The fields of a config that ``masking_utils`` reads; making one is slow."""
    from transformers import PreTrainedConfig

    carrier = PreTrainedConfig(sliding_window=sliding_window)
    carrier._attn_implementation = implementation
    return carrier
