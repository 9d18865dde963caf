"""Reading clips: the samples of transformers' own loader, what was done, clear errors."""

import http.client
import io
import itertools
import os
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers.audio_utils import load_audio

from hooked_alm.audio import (
    READABLE_SUFFIXES,
    UNREADABLE_SUFFIXES,
    decode_file,
    read_audio,
)
from hooked_alm.errors import InputError

RATE = 16000


def noise(n: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    samples = 0.1 * np.random.default_rng(seed).standard_normal((n, channels))
    return samples.astype(np.float32).squeeze()


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options: str) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.mark.parametrize(
    ("suffix", "channels"),
    [*itertools.product(["wav", "flac", "ogg"], [1, 2, 5]), ("mp3", 1), ("mp3", 2)],
)
@pytest.mark.parametrize("rate", [16000, 44100, 8000])
def test_equals_transformers_loader(tmp_path: Path, suffix: str, channels: int, rate: int) -> None:
    path = write(tmp_path / f"clip.{suffix}", noise(7919, channels), rate)
    got = read_audio(path, sampling_rate=RATE, max_seconds=None)
    expected = load_audio(str(path), sampling_rate=RATE, backend="soundfile")
    assert np.array_equal(got.samples, expected)
    assert got.samples.dtype == np.float32
    assert got.samples.flags.c_contiguous
    assert got.seconds == len(expected) / RATE
    assert got.name == path.name
    notes = []
    if channels > 1:
        notes.append(f"{channels} channels downmixed by their mean")
    if rate != RATE:
        notes.append(f"resampled from {rate} Hz to 16000 Hz (soxr HQ)")
    assert got.notes == tuple(notes)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_32", "FLOAT", "DOUBLE"])
def test_array_equals_file(tmp_path: Path, subtype: str) -> None:
    path = write(tmp_path / "clip.wav", noise(4001, 2), 22050, subtype=subtype)
    dtype = {"PCM_16": "int16", "PCM_32": "int32", "FLOAT": "float32", "DOUBLE": "float64"}[subtype]
    array, rate = soundfile.read(path, dtype=dtype)
    from_file = read_audio(path, sampling_rate=RATE, max_seconds=None)
    for layout in (array, array.T, torch.from_numpy(array)):
        got = read_audio((layout, rate), sampling_rate=RATE, max_seconds=None)
        assert np.array_equal(got.samples, from_file.samples)
        assert (f"{dtype} samples scaled to [-1, 1)" in got.notes) == dtype.startswith("int")
        assert got.notes[-2:] == from_file.notes
        assert got.name == "array"


def test_bare_array_is_at_the_models_rate_and_is_copied() -> None:
    array = noise(100)
    got = read_audio(array, sampling_rate=24000, max_seconds=None)
    assert np.array_equal(got.samples, array)
    assert not np.shares_memory(got.samples, array)
    assert got.notes == ("a bare array: taken to be at 24000 Hz",)
    assert got.sampling_rate == 24000
    assert got.seconds == 100 / 24000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_other_precisions(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(noise(100)).to(dtype).requires_grad_()
    got = read_audio(tensor, sampling_rate=RATE, max_seconds=None)
    assert np.array_equal(got.samples, tensor.detach().float().numpy())


def test_full_scale_integers() -> None:
    array = np.array([-(2**15), 0, 2**14, 2**15 - 1], np.int16)
    got = read_audio(array, sampling_rate=RATE, max_seconds=None)
    assert got.samples.tolist() == [-1.0, 0.0, 0.5, 1 - 2**-15]


def test_channel_axis_is_the_smaller_side() -> None:
    array = np.stack([noise(50), -noise(50)])
    for layout in (array, array.T):
        got = read_audio(layout + np.float32(0.5), sampling_rate=RATE, max_seconds=None)
        np.testing.assert_array_equal(got.samples, np.full(50, 0.5, np.float32))
        assert "2 channels downmixed by their mean" in got.notes
    assert "shape (50, 2) read as (samples, channels)" in got.notes
    with pytest.raises(InputError, match=r"shape \(7, 7\), expected .* Reshape it"):
        read_audio(np.ones((7, 7), np.float32), sampling_rate=RATE, max_seconds=None)
    with pytest.raises(InputError, match=r"shape \(2, 3, 4\)"):
        read_audio(np.ones((2, 3, 4), np.float32), sampling_rate=RATE, max_seconds=None)


def test_too_long_raises_and_is_cut_only_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.wav", noise(33075), 22050)
    array = load_audio(str(path), sampling_rate=RATE, backend="soundfile")
    for source in (path, array):
        with pytest.raises(InputError, match=r"lasts 1\.500 s, expected at most 1\.2 s\. .*trunc"):
            read_audio(source, sampling_rate=RATE, max_seconds=1.2)
        got = read_audio(source, sampling_rate=RATE, max_seconds=1.2, truncate=True)
        assert np.array_equal(got.samples, array[:19200])
        assert got.notes[-1] == "truncated from 1.500 s to 1.2 s"
        whole = read_audio(source, sampling_rate=RATE, max_seconds=1.5)
        assert np.array_equal(whole.samples, array)
        assert not any("truncated" in note for note in whole.notes)


def test_too_long_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "clip.wav", noise(32000))
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(InputError, match=r"lasts 2\.000 s"):
        read_audio(path, sampling_rate=RATE, max_seconds=1)


