"""Inputs of every entry point: tokens, positions, audio clips, and which position is what.

``ALMInput`` looks like a token tensor to TransformerLens' tools (``.shape``, ``.ndim``, ``len``,
slicing along the batch) and carries the audio along.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from .axes import TokenIds
from .config import check_device
from .display import Piece, Shown, Summary, listed
from .errors import InputError
from .spans import SPAN_NAMES, SpanMap, span_flags, span_map

N_SHOWN = 4
"""Rows that an input shows of itself."""
BatchIndex = int | slice | Sequence[int] | Tensor
WeightsVersion = tuple[Hashable, ...]
Batch = tuple[tuple[tuple[int, ...], ...], int]
"""Frames and width of all clips that were encoded together, and which of them a clip was.

Kernels round differently for batches of another shape, so an encoding is reused only where encoding
afresh would give the same bits.
"""


@dataclass(eq=False)
class AudioClip:
    """A clip as the audio encoder reads it, with the embeddings it was once encoded to."""

    features: Shaped[Tensor, "window feature frame"]
    """Log-mel spectrograms, padded to the length that the encoder wants; codes for models that read
    those. Most models hear a clip in one window, some cut it into several."""
    n_frames: tuple[int, ...]
    """Number of frames that are not padding, per window."""
    n_tokens: int
    """Positions the clip fills in the prompt."""
    name: str = "clip"
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    """Notes on what was done on reading: resampled, downmixed, truncated, silent."""
    # Per encoder: the version of its weights and, per batch, what it made of this clip. Never
    # pickled.
    _encoded: WeakKeyDictionary[nn.Module, tuple[WeightsVersion, dict[Batch, Tensor]]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    def encodings(self, encoder: nn.Module, version: WeightsVersion) -> dict[Batch, Tensor]:
        """Embeddings ``[audio_pos, d_model]`` of earlier runs with the same weights, to add to."""
        known_version, known = self._encoded.get(encoder, (None, {}))
        if known_version != version:
            known = {}
            self._encoded[encoder] = (version, known)
        return known

    def forget(self) -> None:
        """Let the embeddings go; they are made anew when they are needed."""
        self._encoded.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the embeddings behind: they belong to an encoder of this process."""
        return {**self.__dict__, "_encoded": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with nothing encoded."""
        self.__dict__.update({**state, "_encoded": WeakKeyDictionary()})


@dataclass(frozen=True, eq=False, repr=False)
class ALMInput(Shown):
    """A batch of prompts with their audio: what every entry point of the model takes.

    Indexing is along the batch only; an int keeps the axis, padding is kept, clips follow their
    rows.

    Raises:
        InputError: fields that contradict each other.
    """

    tokens: Int[Tensor, "batch pos"]
    """Ids with every placeholder expanded; pads included."""
    attention_mask: Int[Tensor, "batch pos"]
    """Mask: 1 at real positions, 0 at pads."""
    position_ids: Int[Tensor, "*axis batch pos"]
    """Position ids ``[batch, pos]``, or ``[3, batch, pos]`` for a model with three rotary axes."""
    spans: SpanMap
    clips: tuple[AudioClip, ...] = ()
    """Clips of all rows, in order of appearance."""
    clip_rows: tuple[int, ...] = ()
    """Index of the row that each clip is heard in, ascending."""
    text_tokens: Int[Tensor, "batch pos"] | None = None
    """A second stream of ids, for a model that reads text and audio tokens side by side."""
    blank: int | None = None
    """Id that ``tokens`` holds where the second stream alone goes on."""
    memory: Float[Tensor, "_batch memory_pos d_model"] | None = None
    """What cross-attention reads, instead of what the encoder makes of the clips."""
    hears_apart: bool = False
    """Whether clips of a row are encoded apart from those of others, as if the row were alone."""

    def __post_init__(self) -> None:
        """Check shapes once, here, rather than in every tool."""
        for name, value in self._per_position().items():
            axes = (3,) if name == "position_ids" and value.ndim == 3 else ()
            if value.shape != (*axes, *self.tokens.shape):
                raise InputError(
                    f"making an ALMInput: {name} has shape {tuple(value.shape)}, expected that of "
                    f"the tokens, {tuple(self.tokens.shape)}."
                )
        if self.memory is not None:
            check_memory(self.memory, len(self))
        rows = list(self.clip_rows)
        if len(self.clips) != len(rows) or rows != sorted(rows) or {*rows} - {*range(len(self))}:
            raise InputError(
                f"making an ALMInput: {len(self.clips)} clips for the rows {rows} of {len(self)}. "
                "Each clip needs a row, in order."
            )

    def _per_position(self) -> dict[str, Any]:
        """The tensors ``[..., batch, pos]``."""
        names = ("tokens", "attention_mask", "position_ids", "text_tokens")
        return {name: v for name in names if (v := getattr(self, name)) is not None}

    def _summary(self) -> Summary:
        shown = range(min(len(self), N_SHOWN))
        rows = [(f"row {row}", self._pieces(row)) for row in shown]
        facts = [(name, ", ".join(f"{p.name} {p.note}" for p in pieces)) for name, pieces in rows]
        clips = [
            clip.name + ("" if clip.seconds is None else f" ({clip.seconds:.2f} s)")
            for clip in self.clips
        ]
        if len(self) > N_SHOWN:
            facts.append(("and", f"{len(self) - N_SHOWN} more rows"))
        return Summary(
            title=f"ALMInput: {len(self)} × {self.shape[1]} positions (batch × pos), {self.device}",
            facts=[("clips", listed(clips) or "none"), *facts],
            bars=rows,
        )

    def _pieces(self, row: int) -> list[Piece]:
        """Spans of a row from left to right; named segments lie in ``text`` and are left to it."""
        found = [
            (start, stop, name)
            for name in self.spans
            if name in SPAN_NAMES
            for start, stop in self.spans[name][row]
        ]
        pads = min((start for start, _, _ in found), default=self.shape[1])
        found += [(0, pads, "pad")] if pads else []
        return [
            Piece(name, stop - start, f"{start}:{stop}" if stop - start > 1 else f"{start}")
            for start, stop, name in sorted(found)
        ]

    @cached_property
    def is_real(self) -> Bool[np.ndarray, "batch pos"]:
        """Whether a position is a real token, not a pad; on the host, where indices are made."""
        return self.attention_mask.bool().cpu().numpy()

    @property
    def shape(self) -> torch.Size:
        """Shape ``(batch, pos)`` of the ids."""
        return self.tokens.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the ids: 2."""
        return self.tokens.ndim

    @property
    def device(self) -> torch.device:
        """Device of the tokens."""
        return self.tokens.device

    def __len__(self) -> int:
        """Number of rows."""
        return self.tokens.shape[0]

    def __iter__(self) -> Iterator["ALMInput"]:
        """Iterate over the rows, each as an input of one row."""
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: BatchIndex) -> "ALMInput":
        """Rows of the batch, with their clips.

        Raises:
            InputError: a row out of range, or an index that reaches beyond the batch axis.
        """
        rows = self._rows(index)
        pick = torch.tensor(rows, device=self.device, dtype=torch.long)
        clips = [
            (clip, new)
            for new, row in enumerate(rows)
            for clip, owner in zip(self.clips, self.clip_rows, strict=True)
            if owner == row
        ]
        return replace(
            self,
            **{name: value[..., pick, :] for name, value in self._per_position().items()},
            spans=self.spans.select(rows),
            memory=None if self.memory is None else self.memory[pick.to(self.memory.device)],
            clips=tuple(clip for clip, _ in clips),
            clip_rows=tuple(row for _, row in clips),
        )

    @classmethod
    def joined(cls, inputs: Sequence["ALMInput"], pad: int = 0) -> "ALMInput":
        """Inputs of one model as one left-padded batch, their rows in order.

        Every row hears its clips as if it were alone, so that what the encoder makes of them is the
        same to the bit, and is made once, whatever stands beside it; unless the encoder is hooked.

        Args:
            inputs: one or more.
            pad: id that stands at new pads; any that stands for no audio.

        Raises:
            InputError: none, or inputs of different kinds: some with a second stream, a memory or
                three position axes where others have none.
        """
        kinds = {
            (tuple((name, v.ndim) for name, v in one._per_position().items()), one.blank,
             None if one.memory is None else one.memory.shape[1:])
            for one in inputs
        }  # fmt: skip
        if len(kinds) != 1:
            raise InputError(
                f"joining {len(inputs)} inputs: got {len(kinds)} kinds of them, expected one. Give "
                "inputs that one model prepared, with memories of one length or without."
            )
        width, first = max(one.shape[1] for one in inputs), inputs[0]
        fill = {"tokens": pad, "text_tokens": pad}

        def padded(one: "ALMInput", name: str) -> Tensor:
            behind = (width - one.shape[1], 0)
            value = one._per_position()[name].to(first.device)
            return F.pad(value, behind, value=fill.get(name, 0))

        starts = [*accumulate((len(one) for one in inputs), initial=0)]
        memories = [one.memory for one in inputs if one.memory is not None]
        tensors: dict[str, Any] = {
            name: torch.cat([padded(one, name) for one in inputs], dim=-2)
            for name in first._per_position()
        }
        return replace(
            first,
            **tensors,
            spans=SpanMap.joined([one.spans for one in inputs], [len(one) for one in inputs]),
            memory=torch.cat(memories) if memories else None,
            clips=tuple(clip for one in inputs for clip in one.clips),
            clip_rows=tuple(
                start + row
                for start, one in zip(starts, inputs, strict=False)
                for row in one.clip_rows
            ),
            hears_apart=True,
        )

    def _rows(self, index: object) -> list[int]:
        every = range(len(self))
        if isinstance(index, slice):
            return list(every[index])
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == (len(self),):
            index = index.nonzero().flatten()
        if isinstance(index, Tensor) and index.ndim <= 1:
            index = index.tolist()
        if isinstance(index, int):
            index = [index]
        # A bool is an int to Python: a list of them would select rows 0 and 1.
        if not (isinstance(index, list | range) and all(type(i) is int for i in index)):
            raise InputError(
                f"indexing an ALMInput with {index!r}: rows only (int, slice, list or 1-D tensor). "
                "For positions, use spans."
            )
        if any(not -len(self) <= i < len(self) for i in index):
            raise InputError(
                f"indexing an ALMInput with {index!r}: expected rows from {-len(self)} to "
                f"{len(self) - 1}."
            )
        return [i % len(self) for i in index]

    def extend(self, tokens: Int[Tensor, "batch new"]) -> "ALMInput":
        """The prompts with generated tokens appended; spans keep describing the prompt.

        With two streams the tokens are text, and the other stream is blank beside them.
        """
        ahead = torch.arange(1, tokens.shape[1] + 1, device=self.device)
        # Three rotary axes go on together, from the farthest.
        last = self.position_ids.amax(-1, keepdim=True)
        last = last.amax(0, keepdim=True).expand_as(last) if last.ndim == 3 else last
        more = {
            "tokens": tokens,
            "attention_mask": torch.ones_like(tokens).to(self.attention_mask.dtype),
            "position_ids": last + ahead,
        }
        if self.text_tokens is not None:
            assert self.blank is not None
            more |= {"tokens": torch.full_like(tokens, self.blank), "text_tokens": tokens}
        longer: dict[str, Any] = {
            name: torch.cat([value, more[name]], dim=-1)
            for name, value in self._per_position().items()
        }
        spans = replace(self.spans, n_pos=longer["tokens"].shape[1])
        return replace(self, **longer, spans=spans)

    def answered(self, tokens: Int[Tensor, "batch new"]) -> "ALMInput":
        """The prompts with how their answers begin behind them, read where these go on.

        The new tokens count to ``struct``, as an answer's prefix does, but for the last, which is
        the ``readout``.
        """
        if not tokens.shape[1]:
            return self
        longer, n_before = self.extend(tokens), self.shape[1]
        n_pos = longer.shape[1]
        before = self.spans.ranges.get("struct", [()] * len(self))
        begun = [[*ranges, (n_before - 1, n_pos - 1)] for ranges in before]
        ends = [[(n_pos - 1, n_pos)] for _ in begun]
        ranges = {**self.spans.ranges, "struct": begun, "readout": ends}
        return replace(longer, spans=replace(longer.spans, ranges=ranges))

    def for_autograd(self) -> "ALMInput":
        """The same in tensors that gradients may pass; those of ``inference_mode`` are copied."""
        if torch.is_inference_mode_enabled():
            return self
        held = {**self._per_position(), **({} if self.memory is None else {"memory": self.memory})}
        made = {n: v.clone() for n, v in held.items() if v.is_inference()}
        return replace(self, **made) if made else self

    def to(self, device: torch.device | str) -> "ALMInput":
        """Tokens, mask and positions on another device; clips move when they are encoded.

        Raises:
            InputError: there is no such device.
        """
        check_device("moving an input to", device)
        moved = {name: value.to(device) for name, value in self._per_position().items()}
        memory = None if self.memory is None else self.memory.to(device)
        return replace(self, **moved, memory=memory)

    def cpu(self) -> "ALMInput":
        """Tokens, mask and positions on the CPU; clips stay as they are."""
        return self.to("cpu")

    def repeat(self, batch: int, pos: int) -> "ALMInput":
        """The rows, ``batch`` times over, as ``Tensor.repeat`` on ids; ``pos`` must be 1.

        Raises:
            InputError: positions would be repeated, and with them the audio.
        """
        if pos != 1:
            raise InputError(
                f"repeating an ALMInput {pos} times along the positions: rows only. Use "
                f"repeat({batch}, 1)."
            )
        return self[list(range(len(self))) * batch]

    def numpy(self) -> Int[np.ndarray, "batch pos"]:
        """Ids, for tools that compare tokens: every audio position has a (negative) id of its own.

        All placeholders are one token, but what they stand for is not: without this,
        TransformerLens' ``detect_head`` would take the frames of a clip for duplicates.
        """
        own = -1 - torch.arange(self.shape[1]).expand(*self.shape)
        return torch.where(self.spans.heard, own, self.tokens.cpu()).numpy()


