"""Reading of recordings into what a front-end takes: mono float32 at the model's rate.

``read_audio`` says in ``Waveform.notes`` everything it did to a clip, because a resampled,
downmixed or shortened clip is no longer quite the clip that the user named. Decoding, downmix and
resampling are those of ``transformers.audio_utils.load_audio(backend="soundfile")`` (5.23), equal
bit for bit; repeated here because that function passes arrays through and reports nothing.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
from jaxtyping import Float32

from .bundled import clip_file
from .containers import is_checked, losses
from .errors import InputError
from .samples import (
    AudioArray,
    as_array,
    check_rate,
    check_samples,
    downmix,
    fit_length,
    resample,
    too_long,
    unpack,
    warn,
    warn_of_level,
)
from .storage import expanded


@runtime_checkable
class OpenFile(Protocol):
    """Whatever has ``read``: a file opened in binary mode, a buffer, a remote file."""

    def read(self) -> Any:
        """Its content."""


AudioFile = str | Path | bytes | OpenFile
AudioSource = AudioFile | AudioArray | tuple[AudioArray, int] | Mapping[str, Any]
"""A file by its name, its bytes or open; samples; or what a column of ``datasets`` holds."""

READABLE_SUFFIXES = frozenset(
    "aif aifc aiff au avr caf flac mp3 nist oga ogg opus rf64 rifx snd sph svx voc w64 wav "
    "wave wve".split()
)
"""Names of what libsndfile decodes and `containers` checks; any other name is tried, too."""
HEADERLESS_SUFFIXES = frozenset("al g721 gsm pcm raw ul vox".split())
"""Samples without a header: the same bytes are another clip at another rate or coding."""
UNREADABLE_SUFFIXES = HEADERLESS_SUFFIXES | frozenset(
    "3gp aac ac3 amr ape avi dsf flv ircam m4a m4b m4v mka mkv mov mp4 mpg ogv paf pvf ra sd2 "
    "sds sf ts webm wma wmv wv xi".split()
)
"""Containers without a decoder, that do not say how long their sound is, so that a cut one could
not be told (ircam, paf, pvf, sd2, sf), or of instruments (sds, xi); the error says what to do."""
READABLE = "wav, flac, ogg, opus, mp3, aiff or another format that says how long it is"
_MOST_BYTES = 2**33
"""Of a file, and of its samples: two days of speech at 16 kHz. A header may state anything."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Waveform:
    """A clip, ready for a front-end."""

    samples: Float32[np.ndarray, " sample"]
    """Mono, full scale 1.0; never shares memory with the caller's array."""
    sampling_rate: int
    notes: tuple[str, ...]
    """Notes on what was done to the clip, and what is odd about it."""
    name: str
    """File name; ``array``, or ``bytes`` where there is none."""

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.sampling_rate


def read_audio(
    source: AudioSource,
    *,
    sampling_rate: int,
    max_seconds: int | float | None,
    truncate: bool = False,
) -> Waveform:
    """A clip as mono float32 at ``sampling_rate``, with a record of what was done to it.

    Args:
        source: a file by its name (``~`` is the home folder), its bytes, or open for reading;
            ``bundled:NAME``; an array taken to be at ``sampling_rate``, or ``(array, its rate)``;
            or a mapping as ``datasets`` has it, ``{"array", "sampling_rate"}`` or undecoded
            ``{"bytes", "path"}``. Arrays are 1-D, or 2-D with channels on the smaller side. int16
            and int32 are PCM and scaled to [-1, 1); floating-point arrays are taken as they are.
        sampling_rate: rate of the model, in Hz.
        max_seconds: longest clip that the model takes; None where it has no limit.
        truncate: cut a longer clip to ``max_seconds`` instead of raising.

    Raises:
        InputError: the clip is missing, empty, cannot be decoded, is cut short or joined to
            another, holds NaN, infinite or huge samples, is too long, or has a shape, dtype or rate
            that cannot be used.

    Warns:
        UserWarning: the clip is silent, its samples are far above full scale, or a file holds
            more, or fewer of them, than it says, where what it says may be an estimate.
    """
    check_rate(sampling_rate, "the model's sampling rate")
    if max_seconds is not None and not max_seconds > 0:
        raise InputError(
            f"reading audio: got max_seconds={max_seconds!r}, expected a positive number. "
            "Use None for no limit."
        )
    if isinstance(source, Mapping):
        source = _from_mapping(source)
    if isinstance(source, str):
        source = clip_file(source)
    if _is_file(source):
        limit = None if truncate else max_seconds
        channels, rate, notes = decode_file(source, max_seconds=limit)
        what = _named(source)
        name = Path(what).name
    else:
        channels, rate, notes = unpack(source, sampling_rate)
        name = what = "array"
        check_samples(channels, rate, what)
    samples = resample(downmix(channels, notes), rate, sampling_rate, notes)
    samples = fit_length(samples, sampling_rate, max_seconds, truncate, what, notes)
    warn_of_level(samples, what, notes)
    return Waveform(samples=samples, sampling_rate=sampling_rate, notes=tuple(notes), name=name)