def test_missing_folder_empty(tmp_path: Path) -> None:
    cases = {
        tmp_path / "none.wav": "none.wav: got no such file, expected a local audio file",
        tmp_path: "got a folder",
        Path("https://example.org/a.wav"): "download a URL first",
        Path("x" * 5000): "too long",
        Path("a\0b"): "null",
    }
    (tmp_path / "empty.wav").touch()
    cases[tmp_path / "empty.wav"] = "got 0 bytes, expected a recording"
    cases[write(tmp_path / "zero.wav", np.zeros(0, np.float32))] = "has no samples"
    for path, message in cases.items():
        for source in (path, str(path)):
            with pytest.raises(InputError, match=message):
                read_audio(source, sampling_rate=RATE, max_seconds=None)


@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0), (0, 0)])
def test_array_without_samples(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="array has no samples"):
        read_audio(np.zeros(shape, np.float32), sampling_rate=RATE, max_seconds=None)


@pytest.mark.parametrize(
    "content", [b"this is text, not sound" * 9, b"RIFF\0\0\0\0WAVE", bytes(range(256)) * 40]
)
def test_corrupt_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    message = r"broken\.wav is corrupt or not an audio file \((Format not|Error in WAV)[^/]*\), exp"
    with pytest.raises(InputError, match=message):
        read_audio(path, sampling_rate=RATE, max_seconds=None)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_file_cut_short(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"clip.{suffix}", noise(48000))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="is corrupt"):
        read_audio(path, sampling_rate=RATE, max_seconds=None)


def test_mp3_cut_short_is_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp3", noise(48000))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(
        UserWarning, match=r"clip\.mp3: the header promises 48000 samples, \d+ could"
    ):
        got = read_audio(path, sampling_rate=RATE, max_seconds=None)
    assert got.notes[0].startswith("the header promises 48000")


def test_wav_written_to_a_pipe_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.wav", noise(4000), subtype="PCM_16")
    expected = read_audio(path, sampling_rate=RATE, max_seconds=None)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(content)
    got = read_audio(path, sampling_rate=RATE, max_seconds=None)
    assert np.array_equal(got.samples, expected.samples)
    assert got.notes == ()


@pytest.mark.parametrize("suffix", ["m4a", "mp4", "webm", "M4A"])
def test_container_without_a_decoder(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    path.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    with pytest.raises(InputError, match=r"Convert it to wav: ffmpeg -i 'clip\..*' 'clip\.wav'"):
        read_audio(path, sampling_rate=RATE, max_seconds=None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(tmp_path: Path, value: float) -> None:
    array = noise(16000, 2)
    array[8000, 1] = array[9000, 0] = array[9000, 1] = value
    path = write(tmp_path / "clip.wav", array, subtype="FLOAT")
    message = r"in 2 of 16000 samples of .*, the first at sample 8000 \(0\.500 s\)"
    with pytest.raises(InputError, match=message):
        read_audio(path, sampling_rate=RATE, max_seconds=None)
    with pytest.raises(InputError, match=message):
        read_audio(array, sampling_rate=RATE, max_seconds=None)


def test_overflow_to_float32_is_not_finite() -> None:
    with pytest.raises(InputError, match="in 1 of 2 samples"):
        read_audio(np.array([0.1, 1e300]), sampling_rate=RATE, max_seconds=None)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, bool, complex, object])
def test_dtype_that_is_no_audio(dtype: type) -> None:
    with pytest.raises(InputError, match=f"array of {np.dtype(dtype)}, expected floating point"):
        read_audio(np.ones(9, dtype), sampling_rate=RATE, max_seconds=None)