def positions_from_mask(mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Cumulative sum of the mask, 0 at pads: the positions Hugging Face's ``generate`` uses."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def text_input(
    *,
    input_ids: Int[Tensor, "batch pos"] | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    position_ids: Int[Tensor, "*axis batch pos"] | None = None,
    **refused: object,
) -> ALMInput:
    """An input without audio; its spans are ``sink``, ``text`` and ``readout``.

    Raises:
        InputError: no ids, or an argument beyond ids, mask and positions.
    """
    input_ids, mask = ids_and_mask(input_ids, attention_mask, refused)
    flags = [span_flags(row, [True] * len(row)) for row in mask.tolist()]
    return ALMInput(
        tokens=input_ids,
        attention_mask=mask,
        position_ids=positions_from_mask(mask) if position_ids is None else position_ids,
        spans=span_map(flags, input_ids.shape[1]),
    )


def ids_and_mask(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    refused: dict[str, object],
    *takes: str,
    prefix: str = "",
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Ids and mask from the arguments of a ``forward``; without a mask every position is real.

    Args:
        input_ids: ids.
        attention_mask: 1 at real positions; None is everywhere.
        refused: arguments beyond those that are named.
        takes: further arguments that the ``forward`` takes.
        prefix: beginning of the names of the prompt's arguments.

    Raises:
        InputError: no ids, ids that are not ``[batch, pos]``, or arguments beyond these two, the
            positions, and ``takes``.
    """
    own = [f"{prefix}{name}" for name in ("input_ids", "attention_mask", "position_ids")]
    refuse_arguments(refused, ", ".join((*own, *takes)))
    if input_ids is None:
        raise InputError(f"encoding a processor's output: {own[0]} are missing.")
    ids = token_ids(input_ids)
    if attention_mask is None:
        return ids, torch.ones_like(ids)
    mask = torch.as_tensor(attention_mask)
    if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(
            f"encoding prompts {list(ids.shape)}: got an {own[1]} {list(mask.shape)} from "
            f"{mask.min():g} to {mask.max():g}, expected 1 at real positions and 0 at pads, in the "
            "shape of the ids."
        )
    return ids, mask.long()


def token_ids(value: Any, n_axes: tuple[int, ...] = (2,)) -> Int[Tensor, "batch *axis pos"]:
    """Ids ``[batch, pos]`` from a tensor, an array or lists; ids ``[pos]`` are one row.

    Args:
        value: integers, in rows of one length.
        n_axes: numbers of axes that are taken.

    Raises:
        InputError: no integers, rows that differ in length, other axes, or nothing at all.
    """
    ids = integers(value)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim not in n_axes or 0 in ids.shape:
        raise InputError(
            f"reading token ids: got shape {list(ids.shape)}, expected [batch, pos] or [pos], with "
            "one id or more in each row."
        )
    return ids


def integers(value: Any) -> Int[Tensor, "..."]:
    """Ids of any shape, from a tensor, an array, lists or one number.

    Raises:
        InputError: something else than integers, or rows that differ in length.
    """
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"reading token ids: got {type(value).__name__} {str(value)[:60]!r}, expected integers "
            "in rows of one length. Pad on the left, and say so in an attention_mask."
        ) from error
    # An empty list is of floats to torch.
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise InputError(
            f"reading token ids: got {str(ids.dtype).removeprefix('torch.')} of shape "
            f"{list(ids.shape)}, expected integers. Audio goes in by `prepare`, embeddings by "
            "`start_at_layer=0`."
        )
    return ids.long()


def check_embedded(ids: Int[Tensor, "batch pos"], tokenizer: Any, d_vocab: int) -> None:
    """Refuse tokens of a text that the model has no embedding for.

    Raises:
        InputError: there are any, as where tokens were added to the tokenizer alone.
    """
    if beyond := sorted({*ids[ids >= d_vocab].tolist()}):
        named = [f"{tokenizer.convert_ids_to_tokens(id_)!r} ({id_})" for id_ in beyond[:5]]
        raise InputError(
            f"tokenising text: the model has no embedding for {', '.join(named)}; it has "
            f"{d_vocab}, and its tokenizer {len(tokenizer)} tokens. Leave them out, or use the "
            "tokenizer that the weights came with."
        )


def check_memory(memory: object, n_rows: int, d_model: int | None = None) -> None:
    """Refuse what cross-attention could not read for some prompts.

    Raises:
        InputError: no real numbers ``[row, memory_pos, d_model]`` with a row for each prompt.
    """
    expected = f"expected [{n_rows}, memory_pos, {d_model or 'd_model'}], one for each prompt"
    if not isinstance(memory, Tensor) or not memory.is_floating_point():
        kind = str(memory.dtype) if isinstance(memory, Tensor) else type(memory).__name__
        raise InputError(f"reading a memory of {kind}: {expected}, in a tensor of real numbers.")
    sizes = (
        [n_rows, max(memory.shape[1], 1), d_model or memory.shape[2]] if memory.ndim == 3 else []
    )
    if list(memory.shape) != sizes:
        raise InputError(f"reading a memory {list(memory.shape)}: {expected}.")


def unpadded_input(resid: Float[Tensor, "batch pos d_model"]) -> ALMInput:
    """Positions 0, 1, ... for a residual stream that came without its prompt."""
    batch, pos = resid.shape[:2]
    return text_input(input_ids=torch.zeros(batch, pos, dtype=torch.long, device=resid.device))


def refuse_arguments(arguments: dict[str, object], expected: str) -> None:
    """Name the arguments of a Hugging Face ``forward`` that are no input.

    Raises:
        InputError: there are any.
    """
    if given := [name for name, value in arguments.items() if value is not None]:
        raise InputError(
            f"encoding a processor's output: got {', '.join(sorted(given))}, expected only "
            f"{expected}. Labels, caches and embeddings are not part of an input: compute the "
            "loss from the logits, pass a cache to `model(x, past_key_values=...)` and embeddings "
            "with `start_at_layer=0`."
        )


IdLists = list[int] | list[list[int]] | Int[np.ndarray, "batch pos"] | Int[np.ndarray, " pos"]
ModelInput = ALMInput | TokenIds | Int[Tensor, " pos"] | IdLists | str | list[str]
"""Prompts that a model runs on; all kinds but ``ALMInput`` hold no audio."""
