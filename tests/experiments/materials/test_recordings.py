"""A user's folder of recordings: names, manifest, rename step, and every fault by its place."""

import csv
import hashlib
import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from hooked_alm.errors import InputError
from hooked_alm.experiments.cli import app
from hooked_alm.experiments.materials.acoustics import describe_clip
from hooked_alm.experiments.materials.ob1 import ob1_clip_names
from hooked_alm.experiments.materials.recordings import (
    load_recordings,
    match_loudness,
    rename_recordings,
    write_manifest,
)

RATE = 16000
HEADER = "path,language,emotion,intensity"


def tone(path: Path, hz: float, *, channels: int = 1, seconds: float = 0.2) -> Path:
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(int(RATE * seconds)) / RATE)
    soundfile.write(path, np.tile(wave[:, None], channels), RATE)
    return path


@pytest.fixture
def ob1(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for i, name in enumerate(ob1_clip_names()):
        tone(folder / f"{name.stem}.wav", 100 + 5 * i, seconds=0.2 + i / 1000)
    return folder


def write_csv(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def test_full_set_by_name(ob1: Path) -> None:
    (ob1 / "notes.txt").write_text("not a clip")
    (ob1 / "._zh_sad_normal.wav").write_text("what macOS leaves behind")
    with pytest.warns(UserWarning, match=r"clips: not read, since .* sound files: notes\.txt$"):
        recordings = load_recordings(ob1, declared_n=18)
    (ob1 / "notes.txt").unlink()
    assert [r.name for r in recordings] == [name.stem for name in ob1_clip_names()]
    third = recordings[2]
    assert (third.language, third.label, third.intensity) == ("zh", "cheerful", "strong")
    assert (third.seconds, third.sampling_rate) == (0.202, RATE)
    assert third.sha256 == hashlib.sha256(third.path.read_bytes()).hexdigest()
    assert recordings == load_recordings(str(ob1))


def test_any_subset_of_the_eighteen(ob1: Path) -> None:
    for path in sorted(ob1.iterdir())[3:]:
        path.unlink()
    assert len(load_recordings(ob1)) == 3
    with pytest.raises(InputError, match="got 3 recordings, expected the 18 declared"):
        load_recordings(ob1, declared_n=18)


def test_twenty_only_if_declared(ob1: Path) -> None:
    for i, language in enumerate(("zh", "en")):
        tone(ob1 / f"{language}_neutral_strong.wav", 300 + i)
    message = r"got 20 rec.* strong neutral \(en_.*, zh_.*\), expected at most the 18 .*n_clips=20"
    with pytest.raises(InputError, match=message):
        load_recordings(ob1)
    assert len(load_recordings(ob1, declared_n=20)) == 20
    with pytest.raises(InputError, match="got 20 recordings, expected the 18 declared"):
        load_recordings(ob1, declared_n=18)


def test_folder_faults(tmp_path: Path, ob1: Path) -> None:
    with pytest.raises(InputError, match="expected a folder or a table"):
        load_recordings(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="got no audio files, expected clips named like"):
        load_recordings(tmp_path / "empty")
    tone(ob1 / "happy.wav", 300)
    tone(ob1 / "zh_happy_strong.wav", 301)
    with pytest.raises(InputError, match=r"2 problems\n  happy\.wav: .*\n  zh_happy_strong\.wav: "):
        load_recordings(ob1)


def test_unreadable_clips_are_all_named(ob1: Path) -> None:
    (ob1 / "zh_sad_strong.wav").write_bytes(b"")
    (ob1 / "en_angry_normal.wav").write_bytes(b"no sound" * 99)
    (ob1 / "en_angry_strong.wav").rename(ob1 / "en_angry_strong.m4a")
    with pytest.raises(InputError) as caught:
        load_recordings(ob1)
    message = str(caught.value)
    assert "3 problems" in message
    for fault in (
        r"zh_sad_strong\.wav: opening .* got 0 bytes",
        r"en_angry_normal\.wav: decoding .* is corrupt",
        r"en_angry_strong\.m4a: .* Convert it to wav",
    ):
        assert re.search(fault, message)


def test_duplicates(ob1: Path) -> None:
    twin = tone(ob1 / "zh_sad_normal.flac", 400)
    with pytest.raises(
        InputError,
        match=r"zh_sad_normal\.wav: the same file name as zh_sad_normal\.flac: .*rename",
    ):
        load_recordings(ob1)
    twin.unlink()
    (ob1 / "zh_sad_normal.wav").write_bytes((ob1 / "zh_angry_normal.wav").read_bytes())
    with pytest.raises(
        InputError,
        match=r"zh_sad_normal\.wav: the same recording as zh_angry_normal\.wav: leave",
    ):
        load_recordings(ob1)


def test_manifest_written_and_read_back(ob1: Path) -> None:
    by_name = load_recordings(ob1)
    path = write_manifest(ob1, by_name)
    assert path == ob1 / "manifest.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{name.stem}.wav" for name in ob1_clip_names()]
    samples, rate = soundfile.read(ob1 / rows[4]["path"], dtype="float32")
    expected = describe_clip(samples, rate)
    assert list(rows[4]) == [
        *("path", "language", "emotion", "intensity", "duration_s", "sample_rate", "channels"),
        *("codec", "rms_dbfs", "f0_median_hz", "f0_iqr_hz", "voiced_fraction", "sha256"),
    ]
    assert (rows[4]["channels"], rows[4]["codec"]) == ("1", "WAV/PCM_16")
    assert rows[4]["duration_s"] == "0.2040"
    assert rows[4]["sample_rate"] == "16000"
    assert float(rows[4]["rms_dbfs"]) == pytest.approx(expected.rms_dbfs, abs=1e-4)
    assert float(rows[4]["f0_median_hz"]) == pytest.approx(120, abs=1)
    listed = load_recordings(ob1, declared_n=18)
    assert [replace(one, where="") for one in listed] == [replace(r, where="") for r in by_name]
    before = path.read_bytes()
    assert write_manifest(ob1, listed).read_bytes() == before
    assert [p.name for p in ob1.glob("manifest*")] == ["manifest.csv"]


def test_manifest_of_free_names_keeps_its_columns(tmp_path: Path) -> None:
    (tmp_path / "takes").mkdir()
    tone(tmp_path / "takes" / "a 1.wav", 120, channels=2)
    tone(tmp_path / "b.flac", 130)
    write_csv(
        tmp_path / "manifest.csv",
        "speaker, emotion ,path,language,intensity,duration_s",
        "anna,sad,takes/a 1.wav,en,strong,99",
        "bert, sad,b.flac,en,strong,",
        encoding="utf-8-sig",
    )
    first, second = load_recordings(tmp_path)
    assert (first.name, first.label, first.cells["speaker"]) == ("a-1", "sad", "anna")
    assert "duration_s" not in first.cells
    assert (first.seconds, second.label) == (0.2, "sad")
    write_manifest(tmp_path, [first, second])
    assert load_recordings(tmp_path) == [first, second]
    assert "takes/a 1.wav,anna,sad,en,strong,0.2000" in (tmp_path / "manifest.csv").read_text()


def test_unvoiced_clip_has_empty_pitch_cells(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "en_sad_strong.wav", np.full(4000, 0.25), RATE)
    row = write_manifest(tmp_path, load_recordings(tmp_path)).read_text().splitlines()[1]
    start = "en_sad_strong.wav,en,sad,strong,0.2500,16000,1,WAV/PCM_16,-12.0412,,,0.0000,"
    assert row.startswith(start)


def test_manifest_faults_name_line_and_column(tmp_path: Path) -> None:
    tone(tmp_path / "a.wav", 100)
    manifest = write_csv(
        tmp_path / "manifest.csv",
        HEADER,
        "a.wav,en,sad,strong",
        "a.wav,fr,,strong",
        ",en,angry,normal",
        "a.wav,en,angry",
        "a.wav,en,angry,normal,more",
        "no.wav,en,angry,normal",
    )
    with pytest.raises(InputError) as caught:
        load_recordings(tmp_path)
    message = str(caught.value)
    assert f"reading recordings from {manifest}: 5 problems" in message
    for fault in (
        "line 3: emotion: missing, expected the label",
        "line 4: path: missing",
        "line 5: got 3 cells, expected one for each of the 4 columns",
        "line 6: got 5 cells",
        "line 7: path: opening audio",
    ):
        assert f"  {fault}" in message


def test_manifest_files_are_checked(tmp_path: Path) -> None:
    good = tone(tmp_path / "a.wav", 100)
    tone(tmp_path / "b.wav", 110)
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    write_csv(
        tmp_path / "manifest.csv",
        HEADER + ",sha256",
        f"a.wav,en,sad,strong,{digest.upper()}",
        f"b.wav,en,sad,normal,{digest}",
        "c.wav,en,angry,strong,",
    )
    with pytest.raises(InputError) as caught:
        load_recordings(tmp_path)
    message = str(caught.value)
    assert "2 problems" in message
    assert f"line 3: sha256: got {digest}, expected " in message
    assert "line 4: path: opening audio" in message


def test_manifest_duplicates(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for hz, name in enumerate(("a", "b", "more/b")):
        tone(tmp_path / f"{name}.wav", 100 + 10 * hz)
    lines = ["a.wav,en,sad,strong", "more/../a.wav,en,sad,normal", "b.wav,en,sad,strong"]
    write_csv(tmp_path / "manifest.csv", HEADER, *lines)
    with pytest.raises(InputError, match=r"line 3: the same recording as .* line 2: leave"):
        load_recordings(tmp_path)
    # Two clips of one condition are two clips; names of folders tell those of one name apart.
    lines[1] = "more/b.wav,en,sad,strong"
    write_csv(tmp_path / "manifest.csv", HEADER, *lines)
    assert [one.name for one in load_recordings(tmp_path)] == ["a", "more-b", f"{tmp_path.name}-b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"language,emotion\nen,sad\n", r"without \['path'\]"),
        (b"path,path,emotion\n1,2,sad\n", "each of .* once"),
        (b"path,language\na.wav,en\n", "line 2: emotion: missing, expected the label"),
        (HEADER.encode() + b"\n", "got 0 lines"),
        (b"", "got 0 lines"),
        (HEADER.encode() + b"\n\xff\xfe.wav,en,sad\n", r"line 2: .* not UTF-8 \(byte 0xff\)"),
        (b"path;emotion\na.wav;sad\n", "columns separated by semicolons, expected commas"),
        (b"path\temotion\na.wav\tsad\n", "columns separated by tabs, expected commas"),
    ],
)
def test_manifest_that_is_no_table(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_recordings(tmp_path)


def test_open_labels_of_any_column_and_jsonl(tmp_path: Path) -> None:
    for hz, name in enumerate(("one", "two")):
        tone(tmp_path / f"{name}.wav", 100 + 10 * hz)
    table = tmp_path / "clips.jsonl"
    lines = [
        {"path": "one.wav", "mood": "fröhlich", "speaker": 7, "target": "müde | traurig"},
        {"path": "two.wav", "mood": unicodedata.normalize("NFD", "fröhlich"), "speaker": None},
    ]
    table.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    first, second = load_recordings(table, label_column="mood")
    assert first.label == second.label == "fröhlich"
    assert first.targets == ("müde", "traurig")
    assert (first.cells["speaker"], second.cells.get("speaker")) == ("7", None)
    assert (first.language, first.intensity, second.targets) == ("", "", ())


def test_a_half_character_is_refused(tmp_path: Path) -> None:
    tone(tmp_path / "one.wav", 100)
    table = tmp_path / "clips.jsonl"
    table.write_text('{"path": "one.wav", "emotion": "\\ud83d"}')
    with pytest.raises(InputError, match=r"line 1: .*\\ud83d is half of a character: write the"):
        load_recordings(table)


def test_names_are_found_however_the_system_spells_them(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "süß.wav") for form in ("NFC", "NFD"))
    assert composed != apart
    for on_disk, in_table in ((composed, apart), (apart, composed)):
        folder = tmp_path / str(len(on_disk))
        folder.mkdir()
        tone(folder / on_disk, 100)
        write_csv(folder / "manifest.csv", "path,emotion", f"{in_table},sad")
        (found,) = load_recordings(folder)
        assert found.name == unicodedata.normalize("NFC", "süß")


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tone(tmp_path / "one.wav", 100)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_csv(tmp_path / "manifest.csv", "path,emotion", "~/one.wav,sad")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "manifest.csv").rename(tmp_path / "elsewhere" / "clips.csv")
    assert [one.name for one in load_recordings("~/elsewhere/clips.csv")] == ["one"]


