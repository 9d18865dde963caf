"""Reading of recordings into what a front-end takes: mono float32 at the model's rate.

``read_audio`` says in ``Waveform.notes`` everything it did to a clip, because a resampled,
downmixed or shortened clip is no longer quite the clip that the user named. Decoding, downmix and
resampling are those of ``transformers.audio_utils.load_audio(backend="soundfile")`` (5.23), equal
bit for bit; repeated here because that function passes arrays through and reports nothing.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32

from .bundled import clip_file
from .errors import InputError


@runtime_checkable
class OpenFile(Protocol):
    """Whatever has ``read``: a file opened in binary mode, a buffer, a remote file."""

    def read(self) -> Any:
        """Its content."""


AudioArray = np.ndarray | torch.Tensor
AudioFile = str | Path | bytes | OpenFile
AudioSource = AudioFile | AudioArray | tuple[AudioArray, int] | Mapping[str, Any]
"""A file by its name, its bytes or open; samples; or what a column of ``datasets`` holds."""

SILENCE_PEAK = 1e-4
"""A clip whose every |sample| is below this (-80 dBFS) is called silent."""
LOUD_PEAK = 2.0
"""Floating-point samples above this are more likely unscaled PCM than a loud recording."""

READABLE_SUFFIXES = frozenset(
    "aif aifc aiff au avr caf flac ircam mp3 nist oga ogg opus paf pvf rf64 rifx sd2 sds sf snd "
    "sph svx voc w64 wav wave wve xi".split()
)
"""Names of what libsndfile decodes; that is tried with any file, whatever its name."""
UNREADABLE_SUFFIXES = frozenset(
    "3gp aac ac3 amr ape avi dsf flv m4a m4b m4v mka mkv mov mp4 mpg ogv ra ts webm wma wmv "
    "wv".split()
)
"""Containers that it has no decoder for; their error says what to do about it."""
READABLE = "wav, flac, ogg, opus, mp3, aiff or another format of libsndfile"
# Programs that write WAV to a pipe cannot know its length, and leave a huge one in the header.
_STREAMED_BYTES = 0x7FFF0000


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
        InputError: the clip is missing, empty, cannot be decoded, is cut short, holds NaN or
            infinite samples, is too long, or has a shape, dtype or rate that cannot be used.

    Warns:
        UserWarning: the clip is silent, or its samples are far above full scale.
    """
    _check_rate(sampling_rate, "the model's sampling rate")
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
        array, rate, notes = _unpack(source, sampling_rate)
        name = what = "array"
        channels = _channels_first(array, notes)
        _check_samples(channels, rate, what)
    samples = _resample(_downmix(channels, notes), rate, sampling_rate, notes)
    samples = _fit_length(samples, sampling_rate, max_seconds, truncate, what, notes)
    _warn_of_level(samples, what, notes)
    return Waveform(samples=samples, sampling_rate=sampling_rate, notes=tuple(notes), name=name)


def decode_file(
    source: AudioFile, *, max_seconds: int | float | None = None
) -> tuple[Float32[np.ndarray, "channel sample"], int, list[str]]:
    """A file's samples as they are, its rate, and notes on how it was read.

    Args:
        source: an audio file, by its name, its bytes, or open for reading in binary mode.
        max_seconds: refuse a longer file by its header, before it is decoded.

    Raises:
        InputError: there is no such file, or it holds no sound that can be decoded whole, or NaN
            or infinite samples.
    """
    import soundfile

    what = _named(source)
    if isinstance(source, str | Path):
        source = Path(source).expanduser()
        _check_file(source)
    else:
        source = io.BytesIO(_bytes_of(source))
    notes: list[str] = []
    try:
        with soundfile.SoundFile(source) as file:
            rate, promised, log = file.samplerate, file.frames, file.extra_info
            if max_seconds is not None and promised > round(max_seconds * rate):
                raise _too_long(what, promised / rate, max_seconds)
            channels = file.read(dtype="float32", always_2d=True).T
    except soundfile.SoundFileError as error:
        raise InputError(
            f"decoding audio: {what} is corrupt or not an audio file ({_cause(error, what)}), "
            f"expected {READABLE}. Play the file, or export it again."
        ) from error
    _check_whole(what, promised, channels.shape[1], log, notes)
    _check_samples(channels, rate, what)
    return channels, rate, notes


