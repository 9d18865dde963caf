"""The frames of an MP3, walked over without decoding them, to tell whether it is whole.

Sources: ISO 11172-3 and 13818-3 for the frames; the ID3v1, ID3v2 and APE tags that players write.
"""

import re
import struct
from typing import NamedTuple


class Frames(NamedTuple):
    """What the frames of a file hold together."""

    n_samples: int
    per_frame: int
    """Samples of each; 0 where there is none."""
    n_unread: int
    """Bytes that are neither frames nor tags."""
    is_cut: bool
    """Whether the file ends inside the last frame or tag."""


class _Frame(NamedTuple):
    """The head of a frame of MPEG audio."""

    size: int
    n_samples: int
    rate: int
    kind: int
    """Version and layer."""


_KBPS = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_HZ = (44100, 48000, 32000)


def _frame(data: bytes, at: int) -> _Frame | None:
    """The frame at a place; None where none is, or one without a bit rate."""
    head = int.from_bytes(data[at : at + 4], "big")
    version, layer = head >> 19 & 3, 4 - (head >> 17 & 3)
    kbps, hz, padding = head >> 12 & 15, head >> 10 & 3, head >> 9 & 1
    if head >> 21 != 0x7FF or version == 1 or layer == 4 or kbps in (0, 15) or hz == 3:
        return None
    is_mpeg1 = version == 3
    bit_rate = 1000 * _KBPS[is_mpeg1, layer if is_mpeg1 else min(layer, 2)][kbps - 1]
    hertz = _HZ[hz] >> {3: 0, 2: 1, 0: 2}[version]
    n_samples = 384 if layer == 1 else 1152 if layer == 2 or is_mpeg1 else 576
    unit = 4 if layer == 1 else 1  # bytes
    size = unit * (n_samples // (8 * unit) * bit_rate // hertz + padding)
    return _Frame(size, n_samples, hertz, head >> 17 & 15)


def _tag_size(data: bytes, at: int) -> int:
    """Bytes of the tag that is here, before, after or between the frames; 0 if none is."""
    if data.startswith(b"ID3", at) and at + 10 <= len(data):
        size = sum(
            byte << shift
            for byte, shift in zip(data[at + 6 : at + 10], (21, 14, 7, 0), strict=True)
        )
        return 10 + size + 10 * (data[at + 5] >> 4 & 1)
    if data.startswith(b"APETAGEX", at) and at + 24 <= len(data):
        size, flags = struct.unpack_from("<12xI4xI", data, at)
        return 32 + int(size) * (flags >> 29 & 1)  # a foot alone has its items before it
    return 128 if data.startswith(b"TAG", at) else 0


# Where a frame or a tag may be, after bytes that are neither.
_NEXT = re.compile(rb"\xff[\xe0-\xff]|ID3|TAG|APETAGEX")


def walk(data: bytes) -> Frames:
    """The frames of a file, tags passed over."""
    at = n_unread = n_samples = 0
    first: _Frame | None = None
    while at < len(data):
        frame = _frame(data, at)
        # What looks like a first frame is one if another follows.
        alike = first or (frame and _frame(data, at + frame.size))
        if frame and alike and frame[1:] == alike[1:]:
            n_samples += frame.n_samples
            first = first or frame
            at += frame.size
        elif size := _tag_size(data, at):
            at += size
        else:
            found = _NEXT.search(data, at + 1)
            here, at = at, found.start() if found else len(data)
            n_unread += at - here
    return Frames(n_samples, first.n_samples if first else 0, n_unread, at > len(data))
