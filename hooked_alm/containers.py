"""Whether a sound file is whole, decided by its bytes, for every container that we say we read.

libsndfile decodes what it finds and says nothing of what it does not: a file that was cut short,
two that were joined, or a header that states too small a size give a shorter clip, or another one.
So each container's own account of itself is held against its bytes.

Sources: the containers' specifications (RIFF/RF64: EBU Tech 3306; Wave64: Sony; AIFF-C and 8SVX:
EA IFF 85; CAF: Apple; SPHERE: NIST; FLAC: RFC 9639; Ogg: RFC 3533), and libsndfile 1.2.2 for what
it reads of them.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from .mpeg import walk

Decoded = Float32[np.ndarray, "channel sample"]

# Programs that write to a pipe cannot know the length, and leave a huge one in the header.
_STREAMED_BYTES = 0x7E000000
# Less than this share of a file may be a tag that a decoder rightly passes over; zeros may be
# padding, however many.
_LEAST_SHARE = 0.01
_BYTES_PER_SAMPLE = {
    "PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4,
    "FLOAT": 4, "DOUBLE": 8,
}  # fmt: skip


class Loss(NamedTuple):
    """A difference between a file and what was decoded of it."""

    text: str
    cure: str = "Copy or download it again"
    is_certain: bool = True
    """False where what the file says may be an estimate, or what is passed over is no sound."""


class Extent(NamedTuple):
    """A container's account of itself, in bytes."""

    sound: int
    """Of sound, as its header states."""
    missing: int
    """Of these, how many the file lacks."""
    unread: int
    """After all that the container accounts for."""

    @classmethod
    def stated(cls, data: bytes, start: int, sound: int) -> "Extent":
        """The extent of a file whose header states where its sound is."""
        if not 0 <= sound < _STREAMED_BYTES:
            sound = len(data) - start
        missing = start + sound - len(data)
        return cls(sound, max(0, missing), max(0, -missing))


@dataclass(frozen=True, slots=True)
class _Chunks:
    """How a container of chunks lays them out; each has a name and a size at its head."""

    head: str
    """Format of name and size, as `struct` has it."""
    start: int
    """Where the first one is."""
    sound: bytes
    """How the name of the chunk with the sound begins."""
    align: int = 2
    is_head_counted: bool = False
    """Whether a size includes the head."""
    name: re.Pattern[bytes] = re.compile(rb"(?!RIFF|RIFX|RF64|FORM|caff)[ -~]{4}")
    """What a name looks like, and sound that was taken for one does not."""

    def extent(self, data: bytes, stated: int | None = None) -> Extent:
        """Walk over the chunks; ``stated`` replaces the size of that with the sound."""
        head, at = struct.Struct(self.head), self.start
        found: Extent | None = None
        while self.name.match(data, at) and at + head.size <= len(data):
            name, size = head.unpack_from(data, at)
            at += head.size
            size -= head.size * self.is_head_counted
            if found is None and name.startswith(self.sound):
                found = Extent.stated(data, at, size if stated is None else stated)
                size = found.sound - found.missing
            elif not 0 <= size <= len(data) - at:
                at -= head.size
                break
            at += size
            padded = min(at + -size % self.align, len(data))
            # Some writers forget to pad.
            if self.name.match(data, padded) or not self.name.match(data, at):
                at = padded
        sound, missing, _ = found or (0, 0, 0)
        return Extent(sound, missing, len(data) - at)


_RIFF = _Chunks("<4sI", 12, b"data")
_RIFX = _Chunks(">4sI", 12, b"data")
_AIFF = _Chunks(">4sI", 12, b"SSND")
_SVX = _Chunks(">4sI", 12, b"BODY")
_CAF = _Chunks(">4sq", 8, b"data")
_W64 = _Chunks(
    "<16sq", 40, b"data", align=8, is_head_counted=True,
    name=re.compile(rb"(?s:.{10})\x00\xc0\x4f\x8e\xdb\x8a"),
)  # fmt: skip


def _wav(data: bytes, frame: int) -> Extent:
    return (_RIFX if data.startswith(b"RIFX") else _RIFF).extent(data)


def _rf64(data: bytes, frame: int) -> Extent:
    # Its sizes of 64 bits are in the first chunk: of the file, then of the sound.
    return _RIFF.extent(data, struct.unpack_from("<q", data, 28)[0])


def _au(data: bytes, frame: int) -> Extent:
    order = "<" if data.startswith(b"dns.") else ">"
    return Extent.stated(data, *struct.unpack_from(f"{order}II", data, 4))


def _nist(data: bytes, frame: int) -> Extent:
    start = int(data[8:16])
    count = re.search(rb"^sample_count -i (\d+)", data[:start], re.MULTILINE)
    return Extent.stated(data, start, frame * int(count[1]) if count else 0)