def _is_file(source: object) -> TypeGuard[AudioFile]:
    return isinstance(source, str | Path | bytes | OpenFile)


def _named(source: object) -> str:
    """What errors call a file, and what its clip is called after."""
    name = source if isinstance(source, str | Path) else getattr(source, "name", None)
    return str(Path(name).expanduser()) if isinstance(name, str | Path) else "bytes"


def _bytes_of(source: Any) -> bytes:
    """The whole content of bytes or of an open file, wherever it was read to before.

    Raises:
        InputError: it was opened as text, is closed, or is empty.
    """
    if not isinstance(source, bytes):
        try:
            if hasattr(source, "seek"):
                source.seek(0)
            source = source.read()
        except (OSError, ValueError) as error:
            raise InputError(
                f"reading audio from an open file: got {error}, expected one that can be read. "
                "Open it again, in binary mode."
            ) from error
    if not isinstance(source, bytes) or not source:
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
        return np.asarray(array) if isinstance(array, list) else array, value["sampling_rate"]
    if value.get("bytes") is not None:
        return value["bytes"]
    if value.get("array") is None and value.get("path") is not None:
        return value["path"]
    raise InputError(
        f"reading audio: got a mapping with {', '.join(map(repr, value)) or 'nothing in it'}, "
        "expected 'array' with 'sampling_rate', or 'bytes', or 'path', as the audio column of a "
        "dataset has them."
    )


def _check_file(path: Path) -> None:
    doing = f"opening audio {str(path)[:200]}"
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)[:200]
        raise InputError(
            f"{doing}: got {why}, expected a local audio file. Check the path (relative ones start "
            f"at {Path.cwd()}); download a URL first."
        ) from error
    if path.is_dir():
        raise InputError(f"{doing}: got a folder, expected an audio file. Name a file in it.")
    if size == 0:
        raise InputError(f"{doing}: got 0 bytes, expected a recording. Copy or export it again.")
    if path.suffix.lower().lstrip(".") in UNREADABLE_SUFFIXES:
        raise InputError(
            f"{doing}: got a {path.suffix} file, expected {READABLE}. Convert it to wav: "
            f"ffmpeg -i {path.name!r} {path.stem + '.wav'!r}"
        )


def _cause(error: Exception, what: str) -> str:
    """The words of libsndfile, without the path that our message already has."""
    text = str(error).rstrip(". ")
    return re.sub("^Error opening .*?: ", "", text.replace(what, "")).removeprefix("Error : ")


def _check_whole(what: str, promised: int, read: int, log: str, notes: list[str]) -> None:
    """A file cut short decodes without an error, but is not the clip that the user recorded."""
    cut = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if cut and int(cut[2]) < int(cut[1]) < _STREAMED_BYTES:
        raise InputError(
            f"decoding audio: {what} is corrupt: it ends after {cut[2]} bytes of samples, expected "
            f"the {cut[1]} of its header. Copy or download it again."
        )
    if read < promised:
        # The header of a compressed stream may be an estimate, so this is no proof of damage.
        _warn(f"the header promises {promised} samples, {read} could be decoded", what, notes)


def _unpack(source: object, sampling_rate: int) -> tuple[np.ndarray, int, list[str]]:
    """A float32 array of an in-memory clip, its rate, and what was done to get there."""
    notes: list[str] = []
    if isinstance(source, tuple) and len(source) == 2:
        array, rate = source
        _check_rate(rate, "the rate beside the array")
    else:
        array, rate = source, sampling_rate
        notes.append(f"a bare array: taken to be at {sampling_rate} Hz")
    if isinstance(array, torch.Tensor):
        tensor = array.detach().cpu()
        array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"reading audio: got {type(source).__name__}, expected a path, the bytes of a file or "
            "an open one, a numpy array, a torch tensor, (array, sampling rate), or a mapping of "
            "array and sampling_rate. Pass a list of clips one by one."
        )
    if array.dtype in (np.int16, np.int32):
        notes.append(f"{array.dtype} samples scaled to [-1, 1)")
        # Division by a power of two: the same float32 that libsndfile makes of the same PCM.
        array = array / float(-np.iinfo(array.dtype).min)
    elif not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"reading audio: got an array of {array.dtype}, expected floating point in [-1, 1], "
            "int16 or int32. Convert the samples first."
        )
    with np.errstate(over="ignore"):  # an overflow is infinite, and reported as such
        return array.astype(np.float32), int(rate), notes