def test_every_format_that_can_be_read_is_found(tmp_path: Path) -> None:
    formats = {
        "en_sad_strong.wav": {},
        "en_sad_normal.oga": {"format": "OGG", "subtype": "VORBIS"},
        "en_angry_strong.rf64": {"format": "RF64"},
        "en_angry_normal.w64": {"format": "W64"},
        "en_neutral_normal.au": {"format": "AU", "subtype": "ULAW"},
        "en_cheerful_normal.caf": {"format": "CAF"},
        "en_cheerful_strong.sph": {"format": "NIST"},
        "zh_sad_normal.AIFC": {"format": "AIFF"},
        "zh_sad_strong.voc": {"format": "VOC"},
    }
    for hz, (name, how) in enumerate(formats.items()):
        wave = 0.3 * np.sin(2 * np.pi * (100 + 10 * hz) * np.arange(3200) / RATE)
        soundfile.write(tmp_path / name, wave, RATE, **how)
    found = load_recordings(tmp_path)
    assert {one.path.name for one in found} == {*formats}
    assert {one.codec for one in found} >= {"NIST/PCM_16", "AU/ULAW", "OGG/VORBIS"}


def test_rename(tmp_path: Path) -> None:
    tone(tmp_path / "take 1.WAV", 100)
    tone(tmp_path / "take 2.flac", 110)
    mapping = write_csv(
        tmp_path / "names.csv",
        "source,language,emotion,intensity,remark",
        "take 1.WAV,zh,cheerful,strong,loud",
        "take 2.flac,en,neutral,normal,",
    )
    out = tmp_path / "new" / "renamed"
    copies = rename_recordings(tmp_path, mapping, out)
    assert copies == [out / "zh_cheerful_strong.wav", out / "en_neutral_normal.flac"]
    assert copies[0].read_bytes() == (tmp_path / "take 1.WAV").read_bytes()
    assert (tmp_path / "take 1.WAV").exists()
    assert len(load_recordings(out, declared_n=2)) == 2
    kept = copies[0].read_bytes()
    with pytest.raises(InputError, match=r"line 2: .*zh_cheerful_strong\.wav exists already"):
        rename_recordings(tmp_path, mapping, out)
    assert copies[0].read_bytes() == kept