def _at(start: int, layout: str, offset: int) -> Callable[[bytes, int], Extent]:
    """A header of fixed size that states the number of frames."""

    def extent(data: bytes, frame: int) -> Extent:
        return Extent.stated(data, start, frame * struct.unpack_from(layout, data, offset)[0])

    return extent


def _by_extent(extent_of: Callable[[bytes, int], Extent]) -> "WholenessCheck":
    """The check of a container that states how large it is.

    Args:
        extent_of: a file, given the bytes that its coding has per frame, 0 where they differ.
    """

    def check(data: bytes, samples: Decoded, subtype: str) -> Iterator[Loss]:
        frame = len(samples) * _BYTES_PER_SAMPLE.get(subtype, 0)
        sound, missing, unread = extent_of(data, frame)
        if missing:
            yield Loss(
                f"it ends after {sound - missing} bytes of samples, expected the {sound} of its "
                "header"
            )
        yield from _passed_over(unread, data)
        decoded = frame * samples.shape[1]
        # A header of the sound itself, and a frame that is not whole, are no samples. What follows
        # the sound libsndfile takes for more of it in W64 and SVX.
        if frame and abs(sound - missing - decoded) > 8 + frame:
            yield Loss(
                f"it has {sound} bytes of samples, {decoded} were decoded",
                "Convert it to wav with another program",
            )

    return check


def _with_format(extent_of: Callable[[bytes, int], Extent], head: int = 8) -> "WholenessCheck":
    """The check of a container that states the sizes of a frame and of a second, too.

    Args:
        extent_of: see `_by_extent`.
        head: bytes of name and size before what a chunk holds.
    """
    check_extent = _by_extent(extent_of)

    def check(data: bytes, samples: Decoded, subtype: str) -> Iterator[Loss]:
        yield from check_extent(data, samples, subtype)
        order = ">" if data.startswith(b"RIFX") else "<"
        at = data.index(b"fmt ") + head + 4
        rate, per_second, per_frame = struct.unpack_from(f"{order}IIH", data, at)
        frame = len(samples) * _BYTES_PER_SAMPLE.get(subtype, 0)
        if frame and (per_frame, per_second) != (frame, rate * frame):
            yield Loss(
                f"its header contradicts itself: {per_frame} bytes per frame and {per_second} per "
                f"second, expected {frame} and {rate * frame}",
                is_certain=False,
            )

    return check


def _passed_over(unread: int, data: bytes) -> Iterator[Loss]:
    if unread:
        yield Loss(
            f"{unread} of its {len(data)} bytes are no part of what its header accounts for, and "
            "are not read",
            "It is two files joined, or its header states a wrong size: split it, or write the "
            "recording again",
            is_certain=unread > _LEAST_SHARE * len(data) and any(data[-unread:]),
        )


def _joined(n: int) -> Loss:
    return Loss(
        f"it is {n} recordings one after another, of which only the first would be read",
        "Split it, or join them as wav files",
    )


def _check_caf(data: bytes, samples: Decoded, subtype: str) -> Iterator[Loss]:
    """Chunks, one of which counts the samples where their sizes differ."""
    yield from _by_extent(lambda data, frame: _CAF.extent(data))(data, samples, subtype)
    if subtype.startswith("ALAC") and (at := data.find(b"pakt")) >= 0:
        (stated,) = struct.unpack_from(">q", data, at + 20)
        if stated != samples.shape[1]:
            yield Loss(
                f"it has {stated} samples, {samples.shape[1]} could be decoded",
                is_certain=samples.shape[1] < stated,
            )


def _check_voc(data: bytes, samples: Decoded, subtype: str) -> Iterator[Loss]:
    """Blocks of a type and a size of 24 bits, ended by a type of 0."""
    at, sounds = int.from_bytes(data[20:22], "little"), 0
    while at + 4 <= len(data) and data[at]:
        size = int.from_bytes(data[at + 1 : at + 4], "little")
        sounds += data[at] in (1, 2, 9)
        at += 4 + size
    if at > len(data):
        yield Loss(f"it ends {at - len(data)} bytes before the end of its last block")
    if sounds > 1:
        # libsndfile reads the heads of all but the first as samples.
        yield Loss(f"its sound is in {sounds} blocks, expected one", "Convert it to wav")
    yield from _passed_over(len(data) - at - 1, data) if at < len(data) else ()


