"""Rows of an audio encoder, prompt by prompt: what sweeps along its blocks count in.

An encoder's activations know windows of clips. Here the windows of a prompt stand one behind the
other, each in a chunk of its own as long as a full window, so that the encoder is a stack whose
rows see their chunk, and a prompt has positions there as it has in the decoder.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .encoder import WindowPart
from .errors import InputError
from .frontend import FrontEnd
from .inputs import ALMInput, AudioClip
from .points import ENCODER, point_of
from .spans import Range, SpanMap, as_ranges

SECONDS_PER_ROW = 0.02
"""Duration of a row: two frames of 10 ms, in every spectrogram that encoders of this kind read."""


class _Placed(NamedTuple):
    """A part of a window, and where a prompt has it."""

    prompt: int
    position: int
    part: WindowPart


@dataclass(frozen=True, eq=False)
class EncoderRows:
    """Rows of an encoder that hears the clips of some prompts."""

    prompts: ALMInput
    """The rows as prompts, of as many positions as a prompt's windows have. Its mask has the rows
    that run, its spans are ``audio``, rows of a clip's frames, and ``padding``, rows behind them
    that run all the same: most encoders attend to them, others only read them out. Time windows
    are of the clip."""
    is_seen: Bool[np.ndarray, "batch pos"]
    """Whether a row is attended to."""
    placed: list[_Placed]
    is_packed: bool
    """Whether the encoder has all windows in one sequence."""

    @classmethod
    def of(cls, front_end: FrontEnd, x: ALMInput) -> "EncoderRows":
        """Rows in which the clips of some prompts are heard.

        Raises:
            InputError: there are no clips.
        """
        encoder = front_end.hooked_encoder
        assert encoder is not None
        if not x.clips:
            raise InputError(
                "reaching into the audio encoder: the prompts have no audio. Make the input with "
                "`prepare` or `encode`, clips included."
            )
        chunk, placed = encoder.cfg.n_ctx, list[_Placed]()
        ends = [0] * len(x)
        real: list[list[list[Range]]] = [[] for _ in range(len(x))]
        heard = zip(x.clips, x.clip_rows, front_end.parts(x.clips), strict=True)
        for clip, prompt, windows in heard:
            real[prompt].append([])
            for n_left, parts in zip(n_real_states(front_end, clip), windows, strict=True):
                for part in parts:
                    n_real = min(part.n_seen, n_left)
                    n_left -= n_real
                    if n_real:
                        real[prompt][-1].append((ends[prompt], ends[prompt] + n_real))
                    placed.append(_Placed(prompt, ends[prompt], part))
                    ends[prompt] += chunk
        shape = len(x), max(ends)
        runs, is_seen = np.zeros(shape, bool), np.zeros(shape, bool)
        for prompt, at, part in placed:
            is_seen[prompt, at : at + part.n_seen] = True
            # What nobody attends to runs only if what comes next may read it.
            n = part.n_pos if front_end.reads_padding else part.n_seen
            runs[prompt, at : at + n] = True
        audio = [[one for clip in clips for one in clip] for clips in real]
        padding = [_without(row, taken) for row, taken in zip(runs, audio, strict=True)]
        mask = torch.from_numpy(runs).long().to(x.device)
        places = torch.arange(shape[1], device=x.device).expand(shape)
        prompts = ALMInput(
            tokens=torch.zeros_like(mask),
            attention_mask=mask,
            position_ids=places,
            spans=SpanMap(
                ranges={"audio": audio, "padding": padding},
                n_pos=shape[1],
                seconds_per_token=SECONDS_PER_ROW,
                clips=real,
            ),
        )
        return cls(prompts, is_seen, placed, encoder.is_packed)

    def by_prompt(self, name: str, value: Tensor) -> Tensor:
        """An activation of the encoder with prompts and their positions, zeros between parts.

        Where every prompt has one full window, that is the activation itself.

        Args:
            name: hook point that shows it.
            value: ``[window, encoder_pos, *features]``; the pattern's and scores' two axes of
                positions are their last.
        """
        n_pos = self.prompts.shape[1]
        whole = [(prompt, 0, prompt, n_pos) for prompt in range(len(self.prompts))]
        if whole == [(prompt, at, one.window, one.n_pos) for prompt, at, one in self.placed]:
            return value
        flat = value.new_zeros(self._shape(name, value, len(self.prompts), n_pos))
        for here, there in self._pairs(name):
            flat[here] = value[there]
        return flat

    def kept(self, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Activations by hook name, of which the encoder's are given by prompt."""
        return {
            name: self.by_prompt(name, value) if name.startswith(ENCODER) else value
            for name, value in activations.items()
        }

    def by_window(self, name: str, flat: Tensor, value: Tensor) -> Tensor:
        """Undo ``by_prompt``: a copy of ``value`` with what some prompts have in its place."""
        value = value.clone()
        for here, there in self._pairs(name):
            value[there] = flat[here]
        return value

    def states(
        self, prompt: int, streams: Float[Tensor, "cell row d_audio"]
    ) -> Float[Tensor, "window encoder_pos d_audio"]:
        """States of the windows of one prompt in many cells, from those of the rows that run."""
        flat = streams.new_zeros(len(streams), self.prompts.shape[1], streams.shape[-1])
        flat[:, self.prompts.attention_mask[prompt].bool().to(flat.device)] = streams
        mine = [one for one in self.placed if one.prompt == prompt]
        pieces = [flat[:, at : at + part.n_pos] for _, at, part in mine]
        if self.is_packed:
            return torch.cat(pieces, dim=1).flatten(0, 1)[None]
        return torch.stack(pieces, dim=1).flatten(0, 1)

    def _pairs(self, name: str) -> Iterator[tuple[tuple[slice | int, ...], ...]]:
        for prompt, at, (window, start, n, _) in self.placed:
            here, there = slice(at, at + n), slice(start, start + n)
            if "encoder_key_pos" in point_of(name).axes:
                every = slice(None)
                yield (prompt, every, here, here), (window, every, there, there)
            else:
                yield (prompt, here), (window, there)

    def _shape(self, name: str, value: Tensor, n: int, n_pos: int) -> tuple[int, ...]:
        if "encoder_key_pos" in point_of(name).axes:
            return n, value.shape[1], n_pos, n_pos
        return n, n_pos, *value.shape[2:]


def n_real_states(front_end: FrontEnd, clip: AudioClip) -> list[int]:
    """Number of states that hear a clip, and not what pads it, by window; nothing runs."""
    # Some families count padding of a window as frames; the clip's duration does not.
    left = sum(map(front_end.n_states, clip.n_frames))
    if clip.seconds is not None:
        left = ceil(round(clip.seconds / SECONDS_PER_ROW, 6))
    found = []
    for n_frames in clip.n_frames:
        found.append(min(front_end.n_states(n_frames), left))
        left -= found[-1]
    return found


def _without(row: Bool[np.ndarray, " pos"], taken: list[Range]) -> list[Range]:
    left = row.copy()
    for start, stop in taken:
        left[start:stop] = False
    return as_ranges(left.nonzero()[0].tolist())
