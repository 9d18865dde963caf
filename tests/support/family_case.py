"""One row of the families' test table: a tiny checkpoint, and the reference it is held against.

A module of ``cases`` has one ``CASE``, or several ``CASES``, per family;
``tests/converters/test_families.py`` runs them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hooked_alm import HookedALM
from hooked_alm.audio import read_audio
from hooked_alm.frontend import FrontEnd
from hooked_alm.inputs import positions_from_mask
from tiny import N_BPE, PAD, randomise

Run = dict[str, Tensor]
"""``depth 0`` .. ``depth L`` and ``logits``; with a second branch also ``audio depth k`` and
``audio logits``."""
Inputs = dict[str, Any]
Tensors = dict[str, Tensor]


class Reference(Protocol):
    """What the hooked model must equal."""

    def run(self, inputs: Inputs) -> Run:
        """The residual stream at every depth, and logits, as the model itself computes them."""

    def greedy(self, inputs: Inputs, n: int) -> Tensor:
        """The next ``n`` tokens of each row."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family under test."""

    name: str
    save: Callable[[Path, torch.dtype], None]
    """Write a randomised checkpoint, in the published key layout, all sizes different."""
    reference: Callable[[Path, torch.dtype, str], Reference]
    """``(folder, dtype, attention implementation)``."""
    inputs: Callable[[Sequence[Sequence[int]], Sequence[int]], Inputs]
    """Arguments of ``encode``, which are the reference's too: per row the frames of its clips, and
    per row the number of text tokens. Left-padded, position ids included."""
    clips: tuple[int, int, int]
    """Frames of a short, a middling and a long clip, no two of the same number of positions."""
    attentions: tuple[str, ...] = ("sdpa", "eager")
    layouts: Mapping[str, Callable[[str], str]] = field(default_factory=dict)
    """Other key layouts of the checkpoint: published name -> name there."""
    components: Callable[[Path], dict[str, str]] = lambda folder: {}
    """Folders of the parts that the checkpoint leaves out, written by ``save`` beside it."""
    logits: Callable[[Tensor, HookedALM], Tensor] = lambda logits, model: logits
    """What the reference's logits should have been."""
    head: str = "lm_head.weight"
    """Name of the unembedding on disk, ``component/name`` if it is there; its absence must be
    refused unless the config ties it."""
    is_tied: bool = False
    bias: str | None = None
    """Name on disk of a bias (or a norm, without biases) whose absence must be refused."""
    faults: Mapping[str, Callable[[HookedALM], None]] = field(default_factory=dict)
    """Faults of this family that the comparison must notice: a projector norm skipped, ..."""
    seconds: Mapping[float, int] = field(default_factory=dict)
    """Positions of a clip by its duration, at the published sizes: at 1, 5, 10, 30 and 60 s, and
    wherever else they may be miscounted."""
    tokens_of: Callable[[float], int] | None = None
    """Positions that the front-end at its published sizes gives a clip, from its duration."""


def left_padded(
    rows: Sequence[Sequence[int]], pad: int = PAD, dtype: torch.dtype = torch.long
) -> dict[str, Tensor]:
    """Ids, mask and positions of rows of unequal length."""
    width = max(map(len, rows))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + [*row] for row in rows]).to(dtype),
        "attention_mask": mask,
        "position_ids": positions_from_mask(mask),
    }


def rows_of(
    clips: Sequence[Sequence[int]],
    n_text: Sequence[int],
    audio: Callable[[int], Sequence[int]],
    *,
    n_ids: int = N_BPE,
    seed: int = 1,
) -> tuple[list[list[int]], list[int]]:
    """Rows of random text around their clips, and the frames of all clips in order.

    Args:
        clips: per row, frames of each clip.
        n_text: per row, number of text tokens.
        audio: frames -> the ids that stand for a clip, markers included.
        n_ids: text ids are 3 to this.
        seed: of the text.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for frames, n in zip(clips, n_text, strict=True):
        text = torch.randint(3, n_ids, (n,), generator=generator).tolist()
        heard = [i for one in frames for i in audio(one)]
        rows.append(text[: n // 2] + heard + text[n // 2 :])
    return rows, [one for frames in clips for one in frames]


def heard(front_end: FrontEnd, extractor: Any, seconds: float) -> int:
    """Positions that a front-end gives a recording; it needs no weights for that."""
    samples = np.random.default_rng(0).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)
    limit = front_end.tokens.max_seconds
    waveform = read_audio((samples, 16000), sampling_rate=16000, max_seconds=limit)
    return front_end.clip(*front_end.windows_of(waveform, extractor)).n_tokens


class HuggingFace:
    """A model of transformers, its residual stream read by PyTorch hooks."""

    def __init__(self, model: Any, decoder: Any = None, forward: Any = None) -> None:
        """``decoder`` is its stack of blocks, ``forward`` what is called, if not the model."""
        self.model = model.eval()
        self.decoder = model.get_decoder() if decoder is None else decoder
        self.forward = model if forward is None else forward

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Run:
        """See ``Reference``."""
        return {**residuals(self.decoder, lambda: self._logits(inputs))}

    def _logits(self, inputs: Inputs) -> Tensor:
        logits: Tensor = self.forward(**self._cast(inputs)).logits
        return logits

    def _cast(self, inputs: Inputs) -> Inputs:
        """Features in the model's dtype, as its processor's documentation asks for."""
        return {
            name: value.to(self.model.dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
        }

    @torch.no_grad()
    def greedy(self, inputs: Inputs, n: int) -> Tensor:
        """See ``Reference``; Hugging Face makes the positions itself."""
        given = {name: v for name, v in self._cast(inputs).items() if name != "position_ids"}
        tokens: Tensor = self.model.generate(
            **given, max_new_tokens=n, do_sample=False, eos_token_id=None
        )
        return tokens[:, inputs["input_ids"].shape[1] :]


def residuals(decoder: Any, run: Callable[[], Tensor], prefix: str = "") -> Run:
    """What enters each of a decoder's layers and its final norm, and the logits of the run."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    parts = (*decoder.layers, decoder.norm)
    handles = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in parts]
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    return {**{f"{prefix}depth {k}": x for k, x in enumerate(seen)}, f"{prefix}logits": logits}


def save_hf(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Randomise a model of transformers and save it as Hugging Face does."""
    randomise(model)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)
