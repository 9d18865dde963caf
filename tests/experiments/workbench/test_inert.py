"""Text from data: nothing in it moves a cursor, is calculated by a spreadsheet, or is lost."""

import csv
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.experiments import cli
from hooked_alm.experiments.materials.recordings import load_recordings, write_manifest
from hooked_alm.experiments.materials.records import GroupName, LineRecord, Name, read_records
from hooked_alm.experiments.workbench.inert import for_sheet, for_terminal, from_sheet
from hooked_alm.experiments.workbench.run_folder import RunFolder


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\rb\x07\x00\x9b", r"a\rb\x07\x00\x9b"),
        ("gp\u202egnp.exe", r"gp\u202egnp.exe"),
        ("\u2066a\u2069\u200f", r"\u2066a\u2069\u200f"),
        ("line\u2028line", r"line\u2028line"),
        ("clip\udcff.wav", r"clip\udcff.wav"),
        ("name\nError: forged", "name\n  Error: forged"),
        ("all:\n  one\n\ntwo\n", "all:\n  one\n\n  two\n"),
        ("悲伤\té − ✓ 👩‍🔬", "悲伤\té − ✓ 👩‍🔬"),
    ],
)
def test_what_acts_on_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert for_terminal(text) == shown


CELLS = ("=1+1", "+x", "-x", "@sum", "\tx", "\rx", "'=1", "''=1", "=", "=HYPERLINK(1)")


@pytest.mark.parametrize("cell", CELLS)
def test_formulas_are_text_and_come_back(cell: str) -> None:
    assert for_sheet(cell) == f"'{cell}"
    assert from_sheet(for_sheet(cell)) == cell


@pytest.mark.parametrize(
    "cell", ["sad", "-1.5", "+2e3", "-inf", "'quoted'", "", -1, None, "−1", "a=b"]
)
def test_all_else_stays(cell: object) -> None:
    assert for_sheet(cell) == cell
    if isinstance(cell, str):
        assert from_sheet(cell) == cell


def test_sheets_of_a_run_hold_no_formula(tmp_path: Path) -> None:
    """In cells and in heads; numbers, gaps and mixed columns are as they were."""
    table = pd.DataFrame(
        {"@name": ["=1", "b", None], "value": [-1.5, np.nan, 2.0], "n": [1, 2, 3],
         "mixed": [-1, "-x", True], "kind": pd.Categorical(["+a", "b", "b"])}
    )  # fmt: skip
    folder = RunFolder(tmp_path)
    folder.write_table("t", table.drop(columns="mixed"), is_summary=True)
    folder.write_sheet("mixed.csv", table)
    with (tmp_path / "mixed.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["'@name", "value", "n", "mixed", "kind"]
    assert rows == [
        ["'=1", "-1.5", "1", "-1", "'+a"], ["b", "", "2", "'-x", "b"], ["", "2.0", "3", "True", "b"]
    ]  # fmt: skip
    assert folder.read_table("t")["@name"].tolist()[:2] == ["=1", "b"]
    assert "'=1" in (tmp_path / "tables/t.csv").read_text()


def test_a_manifest_is_read_as_it_was_measured(tmp_path: Path) -> None:
    for number, name in enumerate(("=a.wav", "b.wav")):
        shutil.copy(sorted(CLIPS.glob("*.wav"))[number], tmp_path / name)
    lines = ["path,emotion,note", "=a.wav,+sad,'=1", "b.wav,happy,-2"]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    before = load_recordings(tmp_path)
    write_manifest(tmp_path, before)
    text = (tmp_path / "manifest.csv").read_text()
    assert "\n'=a.wav,'+sad,'=1," in text
    again = load_recordings(tmp_path)
    assert [(one.name, one.cells) for one in again] == [(one.name, one.cells) for one in before]


def test_a_command_prints_data_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Errors and warnings alike."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    (tmp_path / "\x1b[2J_strong.wav").write_text("no sound")
    monkeypatch.setattr("sys.argv", ["hooked-alm", "manifest", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err + warnings.formatwarning("\x1b[3J", UserWarning, "file", 1)
    assert "\x1b" not in said
    assert r"\x1b[2J_strong" in said
    assert said.endswith("UserWarning: \\x1b[3J\n")


class _Named(LineRecord):
    id: Name
    group: GroupName


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"group": "a\nError: b"}', "group: got .*expected a name without line breaks"),
        (r'{"group": "\u001b[31m"}', "group: got .*expected a name without line breaks"),
        (r'{"group": "\u202e"}', "group: got .*expected a name without line breaks"),
        ('{"id": "' + "x" * 101 + '"}', "id: got .*expected up to 100 bytes"),
        ('{"id": "' + "悲" * 34 + '"}', "id: got .*expected up to 100 bytes"),
        ('{"id": "../x"}', "id: got .*expected up to 100 bytes of letters"),
        ('{"id": ' + "1" * 5000 + "}", "got no usable JSON"),
    ],
)
def test_names_are_checked_where_they_are_read(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(line, "utf-8")
    with pytest.raises(InputError, match=message):
        read_records("names", tmp_path / "a.jsonl", _Named)


def test_a_label_is_capped_where_it_is_read(tmp_path: Path) -> None:
    shutil.copy(CLIPS / "en_sad_strong.wav", tmp_path)
    (tmp_path / "manifest.csv").write_text(f"path,emotion\nen_sad_strong.wav,{'x' * 300}\n")
    with pytest.raises(InputError, match=r"emotion: got .*expected up to 100 bytes: results are"):
        load_recordings(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "~nobody_has_this/x", "a\0b", "x" * 5000])
def test_paths_that_no_system_takes_are_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="loading recordings: got"):
        load_recordings(tmp_path / name if name[0] != "~" else name)
    with pytest.raises(InputError, match="reading names from"):
        read_records("names", tmp_path / f"{name}.jsonl", _Named)
