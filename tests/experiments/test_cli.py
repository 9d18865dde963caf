"""The command line: exit codes and messages."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml

from hooked_alm.converters import parity
from hooked_alm.errors import InputError
from hooked_alm.experiments import cli, registry
from hooked_alm.experiments.registry import load_experiment
from hooked_alm.experiments.workbench import doctor
from hooked_alm.experiments.workbench.claims import Claim, Finding, judged
from stopped_runs import results
from workbench_toy import Toy


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(registry.EXPERIMENTS, "toy", "workbench_toy:Toy")
    monkeypatch.setattr(Toy, "interrupts", True)
    monkeypatch.setattr(Toy, "n_run", 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOOKED_ALM_DEBUG", raising=False)


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["hooked-alm", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def test_a_run_resumes_by_its_own_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "toy", "--model", "small", "--audio", "mine", "-s", "interrupt_at=1"]
    assert call(monkeypatch, *words) == 130
    assert "Stopped" in capsys.readouterr().err
    monkeypatch.setattr(Toy, "interrupts", False)
    assert call(monkeypatch, *words) == 0
    *headlines, path_line = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"It rises\. \d\.\d\d\.", headlines[0])
    assert headlines[1:] == [
        f"not established: It follows {what}. Because: nobody asked. Not measured."
        for what in ("words", "signs")
    ]
    path = Path(path_line)
    assert path.parent.name.startswith("toy-small-")
    assert path.is_file()
    assert Toy.n_run == 4
    settings = yaml.safe_load((path.parent / "config.yaml").read_text("utf-8"))
    assert (settings["model"], settings["audio"]) == ("small", "mine")

    # The settings in the folder name the same run.
    assert call(monkeypatch, "run", "toy", "--config", str(path.parent / "config.yaml")) == 0
    assert Toy.n_run == 4
    path.unlink()
    assert call(monkeypatch, "report", str(path.parent)) == 0
    assert path.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "toi"], "Error: looking up an experiment: got 'toi', expected one of .* toy"),
        (["run", "toy", "-s", "sede=1"], "Did you mean seed"),
        (["run", "toy", "-s", "n_units=51"], "counting units: got more than 50"),
        (["report", "nowhere"], "opening the run nowhere: got no such folder, expected the folder"),
        (["compare", ".", "."], "opening the run .: got a folder without run.json"),
        (["run", "toy", "--dry-run", "-s", "n_units=51"], "counting units: got more than 50"),
        (["run", "head_statistics", "--audio", "mine"], "head_statistics with --audio: its items"),
        (
            ["verify", "bundled:follows_text", "--device", "cudaa"],
            "on device 'cudaa': .*hooked-alm doctor",
        ),
        (["hooks", "bundled:follows_text", "--component", "x=y"], "components .'x'., but its"),
        (["hooks", "bundled:follows_text", "--component", "x"], "got x, expected NAME=PATH"),
    ],
)
def test_an_error_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert call(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(message, said), said

    monkeypatch.setenv("HOOKED_ALM_DEBUG", "1")
    monkeypatch.setattr("sys.argv", ["hooked-alm", *words])
    with pytest.raises(InputError):
        cli.main()


def test_settings_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "toy", "-s", "seed=3", "--show-settings") == 0
    said = capsys.readouterr().out
    assert yaml.safe_load(said)["seed"] == 3
    assert "# branch, tag or commit of a model id\nrevision: null\n" in said
    assert "; one of corrected, seed\nvariant: corrected\n" in said
    assert not Path("runs").exists()


def test_experiments_are_listed_with_their_questions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of other packages too, and without an import of any."""
    installed = EntryPoint("hear", "workbench_toy:Toy", registry.GROUP)
    broken = EntryPoint("broken", "no_such_package.module:Gone", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [installed, broken])
    assert call(monkeypatch, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {name: question.strip() for name, _, question in (one.partition(" ") for one in lines)}
    assert listed.keys() == {*registry.EXPERIMENTS, "hear", "broken"}
    assert listed.pop("broken") == ""
    for name, question in listed.items():
        assert question == load_experiment(name).question


def test_a_dry_run_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "toy", "--dry-run", "--out", "run", "-s", "delay_s=0.3"]
    assert call(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert re.search(r"zh_sad_3: 1 units, 1 of them to do; the first took 0\.[3-9]\d s", said)
    assert re.search(r"about [1-4] s, taking every unit of a kind for as long as its first", said)
    assert re.search(r"peak memory of this process, .*: \d\.\d GiB", said)
    assert list(Path().iterdir()) == []

    # What is done already is not counted.
    assert call(monkeypatch, "run", "toy", "--out", "run") == 0
    Path("run/units/zh_sad_2.json").unlink()
    before = results(Path("run"))
    capsys.readouterr()
    assert call(monkeypatch, "run", "toy", "--out", "run", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "zh_sad_3: 1 units, 0 of them to do\n" in said
    assert "zh_sad_2: 1 units, 1 of them to do; the first" in said
    assert results(Path("run")) == before


def test_verbose_says_every_event(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "toy", "-v", "--out", "run") == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["start:", *["unit:"] * 4, "done:"]
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d unit: unit zh_sad_3, seconds \d\.\d+, worker \S+:\d+", lines[1]
    )


def test_open_shows_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda uri: shown.append(uri) or True)
    assert call(monkeypatch, "run", "toy", "--out", "run") == 0
    assert shown == []
    assert call(monkeypatch, "run", "toy", "--out", "run", "--open") == 0
    assert call(monkeypatch, "report", "run", "--open") == 0
    assert shown == [Path("run/report.html").resolve().as_uri()] * 2


