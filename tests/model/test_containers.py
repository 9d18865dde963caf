"""Whether a sound file is whole: every container that is read, whole, cut, joined, mis-stated."""

import io
import re
import struct
import warnings
from functools import cache

import numpy as np
import pytest
import soundfile

from hooked_alm.audio import READABLE_SUFFIXES, decode_file
from hooked_alm.errors import InputError

RATE = 16000
N = 16001

# Suffix: format and codings, in what libsndfile can write of it.
WRITTEN = {
    "wav": ("WAV", "PCM_16", "PCM_U8", "PCM_24", "FLOAT", "ULAW", "MS_ADPCM", "GSM610", "G721_32"),
    "wave": ("WAVEX", "PCM_16", "DOUBLE"),
    "rifx": ("WAV", "PCM_16"),
    "rf64": ("RF64", "PCM_16", "PCM_24"),
    "w64": ("W64", "PCM_16", "GSM610"),
    "aif": ("AIFF", "PCM_16", "PCM_24"),
    "aiff": ("AIFF", "PCM_S8"),
    "aifc": ("AIFF", "FLOAT", "ULAW", "IMA_ADPCM", "GSM610"),
    "svx": ("SVX", "PCM_16", "PCM_S8"),
    "caf": ("CAF", "PCM_16", "PCM_24", "ALAC_16"),
    "au": ("AU", "PCM_16", "ULAW", "G721_32"),
    "snd": ("AU", "ALAW"),
    "nist": ("NIST", "PCM_16", "ULAW"),
    "sph": ("NIST", "PCM_16"),
    "avr": ("AVR", "PCM_16"),
    "wve": ("WVE", "ALAW"),
    "voc": ("VOC", "PCM_16", "PCM_U8", "ULAW"),
    "flac": ("FLAC", "PCM_16", "PCM_24", "PCM_S8"),
    "ogg": ("OGG", "VORBIS", "OPUS"),
    "oga": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
FILES = [(suffix, kind, one) for suffix, (kind, *codings) in WRITTEN.items() for one in codings]
FILES.append(("", "HTK", "PCM_16"))  # known by its bytes alone


@cache
def content(kind: str, coding: str, suffix: str = "") -> bytes:
    samples = 0.1 * np.random.default_rng(0).standard_normal(N)
    file = io.BytesIO()
    endian = "BIG" if suffix == "rifx" else None
    soundfile.write(file, samples, RATE, format=kind, subtype=coding, endian=endian)
    return file.getvalue()


def loss(data: bytes) -> str:
    """What is said of a file that is not whole: its error, or its notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "; ".join(decode_file(data)[2])
        except InputError as error:
            return str(error)


def test_every_readable_name_is_tested() -> None:
    assert {*WRITTEN} == READABLE_SUFFIXES


@pytest.mark.parametrize(("suffix", "kind", "coding"), FILES)
def test_a_whole_file_is_read_as_libsndfile_reads_it(suffix: str, kind: str, coding: str) -> None:
    data = content(kind, coding, suffix)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        expected = file.read(file.frames, dtype="float32", always_2d=True).T
    channels, rate, notes = decode_file(data)
    assert np.array_equal(channels, expected)
    # WVE has one rate, and the oldest blocks of VOC have it as a divisor.
    assert rate == (
        8000 if kind == "WVE" else 16129 if (kind, coding) == ("VOC", "PCM_U8") else RATE
    )
    assert notes == []
    assert channels.shape[1] >= N


@pytest.mark.parametrize(("suffix", "kind", "coding"), FILES)
def test_a_cut_file_is_named(suffix: str, kind: str, coding: str) -> None:
    data = content(kind, coding, suffix)
    # A container may end in a byte of padding, or in one that says that it ends.
    for n in (len(data) // 10, len(data) // 3, len(data) // 2, len(data) * 9 // 10, len(data) - 3):
        assert loss(data[:n]), n


@pytest.mark.parametrize(("suffix", "kind", "coding"), FILES)
def test_joined_files_are_named(suffix: str, kind: str, coding: str) -> None:
    data = content(kind, coding, suffix)
    assert loss(data + data)


def patched(kind: str, mark: bytes, offset: int, layout: str, value: int) -> bytes:
    """A file with a number of its header replaced, ``offset`` bytes after a mark."""
    data = bytearray(content(kind, "ALAW" if kind == "WVE" else "PCM_16"))
    struct.pack_into(layout, data, data.index(mark) + offset, value)
    return bytes(data)


SIZES = {
    "WAV": (b"data", 4, "<I"),
    "RF64": (b"ds64", 16, "<q"),
    "W64": (b"data", 16, "<q"),
    "AIFF": (b"SSND", 4, ">I"),
    "SVX": (b"BODY", 4, ">I"),
    "CAF": (b"data", 4, ">q"),
    "AU": (b".snd", 8, ">I"),
    "AVR": (b"2BIT", 26, ">I"),
    "WVE": (b"ALaw", 18, ">I"),
    "VOC": (b"\x09", 1, "<I"),
}


@pytest.mark.parametrize("size", [100, 1000, 20001, 50000])
@pytest.mark.parametrize("kind", SIZES)
def test_a_header_that_states_another_size_is_refused(kind: str, size: int) -> None:
    assert "is corrupt" in loss(patched(kind, *SIZES[kind], size))


@pytest.mark.parametrize(
    ("kind", "size"),
    [("WAV", 0xFFFFFFFF), ("WAV", 0x7FFFF000), ("AIFF", 0x7F000008), ("AU", 0xFFFFFFFF)],
)
def test_what_was_written_to_a_pipe_is_whole(kind: str, size: int) -> None:
    channels, _, notes = decode_file(patched(kind, *SIZES[kind], size))
    assert np.array_equal(channels, decode_file(content(kind, "PCM_16"))[0])
    assert notes == []


def test_a_size_of_nothing_is_refused() -> None:
    """Some programs leave 0 where they do not know the size; libsndfile reads nothing of WAV."""
    for kind in ("WAV", "AU", "RF64"):
        assert "no part of what its header accounts for" in loss(patched(kind, *SIZES[kind], 0))


PCM = content("WAV", "PCM_16")
U8 = content("WAV", "PCM_U8")[: 44 + N]
LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf58.29.100\0"
FLAC = content("FLAC", "PCM_16")
MP3 = content("MP3", "MPEG_LAYER_III")
FRAME = 288  # bytes of the first, which says how many follow
ID3 = b"ID3\4\0\0\0\0\x0a\0" + bytes(1280)
APE = b"APETAGEX" + struct.pack("<4I8x", 2000, 32 + 6, 1, 5 << 29) + b"Artist" + (
    b"APETAGEX" + struct.pack("<4I8x", 2000, 32 + 6, 1, 1 << 31)
)  # fmt: skip
OGG = content("OGG", "VORBIS")
VOC = content("VOC", "PCM_16")
ALAC = content("CAF", "ALAC_16")
SVX = content("SVX", "PCM_16")
ANNO = b"ANNO" + struct.pack(">I", 8000) + b"x" * 8000


@pytest.mark.parametrize(
    "data",
    [
        PCM + LIST,
        U8 + b"\0" + LIST,
        U8 + LIST,  # some writers forget to pad
        U8,
        ID3 + FLAC + b"TAG" + bytes(125),
        ID3 + MP3 + APE + b"TAG" + bytes(125),
    ],
)
def test_tags_and_chunks_are_no_loss(data: bytes) -> None:
    channels, _, notes = decode_file(data)
    assert channels.shape == (1, N)
    assert notes == []


def at(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # A recorder's padding, and a tag where none belongs, are named, and no error.
        (PCM + bytes(4000), r"^4000 of its 36046 bytes are no part"),
        (PCM + b"TAG" + bytes(125), r"^128 of its 32174 bytes are no part"),
        (PCM + bytes(100) + b"x" * 900, r"is corrupt: 1000 of .* are not read\. It is two files"),
        (PCM[:-7], r"it ends after 31995 bytes of samples, expected the 32002 of its header"),
        (at(PCM, 22, b"\3"), "its header contradicts itself: 2 bytes per frame and 32000 per"),
        (at(PCM, 34, b"\x14"), "^its header contradicts itself: 2 bytes .* expected 3 and 48000"),
        (at(PCM, 24, b"\x40\x1f"), "contradicts itself: .* expected 2 and 16000$"),
        (at(FLAC, 22, struct.pack(">I", 5000)), "is corrupt: its samples are not those that were"),
        (at(FLAC, 30, b"xyz"), "by its MD5 of them"),
        (FLAC + FLAC + FLAC, "it is 3 recordings one after another, of which only the first"),
        (at(FLAC, 9000, b"xyz"), "corrupt or not an audio file .*flac decoder"),
        # libsndfile seeks before the first byte of this one.
        (at(content("AIFF", "PCM_16"), 41, b"\xe8\3\0\0"), "is corrupt"),
        (OGG + content("OGG", "OPUS"), "it is 2 recordings one after another"),
        (at(OGG, 6000, b"x"), "is corrupt: 2 of its pages are cut, damaged or missing"),
        (OGG[: OGG.rfind(b"OggS")], r"^its last page is not marked as such: is it whole\?$"),
        (OGG + b"junk" * 99, "bytes are no part of what its header accounts for"),
        (VOC[:-1] + VOC[26:], "its sound is in 2 blocks, expected one. Convert it to wav"),
        (VOC[:-3], "it ends 2 bytes before the end of its last block"),
        (at(ALAC, 125, b"\x66"), r"it has 16001 samples, [0-9]+ could be decoded\. Copy"),
        # libsndfile hears the chunk after the sound, too.
        (SVX + ANNO, "it has 32002 bytes of samples, 40010 were decoded. Convert it to wav"),
        (MP3[:-9], "its last frame is cut"),
        (MP3[:3000], "the header promises 16001 samples, [0-9]+ could be decoded"),
        (MP3 + MP3, r"its frames hold [0-9]+ samples, 16001 could be decoded\. It is several"),
        (MP3 + ID3 + MP3, r"its frames hold [0-9]+ samples, 16001 could be decoded"),
        # Without a count of frames, libsndfile guesses how many there are, and reads no more.
        (MP3[FRAME:], "could be decoded. It is several files joined, or of a variable bit rate"),
        (at(MP3, 2600, bytes(900)), "bytes are no part of what its header accounts for"),
    ],
)
def test_damage_is_named(data: bytes, message: str) -> None:
    assert_matches(message, loss(data))


@pytest.mark.parametrize("kind", ["PAF", "PVF", "IRCAM", "MAT5", "MPC2K", "XI"])
def test_a_container_that_is_not_checked_is_refused(kind: str) -> None:
    coding = soundfile.default_subtype(kind)
    assert "of which it cannot be told whether it is whole" in loss(content(kind, coding))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (at(PCM, 24, struct.pack("<I", 1)), "got 1 for the rate of bytes, expected .* from 1000"),
        (at(PCM, 24, struct.pack("<I", 4 * 10**9)), "for the rate of bytes|corrupt or not an aud"),
        (at(PCM, 24, bytes(4)), "for the rate of bytes|corrupt or not an audio file"),
        (at(PCM, 22, struct.pack("<HIIH", 1000, RATE, 32000000, 2000)), "has 1000 channels, exp"),
        (at(FLAC, 21, b"\xf1" + bytes(4)), "has 4294967296 samples in 1 channels by its header"),
        (at(FLAC, 22, struct.pack(">I", 20000)), "corrupt or not an audio file"),
    ],
)
def test_absurd_headers_are_refused(data: bytes, message: str) -> None:
    assert_matches(message, loss(data))


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A file cut, cut out of, joined, lengthened, or with bytes of it replaced."""
    place, n = (int(i) for i in rng.integers(1, len(data), 2))
    noise = rng.bytes(n)
    return [
        data[:place],
        data[place:],
        data[:place] + data[place + n :],
        data[:place] + noise + data[place:],
        data + data[:place],
        at(data, place, noise[: min(n, len(data) - place)]),
        at(data, place % 64, noise[:4]),
    ][rng.integers(7)]


def test_random_damage_is_no_silent_loss_and_no_traceback() -> None:
    """No sample is lost in silence, but where the header says that they are of several channels."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        suffix, kind, coding = FILES[rng.integers(len(FILES))]
        data = damaged(content(kind, coding, suffix), rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                channels, rate, notes = decode_file(data)
            except InputError:
                continue
        is_short = channels.shape[1] < 0.98 * N
        assert notes or not is_short or len(channels) > 1, (kind, coding, channels.shape, rate)
