"""Encoder lens: what the decoder makes of the audio encoder's states at every depth.

Depth k is the encoder's stream behind k blocks: 0 is what enters the first, L what leaves the last.
Each passes what is behind the last block (final norm, pooling, projector) once, and is then heard
by a decoder that nobody has changed.

Source: DecoderLens (Langedijk et al. 2023, arXiv 2310.03686), as Beyond Transcription applies it to
speech (arXiv 2508.15882); M-BT-1.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import InputError
from ...hooks import Hook
from ...inputs import ALMInput
from ...model import HookedALM
from .transcripts import written

ByDepth = Float[Tensor, "depth clip audio_pos d_model"]


@torch.no_grad()
def heard_by_depth(model: HookedALM, x: ALMInput) -> ByDepth:
    """Embeddings of the prompts' clips, were the encoder that deep; one encoding.

    Of Whisper they are memories: ``model.generate(x, memory=heard[k])`` is the transcript of depth
    k. The last are what the model hears.

    Raises:
        InputError: an encoder without hooks, a memory in the place of clips, prompts without any.
    """
    model.encoder_rows(x)  # which refuses all of these
    assert model.audio is not None
    names = model.towards("encoder").depth_names()
    _, cache = model.run_with_cache(x, None, names_filter=names, return_cache_object=False)
    n_tokens = [clip.n_tokens for clip in x.clips]
    with model.turn.running():
        depths = [model.audio.embed_states(x.clips, cache[name], 1)[0] for name in names]
        return torch.stack(
            [pad_sequence([*one.split(n_tokens)], batch_first=True) for one in depths]
        )


def hearing(
    model: HookedALM, x: ALMInput, heard: Float[Tensor, "clip audio_pos d_model"]
) -> tuple[ALMInput, list[Hook]]:
    """The prompts, and the hooks under which they hear these embeddings in their clips' stead."""
    assert model.audio is not None
    if model.audio.is_memory:
        return replace(x, memory=heard), []
    return x, [("hook_audio_embed", lambda value, hook: heard.to(value))]


@torch.no_grad()
def encoder_lens(
    model: HookedALM, x: ALMInput, heard: ByDepth | None = None
) -> Float[Tensor, "depth batch target"]:
    """Log-probabilities of every next token of the prompts, by the depth that is read.

    Prompts have the transcript in them: ``answer_prefix`` of ``prepare``, or ``x.extend``. Position
    ``t`` is of token ``t + 1``; next to pads, 0. Teacher-forced: the decoder runs once per depth,
    nothing is generated.

    Args:
        model: with a hooked encoder.
        x: prompts.
        heard: from ``heard_by_depth`` of the same clips; None encodes them.

    Raises:
        InputError: see ``heard_by_depth``.
    """
    x, found = model.to_input(x), []
    real = x.attention_mask.bool()
    for one in heard_by_depth(model, x) if heard is None else heard:
        rows, hooks = hearing(model, x, one)
        with model.hooks(fwd_hooks=hooks):
            logits = model(rows)[:, :-1].float().to(x.device)
        targets = x.tokens[:, 1:, None] if x.text_tokens is None else x.text_tokens[:, 1:, None]
        scores = logits.log_softmax(-1).gather(-1, targets)[..., 0]
        found.append(scores.where(real[:, 1:] & real[:, :-1], 0.0))
    return torch.stack(found)


@torch.no_grad()
def transcripts_by_depth(
    model: HookedALM, x: ALMInput, heard: ByDepth, max_new_tokens: int, *, suppress: bool = False
) -> list[list[int]]:
    """The tokens that the decoder says at every depth, without the one that ends them.

    Greedy, one batch of all depths; nothing is heard again, whatever a recogniser would distrust.

    Args:
        model: with a hooked encoder.
        x: one prompt with one clip.
        heard: from ``heard_by_depth``.
        max_new_tokens: most tokens of a transcript.
        suppress: whether tokens are suppressed which the checkpoint's generation config forbids.

    Raises:
        InputError: another number of prompts or clips.
    """
    if len(x) != 1 or heard.shape[1] != 1:
        raise InputError(
            f"writing down every depth of the encoder: got {len(x)} prompts with {heard.shape[1]} "
            "clips, expected one prompt with one clip. Write them down one by one."
        )
    rows, hooks = hearing(model, x[[0] * len(heard)], heard[:, 0])
    return written(model, rows, max_new_tokens, suppress=suppress, fwd_hooks=hooks)