def test_rates_and_limits() -> None:
    for rate in (0, -16000):
        message = f"got {rate} for the rate beside the array, expected a positive whole number"
        with pytest.raises(InputError, match=message):
            read_audio((noise(9), rate), sampling_rate=RATE, max_seconds=None)
        with pytest.raises(InputError, match=f"got {rate} for the model's sampling rate"):
            read_audio(noise(9), sampling_rate=rate, max_seconds=None)
    for limit in (0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"got max_seconds=.*, expected a positive number"):
            read_audio(noise(9), sampling_rate=RATE, max_seconds=limit)


def test_silence_is_a_warning_and_a_note() -> None:
    quiet = np.full(100, 9.9e-5, np.float32)
    with pytest.warns(UserWarning, match="array: silent: its peak is 9.9e-05"):
        got = read_audio(-quiet, sampling_rate=RATE, max_seconds=None)
    assert got.notes[-1] == "silent: its peak is 9.9e-05 of full scale"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_audio(quiet * 1.1, sampling_rate=RATE, max_seconds=None)


def test_unscaled_pcm_is_a_warning_and_a_note() -> None:
    with pytest.warns(UserWarning, match="3277 times full scale: unscaled PCM"):
        got = read_audio(np.array([0.0, -3277.0]), sampling_rate=RATE, max_seconds=None)
    assert "unscaled PCM" in got.notes[-1]


def test_decode_file_keeps_rate_and_channels(tmp_path: Path) -> None:
    array = noise(321, 3)
    path = write(tmp_path / "clip.wav", array, 44100, subtype="FLOAT")
    channels, rate, notes = decode_file(path)
    assert np.array_equal(channels, array.T)
    assert (rate, notes) == (44100, [])


def test_import_is_light() -> None:
    heavy = {"soundfile", "soxr", "transformers"}
    code = f"import sys, hooked_alm.audio; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"set\(\)\n", done.stdout)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_file_by_its_bytes_open_or_as_a_dataset_has_it(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"clip.{suffix}", noise(4001, 2), 22050)
    expected = read_audio(path, sampling_rate=RATE, max_seconds=None)
    data = path.read_bytes()
    with path.open("rb") as file:
        file.read(7)  # where it was read to before does not matter
        sources = [data, file, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
        found = [read_audio(one, sampling_rate=RATE, max_seconds=None) for one in sources]
    for one in found:
        assert np.array_equal(one.samples, expected.samples)
        assert one.notes == expected.notes
    assert [one.name for one in found] == ["bytes", path.name, "bytes", path.name]
    array, rate = soundfile.read(path, dtype="float32")
    for samples in (array, array.tolist()):
        got = read_audio(
            {"array": samples, "sampling_rate": rate, "path": "x"},
            sampling_rate=RATE,
            max_seconds=None,
        )
        assert np.allclose(got.samples, expected.samples, atol=1e-7)  # lists pass through fp64
        assert got.name == "array"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "reading audio from bytes: got 0 bytes"),
        (b"no sound" * 99, r"decoding audio: bytes is corrupt or .* \(Format not recognised\)"),
        (io.StringIO("text"), 'got str, expected those of a sound file. Open it .*"rb"'),
        ({"array": noise(9)}, "got a mapping with 'array', expected 'array' with 'sampling_rate'"),
        ({}, "got a mapping with nothing in it"),
        ({"array": noise(9), "sampling_rate": "16k"}, "got '16k' for the rate beside the array"),
    ],
)
def test_bytes_and_mappings_that_are_no_clip(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_audio(source, sampling_rate=RATE, max_seconds=None)  # type: ignore[arg-type]


def test_a_closed_file(tmp_path: Path) -> None:
    file = write(tmp_path / "clip.wav", noise(99)).open("rb")
    file.close()
    with pytest.raises(InputError, match=r"from an open file: got .*closed file.* Open it again"):
        read_audio(file, sampling_rate=RATE, max_seconds=None)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "clip.wav", noise(99))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_audio("~/clip.wav", sampling_rate=RATE, max_seconds=None).name == "clip.wav"
    with pytest.raises(InputError, match=rf"opening audio {tmp_path}/none\.wav: got no such file"):
        read_audio("~/none.wav", sampling_rate=RATE, max_seconds=None)


