"""Which position of a prompt is what."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from .errors import InputError

SPAN_NAMES = frozenset({"audio", "audio_struct", "text", "struct", "readout", "sink"})
"""Spans of every input: together, all its real positions."""

Range = tuple[int, int]
"""Half-open range of positions in the padded prompt."""


@dataclass(frozen=True, kw_only=True)
class AudioTokens:
    """How a family marks audio in a prompt."""

    placeholder: int
    """Id that every audio position carries."""
    markers: frozenset[int]
    """Ids of the begin and end markers."""
    seconds_per_token: float | None
    """Duration of one audio position; None where the model has no time axis."""
    max_seconds: float
    """Longest clip the feature extractor keeps."""


NO_AUDIO = AudioTokens(placeholder=-1, markers=frozenset(), seconds_per_token=None, max_seconds=0.0)
"""For text-only prompts: no id is a placeholder."""


@dataclass(frozen=True)
class SpanMap:
    """Which positions are what: span name -> per row, half-open ranges of padded positions.

    ``audio`` (speech frames only), ``audio_struct`` (media markers), ``text`` (the instruction),
    ``struct`` (roles and template), ``readout`` (the position that predicts the first answer
    token) and ``sink`` (the first token) partition the real positions. Named segments of the
    instruction, such as ``label``, are the only spans that overlap another: they lie in ``text``.
    A span that a row lacks is empty there.
    """

    ranges: Mapping[str, Sequence[Sequence[Range]]]
    n_pos: int
    seconds_per_token: float | None = None

    def __getitem__(self, name: str) -> Sequence[Sequence[Range]]:
        """Per row, the ranges of a span."""
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

    def seconds(self, row: int, start_s: float, stop_s: float, *, clip: int = 0) -> list[Range]:
        """Positions that hear a time window of a clip, as ranges like any span's.

        Args:
            row: of the batch.
            start_s: start of the window, in seconds from the start of the clip.
            stop_s: its end. A position belongs to the window if its time slot overlaps it.
            clip: which of the row's clips, in order of appearance.

        Raises:
            InputError: no such clip, no time axis, or a window that misses the clip.
        """
        clips = self["audio"][row]
        if self.seconds_per_token is None or not 0 <= clip < len(clips):
            raise InputError(
                f"finding {start_s}-{stop_s} s of clip {clip} in row {row}: the row has "
                f"{len(clips)} clips"
                + (" and the model has no time axis." if self.seconds_per_token is None else ".")
            )
        first, end = clips[clip]
        # Rounding guards 1.2 / 0.04 = 30.000000000000004 from claiming a 31st slot.
        start = int(round(start_s / self.seconds_per_token, 6))
        stop = -int(-round(stop_s / self.seconds_per_token, 6) // 1)
        start, stop = first + max(start, 0), min(first + stop, end)
        if start >= stop or start_s >= stop_s:
            raise InputError(
                f"finding {start_s}-{stop_s} s of clip {clip} in row {row}: the clip lasts "
                f"{(end - first) * self.seconds_per_token:g} s, and a window needs "
                "start < stop inside it."
            )
        return [(start, stop)]

    def select(self, rows: Sequence[int]) -> "SpanMap":
        """The map of a part of the batch."""
        picked = {name: [spans[row] for row in rows] for name, spans in self.ranges.items()}
        return replace(self, ranges=picked)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, to be saved with every result."""
        return {
            name: [[list(r) for r in row] for row in rows] for name, rows in self.ranges.items()
        }


def span_flags(
    ids: Sequence[int],
    mask: Sequence[int],
    audio: AudioTokens,
    is_text: Sequence[bool],
    segments: Mapping[str, Sequence[bool]],
) -> dict[str, list[bool]]:
    """Per span, which positions of one row belong to it."""
    real = [pos for pos, m in enumerate(mask) if m]
    ends = {real[0], real[-1]} if real else set()

    def flags(belongs: Callable[[int], bool]) -> list[bool]:
        return [bool(m) and pos not in ends and belongs(pos) for pos, m in enumerate(mask)]

    spans = {
        "audio": flags(lambda pos: ids[pos] == audio.placeholder),
        "audio_struct": flags(lambda pos: ids[pos] in audio.markers),
        "text": flags(
            lambda pos: is_text[pos] and ids[pos] not in audio.markers | {audio.placeholder}
        ),
    }
    spans["struct"] = flags(lambda pos: not any(span[pos] for span in spans.values()))
    for name, inside in segments.items():
        spans[name] = [a and b for a, b in zip(spans["text"], inside, strict=True)]
    spans["sink"] = [pos == real[0] if real else False for pos in range(len(mask))]
    spans["readout"] = [pos == real[-1] if real else False for pos in range(len(mask))]
    return spans


def span_map(
    rows: Sequence[Mapping[str, Sequence[bool]]], n_pos: int, seconds_per_token: float | None
) -> SpanMap:
    """The map of a batch, from what ``span_flags`` says of its rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    ranges = {name: [ranges_of(row.get(name, ())) for row in rows] for name in names}
    return SpanMap(ranges=ranges, n_pos=n_pos, seconds_per_token=seconds_per_token)


def ranges_of(flags: Sequence[bool]) -> list[Range]:
    """Maximal runs of True as half-open ranges."""
    ranges: list[Range] = []
    for pos, flag in enumerate(flags):
        if flag and ranges and ranges[-1][1] == pos:
            ranges[-1] = (ranges[-1][0], pos + 1)
        elif flag:
            ranges.append((pos, pos + 1))
    return ranges