def _check_flac(data: bytes, samples: Decoded, subtype: str) -> Iterator[Loss]:
    """What is cut or damaged libFLAC refuses; the rest is in the hash of the samples."""
    head = data.find(b"fLaC\0\0\0\x22")  # a tag may stand before it
    if joined := data.count(b"fLaC\0\0\0\x22", head + 1):
        yield _joined(1 + joined)
    bits = (int.from_bytes(data[head + 20 : head + 22], "big") >> 4 & 31) + 1
    stated = data[head + 26 : head + 42]
    if bits in (8, 16, 24) and any(stated):
        whole = np.ascontiguousarray(samples.T * 2.0 ** (bits - 1)).astype("<i4")
        packed = whole.reshape(-1, 1).view(np.uint8)[:, : bits // 8]
        if hashlib.md5(packed.tobytes(), usedforsecurity=False).digest() != stated:
            yield Loss("its samples are not those that were encoded, by its MD5 of them")


_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """The checksum of a page: CRC-32 with the bits the other way round, from 0."""
    plain = page[:22] + bytes(4) + page[26:]
    reverse = zlib.crc32(plain.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reverse:032b}"[::-1], 2)


def _check_ogg(data: bytes, samples: Decoded, subtype: str) -> Iterator[Loss]:
    """Pages with a number and a checksum each; the last one of a stream is marked."""
    at = unread = bad = starts = 0
    ended, numbers = True, dict[int, int]()
    while (found := data.find(b"OggS", at)) >= 0 and found + 27 <= len(data):
        unread, at = unread + found - at, found
        flags, serial, number, crc, n_segments = struct.unpack_from("<5xB8xIIIB", data, at)
        body = at + 27 + n_segments
        stop = body + sum(data[at + 27 : body])
        if stop > len(data) or _ogg_crc(data[at:stop]) != crc:
            bad, at = bad + 1, at + 4  # libogg, too, goes on from the next mark
            continue
        # The streams of one recording all start before any goes on.
        starts += bool(flags & 2) and (starts == 0 or any(numbers.values()))
        bad += not flags & 2 and number != numbers.get(serial, -1) + 1
        numbers[serial], ended, at = number, bool(flags & 4), stop
    if bad:
        yield Loss(f"{bad} of its pages are cut, damaged or missing")
    if starts > 1:
        yield _joined(starts)
    if not bad:
        yield from _passed_over(unread + len(data) - at, data)
        if not ended:
            yield Loss("its last page is not marked as such: is it whole?", is_certain=False)


def _check_mp3(data: bytes, samples: Decoded, subtype: str) -> Iterator[Loss]:
    """Frames and tags; what the first frame says of the number of frames may be an estimate."""
    frames = walk(data)
    yield from _passed_over(frames.n_unread, data)
    if frames.is_cut:
        yield Loss("its last frame is cut: is it whole?", is_certain=False)
    # Not among them are a first frame that is an index, and an encoder's delay and padding, which
    # may take five more.
    if (n_lost := frames.n_samples - samples.shape[1]) > 6 * frames.per_frame:
        yield Loss(
            f"its frames hold {frames.n_samples} samples, {samples.shape[1]} could be decoded",
            "It is several files joined, or of a variable bit rate without the number of its "
            "frames: convert it to wav with another program",
            is_certain=n_lost > _LEAST_SHARE * frames.n_samples,
        )


WholenessCheck = Callable[[bytes, Decoded, str], Iterator[Loss]]
_CHECKS: dict[str, WholenessCheck] = {
    "WAV": _with_format(_wav),
    "WAVEX": _with_format(_wav),
    "RF64": _with_format(_rf64),
    "W64": _with_format(lambda data, frame: _W64.extent(data), head=24),
    "AIFF": _by_extent(lambda data, frame: _AIFF.extent(data)),
    "SVX": _by_extent(lambda data, frame: _SVX.extent(data)),
    "CAF": _check_caf,
    "AU": _by_extent(_au),
    "NIST": _by_extent(_nist),
    "AVR": _by_extent(_at(128, ">I", 26)),
    "WVE": _by_extent(_at(32, ">I", 18)),
    "HTK": _by_extent(_at(12, ">I", 0)),
    "VOC": _check_voc,
    "FLAC": _check_flac,
    "OGG": _check_ogg,
    "MP3": _check_mp3,
}
"""By the name that libsndfile has for the container. The others do not say how long their sound is
(IRCAM, PAF, PVF, RAW, SD2), or are instruments and matrices rather than recordings (MAT, MPC2K,
SDS, XI)."""


def is_checked(container: str) -> bool:
    """Whether it can be told of a container, by libsndfile's name, that its file is whole."""
    return container in _CHECKS


def losses(container: str, subtype: str, data: bytes, samples: Decoded) -> list[Loss]:
    """What a file says that it holds and its decoded samples lack, or the other way round.

    Args:
        container: by libsndfile's name, one that ``is_checked``.
        subtype: its coding, by libsndfile's name.
        data: the whole file.
        samples: what libsndfile decoded of it.
    """
    try:
        return list(_CHECKS[container](data, samples, subtype))
    except (struct.error, ValueError, IndexError):
        return [Loss("its header is damaged")]
