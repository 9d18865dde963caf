"""Greedy transcripts: the tokens that a model writes, without those that end them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...hooks import Hook
from ...inputs import ALMInput
from ...model import HookedALM


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