def _channels_first(array: np.ndarray, notes: list[str]) -> Float32[np.ndarray, "channel sample"]:
    if array.ndim == 1:
        return array[None]
    if array.ndim != 2 or (array.shape[0] == array.shape[1] and array.size):
        raise InputError(
            f"reading audio: got an array of shape {array.shape}, expected (samples,), (channels, "
            "samples) or (samples, channels) with fewer channels than samples. Reshape it, or "
            "downmix it yourself."
        )
    if array.shape[0] < array.shape[1]:
        return array
    notes.append(f"shape {array.shape} read as (samples, channels)")
    return array.T


def _check_samples(channels: Float32[np.ndarray, "channel sample"], rate: int, what: str) -> None:
    if channels.size == 0:
        raise InputError(
            f"reading audio: {what} has no samples, expected a recording. Check how it was cut."
        )
    bad = ~np.isfinite(channels).all(axis=0)
    if bad.any():
        first = int(bad.argmax())
        raise InputError(
            f"reading audio: got NaN or infinite values in {int(bad.sum())} of {bad.size} samples "
            f"of {what}, the first at sample {first} ({first / rate:.3f} s); expected finite "
            "samples. Export the recording again."
        )


def _downmix(
    channels: Float32[np.ndarray, "channel sample"], notes: list[str]
) -> Float32[np.ndarray, " sample"]:
    if len(channels) == 1:
        return channels[0]
    notes.append(f"{len(channels)} channels downmixed by their mean")
    return channels.mean(axis=0)


def _resample(
    samples: Float32[np.ndarray, " sample"], rate: int, target: int, notes: list[str]
) -> Float32[np.ndarray, " resampled"]:
    if rate != target:
        import soxr

        notes.append(f"resampled from {rate} Hz to {target} Hz (soxr HQ)")
        length = math.ceil(len(samples) * target / rate)
        samples = soxr.resample(samples, rate, target, quality="soxr_hq")
        samples = np.pad(samples, (0, max(0, length - len(samples))))[:length]
    return np.ascontiguousarray(samples, dtype=np.float32)


def _fit_length(
    samples: Float32[np.ndarray, " sample"],
    rate: int,
    max_seconds: int | float | None,
    truncate: bool,
    what: str,
    notes: list[str],
) -> Float32[np.ndarray, " kept"]:
    if max_seconds is None or len(samples) <= (limit := round(max_seconds * rate)):
        return samples
    if not truncate:
        raise _too_long(what, len(samples) / rate, max_seconds)
    notes.append(f"truncated from {len(samples) / rate:.3f} s to {max_seconds:g} s")
    return samples[:limit].copy()


def _too_long(what: str, seconds: float, limit: int | float) -> InputError:
    return InputError(
        f"reading audio: {what} lasts {seconds:.3f} s, expected at most {limit:g} s. "
        "Cut the recording, or pass truncate=True (-s truncate=true) to use its beginning."
    )


def _warn_of_level(samples: Float32[np.ndarray, " sample"], what: str, notes: list[str]) -> None:
    peak = float(np.abs(samples).max())
    if peak < SILENCE_PEAK:
        _warn(f"silent: its peak is {peak:.2g} of full scale", what, notes)
    elif peak > LOUD_PEAK:
        _warn(f"its peak is {peak:.4g} times full scale: unscaled PCM?", what, notes)


def _warn(note: str, what: str, notes: list[str]) -> None:
    notes.append(note)
    # Past read_audio, to the line that asked for the clip.
    warnings.warn(f"{what}: {note}", UserWarning, stacklevel=4)


def _check_rate(rate: object, which: str) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or rate <= 0:
        raise InputError(
            f"reading audio: got {rate!r} for {which}, expected a positive whole number of Hz. "
            "16000 is the usual one."
        )
