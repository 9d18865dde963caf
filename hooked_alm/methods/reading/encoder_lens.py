"""Encoder lens: what a decoder reads if the encoder ended at each depth.

Depth k is the encoder's stream behind k blocks: 0 is what enters the first, L what leaves the last.
Each passes the encoder's final norm once, and is the memory of cross-attention.

Source: Langedijk et al. 2024, "DecoderLens", as the "Encoder Lens" of Whisper.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import ENCODER, hook_name


@torch.no_grad()
def memories_by_depth(
    model: HookedALM, x: ALMInput
) -> Float[Tensor, "depth batch memory_pos d_model"]:
    """Memories that the prompts would be read with, were the encoder that deep; one encoding.

    ``model.generate(x, memory=memories[k])`` is the transcript of depth k; the last one is what the
    model hears.

    Raises:
        InputError: no cross-attention that reads the encoder, or prompts without a clip each.
    """
    encoder = None if model.audio is None else model.audio.hooked_encoder
    if encoder is None or not model.cfg.cross_attention:
        raise InputError(
            f"reading the encoder of {model.cfg.model_name!r} at every depth: no cross-attention "
            "reads it. The lens is for Whisper; what other decoders hear is a projector's."
        )
    model.encoder_rows(x)  # which refuses a memory in the place of clips, and prompts without
    last = encoder.cfg.n_layers - 1
    names = [hook_name("resid_pre", f"{ENCODER}blocks.{layer}") for layer in range(last + 1)]
    names.append(hook_name("resid_post", f"{ENCODER}blocks.{last}"))
    _, cache = model.run_with_cache(x, None, names_filter=names, return_cache_object=False)
    with model.turn.running():
        return torch.stack([encoder.ln_final(cache[name]) for name in names])


@torch.no_grad()
def encoder_lens(model: HookedALM, x: ALMInput) -> Float[Tensor, "depth batch target"]:
    """Log-probabilities of every next token of the prompts, by the depth that is read.

    Prompts have the transcript in them (``answer_prefix`` of ``prepare``): ``x.spans`` says where.
    Position ``t`` is of token ``t + 1``; next to pads, 0. Teacher-forced: the decoder runs once per
    depth, nothing is generated.

    Raises:
        InputError: see ``memories_by_depth``.
    """
    x, found = model.to_input(x), []
    real = x.attention_mask.bool()
    for memory in memories_by_depth(model, x):
        logits = model(x, memory=memory)[:, :-1].float().to(x.device)
        targets = x.tokens[:, 1:, None]
        scores = logits.log_softmax(-1).gather(-1, targets)[..., 0]
        found.append(scores.where(real[:, 1:] & real[:, :-1], 0.0))
    return torch.stack(found)