def test_runs_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    intervals = [(0.2, 0.4), (0.3, 0.5), (0.6, 0.7), (-0.3, -0.1), (0.1, 0.15)]

    def rises(run: Any) -> Finding:
        low, high = intervals[run.config.seed]
        numbers = {"mean": (low + high) / 2, "low": low, "high": high, "n": 12}
        return judged("It rises", "so", {"it falls": high < 0}, numbers=numbers, unit="rate")

    claims = (Claim(name="rises", rests_on=("delta",), judge=rises), *Toy.claims[1:])
    monkeypatch.setattr(Toy, "claims", claims)
    for seed in range(5):
        assert call(monkeypatch, "run", "toy", "-s", f"seed={seed}", "--out", str(seed)) == 0
    before = [results(Path(str(seed))) for seed in range(5)]
    capsys.readouterr()
    relations = {1: "overlap ", 2: "REVERSED", 3: "REVERSED", 4: "apart   "}
    for other, relation in relations.items():
        assert call(monkeypatch, "compare", "0", str(other)) == 0
        said = capsys.readouterr().out
        assert f"Settings that differ\n  seed: 0 | {other}\n" in said
        row = rf"  {relation} +rises +established, 0\.3 \[0\.2, 0\.4\] rate, n = 12 \| "
        assert re.search(row, said)
        assert "not established, not measured | not established, not measured" in said
        assert "  pass | pass  nothing is wrong" in said
    assert [results(Path(str(seed))) for seed in range(5)] == before

    Path("0/report.json").unlink()
    assert call(monkeypatch, "compare", "0", "1") == 2
    assert "expected a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("begun", "expected"),
    [
        ("run circ", ["circuits"]),
        ("run my", ["my_experiment.py", "my_models/"]),
        ("run toy --model bundled:follows_s", ["bundled:follows_semantics"]),
        ("verify my_models/", ["my_models/small/"]),
        ("lis", ["list"]),
    ],
)
def test_completion(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    begun: str,
    expected: list[str],
) -> None:
    Path("my_models/small").mkdir(parents=True)
    Path("my_experiment.py").touch()
    monkeypatch.setenv("_HOOKED_ALM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"hooked-alm {begun}")
    monkeypatch.setenv("COMP_CWORD", str(len(begun.split())))
    call(monkeypatch)
    assert capsys.readouterr().out.split() == expected


def test_the_help_names_every_experiment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "run", "--help") == 0
    said = capsys.readouterr().out
    assert [name for name in registry.EXPERIMENTS if name != "toy" and name not in said] == []


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_the_doctor_finds_and_cures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "doctor") == 0
    real = doctor.metadata.version

    def version(name: str) -> str:
        if name == "soxr":
            raise doctor.metadata.PackageNotFoundError
        return {"transformers": "5.30.0", "torchvision": "0.28.0"}.get(name) or real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    capsys.readouterr()
    assert call(monkeypatch, "doctor") == 1
    said = capsys.readouterr().out
    assert "FAIL  transformers 5.30.0 is not supported (supported: ==5.23.*)" in said
    assert "FAIL  soxr is missing" in said
    assert "pip uninstall torchvision" in said


@pytest.mark.parametrize(("difference", "code"), [(0.0, 0), (0.25, 0), (0.75, 1)])
def test_verify_fails_on_a_difference_above_the_tolerance(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    difference: float,
    code: int,
) -> None:
    def verify(name: str, **given: Any) -> parity.Verification:
        assert given == {
            **{"dtype": "bfloat16", "attn_implementation": "sdpa", "device": "cpu"},
            "components": {"text_model": "there"},
            "tolerance": 0.5,
        }
        row = parity.Comparison(
            prompt="text", where="logits", max_abs_difference=difference, is_equal=not difference
        )
        kept = {key: given[key] for key in ("dtype", "attn_implementation", "tolerance")}
        return parity.Verification(model=name, rows=(row,), **kept)

    monkeypatch.setattr(parity, "verify", verify)
    words = ["verify", "small", "--dtype", "bfloat16", "--tolerance", "0.5"]
    words += ["--component", "text_model=there"]
    assert call(monkeypatch, *words) == code
    assert f"bit-identical to HF: {'no' if difference else 'yes'}" in capsys.readouterr().out
