"""Greedy transcripts: the tokens that a model writes, and its states where it ends them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...hooks import Hook
from ...inputs import ALMInput
from ...model import HookedALM
from .lens import residual_rows, unembed_rows

NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")
"""How Whisper's tokenizers call the token that stands for no speech."""


def end_tokens(model: HookedALM) -> tuple[int, ...]:
    """Ids that stand behind a transcript: what ends it, first, and what pads it."""
    names = ("eos_token_id", "pad_token_id")
    sources = (model.generation_config, model.tokenizer)
    found = [getattr(one, name, None) for one in sources for name in names]
    every = [one if isinstance(one, list) else [one] for one in found]
    return tuple(id_ for some in every for id_ in some if id_ is not None)


@torch.no_grad()
def written(
    model: HookedALM,
    x: ALMInput,
    max_new_tokens: int,
    *,
    suppress: bool = False,
    fwd_hooks: Iterable[Hook] = (),
) -> list[list[int]]:
    """The tokens that follow each prompt, greedily, without those that end or pad them.

    Args:
        model: to run.
        x: prompts. Give Whisper's a ``memory``, which is heard in one pass: a time that is
            predicted, though none is asked for, begins no new one.
        max_new_tokens: most tokens of a transcript.
        suppress: whether tokens are suppressed which the checkpoint's generation config forbids.
        fwd_hooks: fire at every step.
    """
    lists: dict[str, Any] = {"suppress_tokens": None, "begin_suppress_tokens": None}
    new = model.generate(
        x, max_new_tokens, return_type="tokens", fwd_hooks=fwd_hooks, do_sample=False, num_beams=1,
        **({} if suppress else lists),
    )  # fmt: skip
    assert isinstance(new, Tensor)
    ends = {*end_tokens(model)}
    return [
        row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
        for row in new.tolist()
    ]


def with_transcripts(x: ALMInput, said: Sequence[Sequence[int]]) -> ALMInput:
    """Prompts with the tokens behind them that follow each, left-padded."""
    longer = [
        x[row].extend(torch.tensor([tokens], dtype=torch.long, device=x.device))
        for row, tokens in enumerate(said)
    ]
    return ALMInput.joined(longer)


class TranscriptEnds(NamedTuple):
    """What a model computes as it goes through transcripts of its own once more."""

    states: Float[Tensor, "depth prompt d_model"]
    """The stream at the last position of each, where it is decided whether to end."""
    log_p: list[Float[Tensor, " token"]]
    """Of each, log-probabilities of its tokens, and of ending behind the last."""
    is_likeliest: list[Bool[Tensor, " token"]]
    """Whether none is likelier than these."""
    start: Float[Tensor, "prompt d_vocab"]
    """Log-probabilities behind the first position of each prompt."""


@torch.no_grad()
def transcript_ends(model: HookedALM, x: ALMInput, said: Sequence[Sequence[int]]) -> TranscriptEnds:
    """States and probabilities along transcripts, in one pass.

    Args:
        model: to run.
        x: prompts.
        said: tokens that follow each, without those that end them; may be empty.
    """
    y, behind = with_transcripts(x, said), 1 + max(map(len, said))
    first = y.attention_mask.long().argmax(dim=-1, keepdim=True).cpu()
    last = torch.arange(y.shape[1] - behind, y.shape[1]).expand(len(y), -1)
    rows = residual_rows(model, y, torch.cat([first, last], dim=1))
    log_p = unembed_rows(model, rows[-1]).log_softmax(-1)
    end, own, likeliest = end_tokens(model)[0], [], []
    for row, tokens in enumerate(said):
        targets = torch.tensor([*tokens, end], device=log_p.device)
        mine = log_p[row, -len(targets) :]
        own.append(mine.gather(-1, targets[:, None])[:, 0])
        likeliest.append(mine.argmax(-1) == targets)
    return TranscriptEnds(rows[:, :, -1], own, likeliest, log_p[:, 0])


def no_speech_token(model: HookedALM) -> int | None:
    """Id of the token that Whisper gives its probability of no speech; None of other models.

    Its probability is that behind the first token of the prompt.
    """
    if model.audio is None or not model.audio.is_memory:
        return None
    known = model.tokenizer.get_vocab()
    return next((int(known[name]) for name in NO_SPEECH if name in known), None)


def mean_log_p(said: Tensor, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
    """Mean log-probability of the tokens ``[batch, token]`` that end every row."""
    log_p = logits[:, -said.shape[1] - 1 : -1].log_softmax(-1)
    return log_p.gather(-1, said[..., None])[..., 0].mean(-1)
