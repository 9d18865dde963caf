"""Files of a run and of nobody else: links, names that lead out, damage, what systems refuse."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from hooked_alm import storage
from hooked_alm.errors import InputError
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.compare import compare
from hooked_alm.experiments.workbench.files import OwnFiles
from hooked_alm.experiments.workbench.render import render, with_links
from hooked_alm.experiments.workbench.report import (
    Clip,
    Clips,
    Figure,
    Section,
    Table,
    read_report,
    write_report,
)
from hooked_alm.experiments.workbench.run_folder import RunFolder
from workbench_toy import Toy, ToyConfig, run_toy

LINKS = (
    "lock", "run.json", "config.yaml", "events.jsonl", "report.json", "report.html",
    "units/zh_sad_0.json", "tables/mean.csv", "figures/mean.svg", ".run.json.tmp",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_toy(tmp_path_factory.mktemp("run") / "run", n_units=2).path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    """A finished run of one's own."""
    return RunFolder(shutil.copytree(finished, tmp_path / "run"))


# --- Nothing outside


def below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["lock", "thesis.tex", ".run.json.tmp/x", "units/notes.json"])
def test_a_folder_of_a_users_is_left_as_it_was(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("dear to someone")
    before = below(tmp_path)
    with pytest.raises(InputError, match="other files in it"):
        run_toy(tmp_path)
    with pytest.raises(InputError, match="other files in it"), RunFolder(tmp_path).lock():
        pass
    assert below(tmp_path) == before


def test_what_is_refused_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="counting units"):
        run_toy(tmp_path / "new" / "run", n_units=51)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", LINKS)
def test_no_link_leads_out_of_an_empty_folder(tmp_path: Path, name: str) -> None:
    outside, out = tmp_path / "outside", tmp_path / "run"
    outside.write_text("dear to someone")
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(outside)
    with pytest.raises(InputError, match=r"got a link at .*Remove it|other files in it"):
        run_toy(out)
    assert outside.read_text() == "dear to someone"


@pytest.mark.parametrize("name", ["lock", "events.jsonl", "units", "tables", "figures", "clips"])
def test_no_link_leads_out_of_a_run(run: RunFolder, tmp_path: Path, name: str) -> None:
    """A run that goes on, in whose folder somebody put a link."""
    outside = tmp_path / "outside"
    shutil.move(run.path / name, outside)
    (run.path / name).symlink_to(outside)
    before = below(outside) if outside.is_dir() else outside.read_bytes()
    with pytest.raises(InputError, match=f"got a link at .*{name}"):
        run_toy(run.path, n_units=2)
    assert (below(outside) if outside.is_dir() else outside.read_bytes()) == before


def test_a_partial_file_is_never_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("dear to someone")
    (tmp_path / ".new.tmp").symlink_to(outside)
    storage.write_atomic(tmp_path / "new", b"x")
    assert (outside.read_text(), (tmp_path / "new").read_text()) == ("dear to someone", "x")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "a/\0", "a/."]
)
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    files = OwnFiles(tmp_path)
    for use in (files.read, files.has, lambda name: files.write(name, b""), files.inside):
        with pytest.raises(InputError, match="expected a path that stays inside"):
            use(name)


def test_a_pipe_is_no_file(run: RunFolder) -> None:
    (run.path / "events.jsonl").unlink()
    os.mkfifo(run.path / "events.jsonl")
    with pytest.raises(InputError, match="got something else at"):
        run_toy(run.path, n_units=2)


@pytest.mark.parametrize(
    "item",
    [
        Figure("../../outside", "", ""),
        Table("", name="/outside"),
        Clips([Clip("../outside.wav", "")]),
        Clips([Clip("/etc/passwd", "")]),
        Figure("linked", "", ""),
    ],
)
def test_a_report_of_anyone_reads_nothing_outside(
    run: RunFolder, tmp_path: Path, item: Figure | Table | Clips
) -> None:
    (tmp_path / "outside.wav").write_bytes(b"secret")
    (run.path / "figures/linked.svg").symlink_to(tmp_path / "outside.wav")
    write_report(run, _with(run, Section("", items=[item])))
    with pytest.raises(InputError, match=r"stays inside|got a link at"):
        render(run)


def _with(run: RunFolder, *sections: Section) -> object:
    return replace(read_report(run), sections=[*sections])


@pytest.mark.parametrize("text", ["a" * 50_000, "a/" * 20_000, "." * 40_000, "x" * 300 + "/a.b"])
def test_links_are_looked_for_in_any_text(tmp_path: Path, text: str) -> None:
    """Fast, and without an error of the system for a name that it does not take."""
    assert "".join(part for part, _ in with_links(text, tmp_path)) == text


def test_links_lead_no_further_than_beside_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (inner := tmp_path / "above" / "run").mkdir(parents=True)
    text = "../../a.csv and ../run/../../a.csv"
    assert not any(is_link for _, is_link in with_links(text, inner))


def test_a_folder_of_anyone_may_hold_anything(run: RunFolder) -> None:
    """Well-formed, with a checksum that holds, and not what a run writes."""
    record = run.provenance
    run.write_json("run.json", {**record, "inputs": {"model": "x"}, "config": {}})
    assert render(run).is_file()
    run.write_table("findings", pd.DataFrame({"a": [1]}))
    with pytest.raises(InputError, match=r"table findings without .*Run the experiment again"):
        list(compare(run, run))
    for key in ("inputs", "config", "environment", "experiment"):
        run.write_json("run.json", {**record, key: 3})
        with pytest.raises(InputError, match=rf"run\.json: got a damaged .*usable {key}"):
            render(run)