def test_rename_checks_everything_before_the_first_copy(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tone(tmp_path / f"{name}.wav", 100)
    out = tmp_path / "out"
    header = "source,language,emotion,intensity"
    cases = {
        r"line 3: the same OB1 name as names\.csv line 2": "b.wav,en,sad,strong",
        r"line 3: the same source as names\.csv line 2": "a.wav,en,sad,normal",
        r"line 3: source: opening audio .* no such file": "c.wav,en,sad,normal",
        r"line 3: emotion: got 'happy'": "b.wav,en,happy,normal",
    }
    for message, line in cases.items():
        mapping = write_csv(tmp_path / "names.csv", header, "a.wav,en,sad,strong", line)
        with pytest.raises(InputError, match=message):
            rename_recordings(tmp_path, mapping, out)
    with pytest.raises(InputError, match="expected another folder"):
        rename_recordings(tmp_path, mapping, tmp_path / "x" / "..")
    with pytest.raises(InputError, match=r"none\.csv: got .*No such file"):
        rename_recordings(tmp_path, tmp_path / "none.csv", out)
    out.mkdir()
    tone(out / "en_sad_strong.flac", 100)
    mapping = write_csv(
        tmp_path / "names.csv", header, "b.wav,en,sad,normal", "a.wav,en,sad,strong"
    )
    with pytest.raises(InputError, match=r"line 3: .*en_sad_strong\.flac exists already"):
        rename_recordings(tmp_path, mapping, out)
    assert [p.name for p in out.iterdir()] == ["en_sad_strong.flac"]


def test_match_loudness() -> None:
    wave = (0.01 * np.sin(np.arange(16000))).astype(np.float32)
    for target in (-40.0, -20.0, -3.1):
        got = match_loudness(wave, target)
        assert got.dtype == np.float32
        # float32 samples: 6e-8 relative each.
        assert describe_clip(got, RATE).rms_dbfs == pytest.approx(target, abs=1e-6)
        np.testing.assert_allclose(got / got[1], wave / wave[1], rtol=1e-6)
    with pytest.raises(
        InputError, match=r"target of -2.0 dBFS for a clip that is at most -3.0 dBFS"
    ):
        match_loudness(wave, -2.0)
    with pytest.raises(InputError, match="a clip that is silent"):
        match_loudness(np.zeros(9, np.float32), -20.0)


def test_both_steps_are_commands(tmp_path: Path) -> None:
    """`hooked-alm rename`, then `hooked-alm manifest`, on a folder with names of its own."""
    folder = tmp_path / "mine"
    folder.mkdir()
    tone(folder / "take 1.wav", 220)
    mapping = tmp_path / "map.csv"
    mapping.write_text("source,language,emotion,intensity\ntake 1.wav,en,sad,normal\n")
    out = tmp_path / "renamed"
    runner = CliRunner()
    assert runner.invoke(app, ["rename", str(folder), str(mapping), str(out)]).exit_code == 0
    assert runner.invoke(app, ["manifest", str(out)]).exit_code == 0
    (recording,) = load_recordings(out)
    assert (recording.name, recording.label) == ("en_sad_normal", "sad")
    assert "f0_median_hz" in (out / "manifest.csv").read_text()