def decode_file(
    source: AudioFile, *, max_seconds: int | float | None = None
) -> tuple[Float32[np.ndarray, "channel sample"], int, list[str]]:
    """A file's samples as they are, its rate, and notes on how it was read.

    Args:
        source: an audio file, by its name, its bytes, or open for reading in binary mode.
        max_seconds: refuse a longer file by its header, before it is decoded.

    Raises:
        InputError: there is no such file, or it holds no sound that can be decoded whole, or NaN,
            infinite or huge samples.

    Warns:
        UserWarning: see `read_audio`.
    """
    import soundfile

    what = _named(source)
    data = _file_bytes(source) if isinstance(source, str | Path) else _bytes_of(source)
    notes: list[str] = []
    try:
        # By its bytes alone: with a name, libsndfile believes the suffix.
        with soundfile.SoundFile(_Content(data)) as file:
            rate, promised = file.samplerate, file.frames
            kind = file.format, file.subtype
            _check_header(what, file, max_seconds)
            channels = file.read(frames=promised, dtype="float32", always_2d=True).T
    except soundfile.SoundFileError as error:
        raise InputError(
            f"decoding audio: {what} is corrupt or not an audio file ({_cause(error)}), "
            f"expected {READABLE}. Play the file, or export it again."
        ) from error
    for loss in losses(*kind, data, channels):
        if loss.is_certain:
            raise InputError(f"decoding audio: {what} is corrupt: {loss.text}. {loss.cure}.")
        warn(loss.text, what, notes)
    if channels.shape[1] < promised:
        # The header of a compressed stream may be an estimate, so this is no proof of damage.
        text = f"the header promises {promised} samples, {channels.shape[1]} could be decoded"
        warn(text, what, notes)
    check_samples(channels, rate, what)
    return channels, rate, notes


class _Content(io.BytesIO):
    """Bytes for libsndfile, which may seek before the first of a damaged file."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go nowhere, where there is nowhere to go: its callbacks print what is raised."""
        try:
            return super().seek(offset, whence)
        except ValueError:
            return -1


def _is_file(source: object) -> TypeGuard[AudioFile]:
    return isinstance(source, str | Path | bytes | OpenFile)


def _named(source: object) -> str:
    """What errors call a file, and what its clip is called after."""
    name = source if isinstance(source, str | Path) else getattr(source, "name", None)
    return str(expanded(name)) if isinstance(name, str | Path) else "bytes"


def _bytes_of(source: Any) -> bytes:
    """The whole content of bytes or of an open file, wherever it was read to before.

    What cannot go back, such as a pipe, is read from where it is.

    Raises:
        InputError: it was opened as text, is closed, or is empty.
    """
    if not isinstance(source, bytes):
        try:
            if getattr(source, "seekable", lambda: hasattr(source, "seek"))():
                source.seek(0)
            source = source.read()
        except Exception as error:  # whatever others' readers raise: a network's errors, too
            raise InputError(
                f"reading audio from an open file: got {str(error)[:200]}, expected one that can "
                "be read. Open it again, in binary mode."
            ) from error
    if not isinstance(source, bytes | bytearray) or not source:
        got = "0 bytes" if not source else type(source).__name__
        raise InputError(
            f"reading audio from bytes: got {got}, expected those of a sound file. Open it in "
            'binary mode ("rb").'
        )
    return bytes(source)