# --- Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_digit(path: Path) -> None:
    """The first digit after a decimal point: JSON and tables stay well formed."""
    data = bytearray(path.read_bytes())
    at = next(i for i in range(2, len(data)) if data[i - 1 : i] == b"." and chr(data[i]).isdigit())
    data[at] = ord("1") if data[at] != ord("1") else ord("2")
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "digit": flip_a_digit,
    "empty": lambda path: path.write_bytes(b""),
    "{}": lambda path: path.write_text("{}"),
    "list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "not UTF-8": lambda path: path.write_bytes(b'{"tables": "\xff"}'),
    "long number": lambda path: path.write_text("1" * 5000),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("units/zh_sad_1.json", "delete the file; its unit is then redone"),
        ("run.json", "copy it back, or start another run"),
    ],
)
def test_a_damaged_file_is_named_with_its_cure(
    run: RunFolder, name: str, cure: str, damage: str
) -> None:
    DAMAGES[damage](run.path / name)
    with pytest.raises(InputError, match=rf"reading .*{name}: got a damaged file .*{cure}"):
        run_toy(run.path, n_units=2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_report_is_named_with_its_cure(run: RunFolder, damage: str) -> None:
    DAMAGES[damage](run.path / "report.json")
    with pytest.raises(InputError, match=r"report\.json: got a damaged .*run the experiment again"):
        render(run)


def test_all_damaged_units_are_named_and_one_of_another_is_found(run: RunFolder) -> None:
    first, second = (run.path / f"units/zh_sad_{n}.json" for n in (0, 1))
    shutil.copy(first, second)
    first.write_text("{}")
    with pytest.raises(
        InputError, match=r"(?s)zh_sad_1.*result of 'zh_sad_0'.*zh_sad_0\.json: got"
    ):
        run_toy(run.path, n_units=2)


def test_a_changed_byte_of_a_table_is_found(run: RunFolder) -> None:
    path = run.path / "tables/mean.parquet"
    data = bytearray(path.read_bytes())
    data[60] ^= 1  # within the first page of numbers
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"mean\.parquet: got a damaged file"):
        run.read_table("mean")
    cut(path)
    with pytest.raises(InputError, match=r"mean\.parquet: got a damaged file"):
        render(run)


@pytest.mark.parametrize("name", ["figures/mean.svg", "tables/findings.parquet"])
@pytest.mark.parametrize("damage", ["cut", "empty", "not UTF-8"])
def test_a_damaged_output_is_named(run: RunFolder, name: str, damage: str) -> None:
    DAMAGES[damage](run.path / name)
    use = render if name.startswith("figures") else lambda run: list(compare(run, run))
    with pytest.raises(InputError, match=name):
        use(run)


def test_what_follows_from_the_rest_is_written_again(run: RunFolder) -> None:
    derived = ["config.yaml", "report.json", "tables/mean.parquet", "figures/mean.svg"]
    before = [run.read(name) for name in derived]
    for name in derived:
        (run.path / name).write_bytes(b"\0")
    run_toy(run.path, n_units=2)
    assert [run.read(name) for name in derived] == before


# --- What the system refuses


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "No space left on device.*Free some space; the same command then goes on"),
        (errno.EROFS, "Read-only file system.*Choose a place that you may use"),
        (errno.EIO, "Input/output error.*Check the path and its disk"),
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    real, calls = os.fsync, iter(range(1000))

    def fails_later(descriptor: int) -> None:
        if next(calls) == 8:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails_later)
    with pytest.raises(InputError, match=message) as caught:
        run_toy(tmp_path / "run", n_units=2)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(os, "fsync", real)
    if number == errno.ENOSPC:
        run_toy(tmp_path / "run", n_units=2)


@pytest.mark.parametrize("name", ["x" * 300, "file/run", "file"])
def test_a_place_that_cannot_be_is_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Toy, "identify", lambda self: pytest.fail("it was opened"))
    with pytest.raises(InputError, match=r"got '(File name too long|Not a directory)' from"):
        run_toy(tmp_path / name)


def as_nobody(path: Path) -> str:
    """What a process without rights is told when it would write to a folder."""
    reads, writes = os.pipe()
    if not (child := os.fork()):
        os.setgid(65534)
        os.setuid(65534)
        try:
            with RunFolder(path).lock():
                os.write(writes, b"it was let in")
        except BaseException as error:
            os.write(writes, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writes)
    with os.fdopen(reads) as said:
        return said.read()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("name", ["new", "run"])
def test_a_folder_that_may_not_be_written_to_is_one_line(
    run: RunFolder, tmp_path: Path, name: str
) -> None:
    for path in (tmp_path, *tmp_path.parents):
        if path.name.startswith(("test_", "pytest-")):
            path.chmod(0o755)
    said = as_nobody(tmp_path / name)
    assert said.startswith("InputError: "), said
    assert "Permission denied" in said
    assert "Choose a place that you may use" in said
    assert "\n" not in said


def test_names_that_are_no_text_are_kept_as_escapes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("a.json", {"name": "clip\udcff"})
    assert json.loads((tmp_path / "a.json").read_bytes())["name"] == "clip\udcff"
    assert folder.read_json("a.json", "") == {"name": "clip\udcff"}


def test_a_long_model_name_names_a_folder_that_can_be() -> None:
    assert len(runner.default_out("toy", ToyConfig(model="m" * 1000)).name.encode()) < 255
