"""The page about an experiment of one's own: its file runs, resumes, judges and reports."""

import csv
import json
import re
from pathlib import Path

import pytest

from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.experiments import cli, registry
from hooked_alm.experiments.workbench.report import read_report
from hooked_alm.experiments.workbench.run_folder import RunFolder

PAGE = Path(__file__).resolve().parents[2] / "docs/own_experiment.md"
ASK = "Judge the emotion of this audio. Output the label only."


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's file, and a sheet of bundled clips, in the current folder."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    code = max(blocks, key=len)
    assert code.count("\n") <= 100
    (tmp_path / "mine.py").write_text(code, "utf-8")
    with (tmp_path / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "emotion"])
        for path in sorted(CLIPS.glob("en_*.wav")) + sorted(CLIPS.glob("zh_sad*.wav")):
            writer.writerow([path, path.stem.split("_")[1]])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hooked_alm(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["hooked-alm", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def test_the_pages_experiment_runs_like_ours(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "mine.py", "--audio", "clips.csv", "-s", f"prompt={ASK}", "--out", "out"]
    assert hooked_alm(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert re.match(
        r"The model hears the emotion\. Right in 1\.00 \[1\.00, 1\.00\] of 11 clips", said
    )
    folder = RunFolder("out")
    assert folder.provenance["command"].startswith("hooked-alm run mine.py -s")
    assert len(folder.provenance["environment"]["experiment_sha256"]) == 64
    report = read_report(folder)
    assert [one.established for one in report.headlines] == [True]
    assert not report.is_calibration
    assert [section.title for section in report.sections] == [
        *("By depth", "Controls", "Methods and caveats"),
    ]
    assert set(folder.read_table("controls").verdict) == {"pass"}

    # A unit that is gone is done again, and nothing else; all results have the same bytes.
    before = {path.name: path.read_bytes() for path in (written / "out/tables").iterdir()}
    lost = written / "out/units/en_sad_strong.json"
    lost.unlink()
    assert hooked_alm(monkeypatch, *words) == 0
    assert {path.name: path.read_bytes() for path in (written / "out/tables").iterdir()} == before
    events = [json.loads(line) for line in Path("out/events.jsonl").read_text().splitlines()]
    assert [e["unit"] for e in events[-3:] if e["event"] == "unit"] == ["en_sad_strong"]


def test_a_failed_control_takes_its_claim_back(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (written / "mine.py").read_text("utf-8")
    (written / "mine.py").write_text(code.replace("rows = residual", "rows = 3 + residual"))
    assert hooked_alm(monkeypatch, "run", "mine.py", "--audio", "clips.csv", "--out", "out") == 0
    said = capsys.readouterr().out
    assert said.startswith("Failed controls:\n  the lens ends in the output: Found largest")
    assert "It takes back: hears." in said
    assert "not established: The model hears the emotion. Because: " in said


def test_the_sheet_is_checked_before_anything_is_written(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (written / "clips.csv").write_text("path,emotion\nnone.wav,sad\n")
    assert hooked_alm(monkeypatch, "run", "mine.py", "--audio", "clips.csv", "--out", "out") == 2
    assert "none.wav" in capsys.readouterr().err
    assert not (written / "out/run.json").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n", "got 0 experiments .no subclass of Experiment"),
        (None, "got no such file"),
    ],
)
def test_a_file_without_an_experiment(tmp_path: Path, code: str | None, message: str) -> None:
    path = tmp_path / "mine.py"
    if code is not None:
        path.write_text(code)
    with pytest.raises(InputError, match=message):
        registry.load_experiment(str(path))


def test_an_installed_experiment_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "hear", "hooked_alm.experiments.tuned_lens.experiment:TuneLens"

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point] * (group == registry.GROUP))
    assert registry.load_experiment("hear").__name__ == "TuneLens"
    with pytest.raises(InputError, match="Did you mean hear"):
        registry.load_experiment("heer")