def _from_mapping(value: Mapping[str, Any]) -> Any:
    """What the audio column of a dataset means: samples with their rate, or a file.

    Raises:
        InputError: neither ``array`` and ``sampling_rate``, nor ``bytes`` or ``path``.
    """
    if value.get("array") is not None and value.get("sampling_rate") is not None:
        array = value["array"]
        return as_array(array) if isinstance(array, list) else array, value["sampling_rate"]
    if value.get("bytes") is not None:
        return value["bytes"]
    if value.get("array") is None and value.get("path") is not None:
        return value["path"]
    raise InputError(
        f"reading audio: got a mapping with {', '.join(map(repr, value)) or 'nothing in it'}, "
        "expected 'array' with 'sampling_rate', or 'bytes', or 'path', as the audio column of a "
        "dataset has them."
    )


def _file_bytes(name: str | Path) -> bytes:
    """The content of a local file.

    Raises:
        InputError: it is none, cannot be read, is empty or huge, or its suffix is that of a format
            that is not read.
    """
    path = expanded(name)
    doing = f"opening audio {str(path)[:200]}"
    try:
        _check_path(path, doing)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)[:200]
        raise InputError(
            f"{doing}: got {why}, expected a local audio file. Check the path (relative ones start "
            f"at {Path.cwd()}); download a URL first."
        ) from error


def _check_path(path: Path, doing: str) -> None:
    size = path.stat().st_size
    if path.is_dir():
        raise InputError(f"{doing}: got a folder, expected an audio file. Name a file in it.")
    if not path.is_file():
        raise InputError(
            f"{doing}: got a pipe or a device, expected a file. Open it, and pass what was opened: "
            "sys.stdin.buffer."
        )
    if size == 0:
        raise InputError(f"{doing}: got 0 bytes, expected a recording. Copy or export it again.")
    if size > _MOST_BYTES:
        raise InputError(
            f"{doing}: got {size / 2**30:.3g} GiB, expected at most {_MOST_BYTES // 2**30}. Cut "
            "the recording."
        )
    suffix, wav = path.suffix.lower().lstrip("."), path.stem + ".wav"
    if suffix in HEADERLESS_SUFFIXES:
        raise InputError(
            f"{doing}: got a {path.suffix} file, which has no header to tell its rate, coding and "
            f"channels, expected {READABLE}. Name them when you convert it, such as 16-bit PCM at "
            f"8 kHz: ffmpeg -f s16le -ar 8000 -ac 1 -i {path.name!r} {wav!r}"
        )
    if suffix in UNREADABLE_SUFFIXES:
        raise InputError(
            f"{doing}: got a {path.suffix} file, expected {READABLE}. Convert it to wav: "
            f"ffmpeg -i {path.name!r} {wav!r}"
        )


def _cause(error: Exception) -> str:
    """The words of libsndfile, without what it calls the file."""
    return re.sub("^(Error opening .*?: )?(Error : )?", "", str(error).rstrip(". "))


def _check_header(what: str, file: Any, max_seconds: int | float | None) -> None:
    """Refuse, before anything is decoded, what a header says of an open ``SoundFile``."""
    if not is_checked(file.format):
        raise InputError(
            f"decoding audio: {what} is a file of {file.format_info}, of which it cannot be told "
            f"whether it is whole; expected {READABLE}. Convert it to wav."
        )
    check_rate(file.samplerate, f"the rate of {what}")
    if max_seconds is not None and file.frames > round(max_seconds * file.samplerate):
        raise too_long(what, file.frames / file.samplerate, max_seconds)
    if (n_bytes := 4 * file.frames * file.channels) > _MOST_BYTES:
        raise InputError(
            f"decoding audio: {what} has {file.frames} samples in {file.channels} channels by its "
            f"header, which take {n_bytes / 2**30:.3g} GiB; expected at most "
            f"{_MOST_BYTES // 2**30}. Cut the recording; if it is not that long, its header is "
            "damaged: export it again."
        )