def test_every_name_of_a_format_of_libsndfile_is_known() -> None:
    """The lists of names, held against the formats of the library: none is missing."""
    special = {"SVX", "MAT4", "MAT5", "MPC2K", "HTK", "RAW", "WAVEX", "NIST", "IRCAM"}  # by content
    names = {name.lower() for name in soundfile.available_formats()} - {s.lower() for s in special}
    assert names <= READABLE_SUFFIXES | UNREADABLE_SUFFIXES
    assert not READABLE_SUFFIXES & UNREADABLE_SUFFIXES


@pytest.mark.parametrize("suffix", ["raw", "pcm", "gsm", "vox"])
def test_a_file_without_a_header(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"call.{suffix}"
    path.write_bytes((noise(4000) * 32767).astype("<i2").tobytes())
    message = rf"got a \.{suffix} file, which has no header .*ffmpeg -f s16le .* 'call\.wav'"
    with pytest.raises(InputError, match=message):
        read_audio(path, sampling_rate=RATE, max_seconds=None)


@pytest.mark.parametrize("suffix", ["wav", "raw", "xyz"])
def test_a_recording_of_a_telephone(tmp_path: Path, suffix: str) -> None:
    """GSM 6.10 cannot be sought in; by its bytes it is read under any name."""
    path = write(tmp_path / "call.wav", noise(8000), 8000, subtype="GSM610", format="WAV")
    with path.open("rb") as file:
        expected = soundfile.SoundFile(file).read(10**4, dtype="float32")
    path = path.rename(tmp_path / f"call.{suffix}")
    source = path if suffix != "raw" else path.read_bytes()
    got, *rest = decode_file(source)
    assert np.array_equal(got, expected[None])
    assert rest == [8000, []]


class Pipe(io.RawIOBase):
    """What cannot be sought in: a pipe, the body of an answer."""

    def __init__(self, data: bytes, error: Exception | None = None) -> None:
        self.rest, self.error = io.BytesIO(data), error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.error is not None:
            raise self.error
        return self.rest.readinto(memoryview(buffer)[:1000])


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_what_cannot_be_sought_in(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"clip.{suffix}", noise(4001))
    expected, *_ = decode_file(path)
    data = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "clips.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "clip")
    with (
        zipfile.ZipFile(tmp_path / "clips.zip") as archive,
        archive.open("clip") as member,
        subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as process,
    ):
        for source in (Pipe(data), io.BufferedReader(Pipe(data)), member, process.stdout):
            assert np.array_equal(decode_file(source)[0], expected)
    with pytest.raises(InputError, match="corrupt"):
        decode_file(Pipe(data[: len(data) // 9]))


def test_a_source_that_fails() -> None:
    for error in (ConnectionResetError("gone"), http.client.IncompleteRead(b""), EOFError("ended")):
        message = f"from an open file: got {re.escape(str(error))}, expected one that can be read"
        with pytest.raises(InputError, match=message):
            decode_file(Pipe(b"", error))


def test_a_pipe_by_its_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.wav")
    with pytest.raises(InputError, match=r"got a pipe or a device, .* sys\.stdin\.buffer"):
        decode_file(tmp_path / "clip.wav")
    with pytest.raises(InputError, match="got a pipe or a device"):
        decode_file("/dev/null")


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "clip.wav").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(InputError, match="got 931 GiB, expected at most 8"):
        decode_file(tmp_path / "clip.wav")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.array([0.1, 1e30], np.float32), "absurdly large values in 1 of 2 samples"),
        (np.array(["a", "b"]), "got an array of <U1"),
        (np.array(0.5), r"got an array of shape \(\)"),
        (np.zeros((80, 3000), np.float32), "has 80 channels, expected at most 64"),
        (np.ma.masked_less(noise(9), 0), "samples that are no array .some are masked"),
        (torch.ones(9, device="meta"), "samples that are no array"),
        (torch.ones(9, dtype=torch.complex64), "got an array of complex64"),
        (torch.ones(9).to_sparse(), "samples that are no array"),
        ({"array": [[0.1], [0.2, 0.3]], "sampling_rate": RATE}, "samples that are no array"),
        ({"array": [None, 0.1], "sampling_rate": RATE}, "got an array of object"),
        ((noise(9), 999), "got 999 for the rate .* from 1000 to 1000000"),
        ((noise(9), 4 * 10**9), "got 4000000000 for the rate"),
        ((noise(9), True), "got True for the rate"),
        ({"array": noise(9), "sampling_rate": 16000.0}, r"got 16000\.0 for the rate"),
    ],
)
def test_samples_that_cannot_be_used(samples: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_audio(samples, sampling_rate=RATE, max_seconds=None)  # type: ignore[arg-type]
