"""Spans: names for the positions of a prompt."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from .errors import InputError

SPAN_NAMES = frozenset({"audio", "audio_struct", "text", "struct", "readout", "sink", "padding"})
"""Names of the spans that are all real positions together. An audio encoder's rows have two: those
of a clip, and those behind it that are heard all the same."""

Range = tuple[int, int]
"""Half-open range of positions in the padded prompt."""


@dataclass(frozen=True, kw_only=True)
class AudioTokens:
    """Marks of audio in a prompt, as a family sets them."""

    placeholder: int | None
    """Id that every audio position carries, and no other; None where no id tells them."""
    markers: frozenset[int]
    """Ids of the begin and end markers."""
    seconds_per_token: float | None
    """Duration of one audio position; None where the model has no time axis."""
    max_seconds: float | None
    """Longest clip the feature extractor keeps; None without a limit."""
    text: str | None = None
    """Text that stands for a clip in the rendered prompt where ``placeholder`` is None: the pieces
    around it are tokenised one by one."""
    prepend_bos: bool = True
    """Whether the tokenizer's own special tokens go before the first piece."""


@dataclass(frozen=True)
class SpanMap:
    """Ranges of spans: span name -> per row, half-open ranges of padded positions.

    ``audio`` (speech frames only), ``audio_struct`` (media markers), ``text`` (the instruction),
    ``struct`` (roles and template), ``readout`` (the position that predicts the first answer
    token) and ``sink`` (the first token) partition the real positions. Named segments, such as
    ``label``, are the only spans that overlap another: they lie in ``text`` or, as parts of how the
    answer begins, in ``struct``.
    A span that a row lacks is empty there.
    """

    ranges: Mapping[str, Sequence[Sequence[Range]]]
    n_pos: int
    seconds_per_token: float | None = None
    clips: Sequence[Sequence[Sequence[Range]]] = ()
    """Positions that a clip's embeddings fill, per row and clip, whatever span they count to.

    Empty where no row has audio. Usually one range; a family that brackets parts of a clip by
    markers has several.
    """

    def __getitem__(self, name: str) -> Sequence[Sequence[Range]]:
        """Ranges of a span, per row.

        Raises:
            InputError: no span of that name.
        """
        if name not in self.ranges:
            raise InputError(
                f"looking up span {name!r}: this input has {', '.join(sorted(self.ranges))}."
            )
        return self.ranges[name]

    def __iter__(self) -> Iterator[str]:
        """Span names."""
        return iter(self.ranges)

    def mask(self, name: str, *others: str) -> Bool[Tensor, "batch pos"]:
        """True at the positions of a span, or of the union of several."""
        rows = [self[span] for span in (name, *others)]
        mask = torch.zeros(len(rows[0]), self.n_pos, dtype=torch.bool)
        for span in rows:
            for row, ranges in enumerate(span):
                for start, stop in ranges:
                    mask[row, start:stop] = True
        return mask

    def positions(self, name: str, row: int) -> list[int]:
        """Positions of a span in one row, ascending."""
        return [pos for start, stop in self[name][row] for pos in range(start, stop)]

    @cached_property
    def heard(self) -> Bool[Tensor, "batch pos"]:
        """True where a clip is heard: at the positions that its embeddings fill."""
        n_rows = max((len(rows) for rows in (*self.ranges.values(), self.clips)), default=0)
        with torch.inference_mode(False):  # kept for later runs, with gradients or without
            mask = torch.zeros(n_rows, self.n_pos, dtype=torch.bool)
        for row, clips in enumerate(self.clips):
            for start, stop in (one for clip in clips for one in clip):
                mask[row, start:stop] = True
        return mask

    def seconds(self, row: int, start_s: float, stop_s: float, *, clip: int = 0) -> list[Range]:
        """Positions that hear a time window of a clip, as ranges like any span's.

        Args:
            row: index of the row in the batch.
            start_s: start of the window, in seconds from the start of the clip.
            stop_s: its end. A position belongs to the window if its time slot overlaps it.
            clip: index of the clip among the row's, in order of appearance.

        Raises:
            InputError: no such clip, no time axis, or a window that misses the clip.
        """
        clips = self.clips[row] if self.clips else ()
        if self.seconds_per_token is None or not 0 <= clip < len(clips):
            raise InputError(
                f"finding {start_s}-{stop_s} s of clip {clip} in row {row}: the row has "
                f"{len(clips)} clips"
                + (" and the model has no time axis." if self.seconds_per_token is None else ".")
            )
        positions = [pos for start, stop in clips[clip] for pos in range(start, stop)]
        # Rounding guards 1.2 / 0.04 = 30.000000000000004 from claiming a 31st slot.
        first = max(int(round(start_s / self.seconds_per_token, 6)), 0)
        end = -int(-round(stop_s / self.seconds_per_token, 6) // 1)
        if first >= min(end, len(positions)) or start_s >= stop_s:
            raise InputError(
                f"finding {start_s}-{stop_s} s of clip {clip} in row {row}: the clip lasts "
                f"{len(positions) * self.seconds_per_token:g} s, and a window needs "
                "start < stop inside it."
            )
        return as_ranges(positions[first:end])

    def select(self, rows: Sequence[int]) -> "SpanMap":
        """Span map of some rows of the batch."""
        picked = {name: [spans[row] for row in rows] for name, spans in self.ranges.items()}
        clips = [self.clips[row] for row in rows] if self.clips else ()
        return replace(self, ranges=picked, clips=clips)

    @classmethod
    def joined(cls, maps: Sequence["SpanMap"], n_rows: Sequence[int]) -> "SpanMap":
        """Span maps of so many rows each, as of one left-padded batch."""
        width = max(one.n_pos for one in maps)

        def moved(ranges: Sequence[Range], by: int) -> list[Range]:
            return [(start + by, stop + by) for start, stop in ranges]

        names = dict.fromkeys(name for one in maps for name in one)
        ranges: dict[str, list[list[Range]]] = {name: [] for name in names}
        clips: list[list[list[Range]]] = []
        for one, n in zip(maps, n_rows, strict=True):
            by = width - one.n_pos
            for name in names:
                ranges[name] += [moved(row, by) for row in one.ranges.get(name, [()] * n)]
            clips += [[moved(clip, by) for clip in row] for row in one.clips or [()] * n]
        has_clips = any(one.clips for one in maps)
        return replace(maps[0], ranges=ranges, n_pos=width, clips=clips if has_clips else ())

    def to_json(self) -> dict[str, Any]:
        """Plain lists of the ranges, to be saved with every result."""
        return {
            name: [[list(r) for r in row] for row in rows] for name, rows in self.ranges.items()
        }

    def row_to_json(self, row: int) -> dict[str, list[list[int]]]:
        """The ranges of one row."""
        return {name: [list(r) for r in rows[row]] for name, rows in self.ranges.items()}


def span_flags(
    mask: Sequence[int],
    is_text: Sequence[bool],
    *,
    is_audio: Sequence[bool] | None = None,
    is_marker: Sequence[bool] | None = None,
    segments: Mapping[str, Sequence[bool]] | None = None,
) -> dict[str, list[bool]]:
    """Flags per span of the positions of one row; audio and markers are never text."""
    nowhere = [False] * len(mask)
    is_audio, is_marker = is_audio or nowhere, is_marker or nowhere
    real = [pos for pos, m in enumerate(mask) if m]
    ends = {real[0], real[-1]} if real else set()

    def flags(belongs: Callable[[int], bool]) -> list[bool]:
        return [bool(m) and pos not in ends and belongs(pos) for pos, m in enumerate(mask)]

    spans = {
        "audio": flags(lambda pos: is_audio[pos]),
        "audio_struct": flags(lambda pos: is_marker[pos] and not is_audio[pos]),
        "text": flags(lambda pos: is_text[pos] and not (is_audio[pos] or is_marker[pos])),
    }
    spans["struct"] = flags(lambda pos: not any(span[pos] for span in spans.values()))
    words = flags(lambda pos: not (is_audio[pos] or is_marker[pos]))
    for name, inside in (segments or {}).items():
        spans[name] = [a and b for a, b in zip(words, inside, strict=True)]
    spans["sink"] = [pos == real[0] if real else False for pos in range(len(mask))]
    spans["readout"] = [pos == real[-1] if real else False for pos in range(len(mask))]
    return spans


def span_map(
    rows: Sequence[Mapping[str, Sequence[bool]]],
    n_pos: int,
    seconds_per_token: float | None = None,
    clips: Sequence[Sequence[Sequence[Range]]] = (),
) -> SpanMap:
    """Span map of a batch, from the ``span_flags`` of its rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    ranges = {
        name: [as_ranges(pos for pos, flag in enumerate(row.get(name, ())) if flag) for row in rows]
        for name in names
    }
    return SpanMap(ranges=ranges, n_pos=n_pos, seconds_per_token=seconds_per_token, clips=clips)


def clip_ranges(is_audio: Sequence[bool], n_tokens: Sequence[int]) -> list[list[Range]]:
    """Ranges of each clip of one row: clips fill the audio positions in order."""
    positions = [pos for pos, flag in enumerate(is_audio) if flag]
    ends = list(accumulate(n_tokens, initial=0))
    return [as_ranges(positions[start:end]) for start, end in pairwise(ends)]


def as_ranges(positions: Iterable[int]) -> list[Range]:
    """Ascending positions as half-open ranges."""
    ranges: list[Range] = []
    for pos in positions:
        if ranges and ranges[-1][1] == pos:
            ranges[-1] = (ranges[-1][0], pos + 1)
        else:
            ranges.append((pos, pos + 1))
    return ranges
