"""Runs that are killed, interrupted, resumed, mixed up or damaged."""

import json
import math
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from hooked_alm.errors import InputError
from hooked_alm.experiments.workbench import progress, runner
from hooked_alm.experiments.workbench.experiment import Unit, UnitResult
from hooked_alm.experiments.workbench.identity import differences, flatten
from hooked_alm.experiments.workbench.run_folder import RunFolder
from stopped_runs import kill, needs_kill, results, start, units, wait_for
from workbench_toy import Toy, ToyConfig, run_toy

RECORDING = "recording.wav"
"""What the toy stands in for: a file of the user's, not of the run."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "n_run", 0)
    monkeypatch.setattr(Toy, "interrupts", True)


def test_a_run_folder_has_all_its_parts(tmp_path: Path) -> None:
    folder = run_toy(tmp_path / "run")
    assert set(results(folder.path, RECORDING)) == {
        *("config.yaml", "lock", "report.json", "clips/tone.wav", "arrays/delta.safetensors"),
        *(f"units/zh_sad_{index}.json" for index in range(4)),
        *("tables/delta.parquet", "tables/odd.parquet"),
        *(
            f"tables/{name}.{kind}"
            for name in ("mean", "controls", "findings")
            for kind in ("parquet", "csv")
        ),
        *(f"figures/mean.{kind}" for kind in ("png", "svg", "csv")),
    }
    made_with = folder.provenance
    assert made_with["command"] == "hooked-alm run toy"
    assert made_with["environment"]["torch"].startswith("2.")
    assert made_with["inputs"]["label_ids"]["高兴"] == 5
    events = (folder.path / "events.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["event"] for line in events] == [
        *("start", *["unit"] * 4, "progress", "done")
    ]
    with safe_open(folder.path / "arrays/delta.safetensors", "numpy") as arrays:
        assert json.loads(arrays.metadata()["axes"]) == {"delta": "row"}


def test_units_merge_in_their_own_order(tmp_path: Path) -> None:
    table = run_toy(tmp_path / "run").read_table("delta")
    assert list(table["unit"].unique()) == ["zh_sad_3", "zh_sad_2", "zh_sad_1", "zh_sad_0"]


def test_awkward_numbers_survive(tmp_path: Path) -> None:
    folder = run_toy(tmp_path / "run", n_units=1)
    values = folder.read_unit("zh_sad_0")["record"]["x"]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 0.1 + 0.2, float(np.float32(0.1))]
    odd = folder.read_table("odd")["value"].to_numpy()
    np.testing.assert_array_equal(odd, np.array(values))


@needs_kill
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    settings = {"n_units": 40, "delay_s": 0.03}
    expected = results(run_toy(tmp_path / "whole", **settings).path, RECORDING)
    out = tmp_path / "killed"
    moments = random.Random(7)
    n_done = 0
    for _ in range(5):
        process = start(run_toy, out, **settings)
        wait_for(lambda before=n_done: len(units(out)) > before)
        time.sleep(moments.uniform(0, 0.06))
        kill(process)
        before, n_done = n_done, len(units(out))
        assert before < n_done < 40

    Toy.n_run = 0
    run_toy(out, **settings)
    assert Toy.n_run == 40 - n_done
    assert results(out, RECORDING) == expected


def test_an_interrupted_run_says_how_to_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a run"
    with pytest.raises(KeyboardInterrupt):
        run_toy(out, interrupt_at=1)
    assert (
        f"hooked-alm run toy --config '{out}/config.yaml' --out '{out}'" in capfd.readouterr().err
    )
    assert Toy.n_run == 2
    assert not (out / "report.json").exists()

    monkeypatch.setattr(Toy, "interrupts", False)
    run_toy(out, interrupt_at=1)
    assert Toy.n_run == 4
    run_toy(out, interrupt_at=1)
    assert Toy.n_run == 4


def test_progress_is_lines_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one for every unit, but one at the end."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    run_toy(tmp_path / "few", n_units=9)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"toy: 9 of 9 units, \d\S* a second, 0 s left, \d+\.\d GiB", line)

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    folder = run_toy(tmp_path / "often", n_units=3, delay_s=0.6)
    first, *_, last = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"toy: 0 of 3 units, none, unknown time left, \d+\.\d GiB", first)
    assert "3 of 3 units, " in last
    events = map(json.loads, (folder.path / "events.jsonl").read_text("utf-8").splitlines())
    told = [event for event in events if event["event"] == "progress"]
    assert [told[0]["done"], told[-1]["done"], told[-1]["seconds_left"]] == [0, 3, 0]
    assert len(told) >= 4

    monkeypatch.setenv("TQDM_DISABLE", "1")
    run_toy(tmp_path / "silent", n_units=3)
    assert capfd.readouterr().err == ""


def test_a_failing_unit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Toy, unit: Unit) -> UnitResult:
        raise InputError("no")

    monkeypatch.setattr(Toy, "measure", fail)
    with pytest.raises(InputError) as caught:
        run_toy(tmp_path / "run")
    assert "unit zh_sad_3" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, r"config.seed \(now 1, in the folder 0\)"),
        ({"n_threads": 2}, r"config.n_threads \(now 2, in the folder 1\)"),
        ({"lens": {"depths": [0]}}, r"config.lens.depths \(now \[0\], in the folder \[0, 1, 2\]\)"),
        ({"variant": "seed"}, "config.is_zero .now true, in the folder false"),
    ],
)
def test_another_configuration_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    run_toy(tmp_path / "run", n_units=1)
    before = results(tmp_path / "run", RECORDING)
    with pytest.raises(InputError, match=message):
        run_toy(tmp_path / "run", n_units=1, **settings)
    assert results(tmp_path / "run", RECORDING) == before


def test_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_toy(tmp_path / "run", n_units=1)
    monkeypatch.setattr(Toy, "schema_version", 2)
    with pytest.raises(InputError, match=r"schema_version \(now 2"):
        run_toy(tmp_path / "run", n_units=1)


def test_other_versions_are_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_toy(tmp_path / "run", n_units=1)
    monkeypatch.setattr(runner.provenance, "environment", lambda _: {"torch": "9.9"})
    run_toy(tmp_path / "run", n_units=1)
    assert "torch: 2." in capfd.readouterr().err


def test_known_defects_are_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_toy(tmp_path / "seed", n_units=1, variant="seed")
    assert capfd.readouterr().err.count("C8: the consistent curve is zero") == 1
    run_toy(tmp_path / "corrected", n_units=1)
    assert "defects" not in capfd.readouterr().err


def test_a_damaged_unit_is_found_before_the_work(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_toy(out)
    (out / "units/zh_sad_1.json").write_text('{"tables": ')
    (out / "units/zh_sad_3.json").unlink()
    Toy.n_run = 0
    with pytest.raises(InputError, match=r"zh_sad_1\.json: got a damaged file .*delete the file"):
        run_toy(out)
    assert Toy.n_run == 0
    (out / "units/zh_sad_1.json").unlink()
    run_toy(out)
    assert Toy.n_run == 2


def test_one_writer(tmp_path: Path) -> None:
    with RunFolder(tmp_path).lock(), pytest.raises(InputError, match="another process"):
        run_toy(tmp_path)
    run_toy(tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear to someone")
    with pytest.raises(InputError, match=r"other files in it \(thesis.tex\)"):
        run_toy(tmp_path)


def test_inputs_are_checked_before_the_folder_is_claimed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="counting units"):
        run_toy(tmp_path / "run", n_units=51)
    run_toy(tmp_path / "run", n_units=1)


@pytest.mark.parametrize("ids", [[], ["a", "a"], ["a", "A"], ["a/b"], [".."], [""]])
def test_unit_ids_must_be_file_names(
    tmp_path: Path, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "units", lambda self: [Unit(unit_id) for unit_id in ids])
    with pytest.raises(InputError, match="unique ids"):
        run_toy(tmp_path / "run")


def test_the_same_settings_find_the_same_folder() -> None:
    config = ToyConfig(model="somewhere/Qwen2 Audio/")
    again = ToyConfig.model_validate(config.model_dump())
    assert runner.default_out("toy", config) == runner.default_out("toy", again)
    assert runner.default_out("toy", config).name.startswith("toy-Qwen2-Audio-")
    assert runner.default_out("toy", config) != runner.default_out("toy", ToyConfig())


def test_differences_are_keyed() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    assert differences({"a": {"b": math.nan}}, {"a": {"b": math.nan}}) == []
    assert differences({"a": {"b": 1}}, {"a": {}}) == [
        "a (now nothing, in the folder {})",
        "a.b (now 1, in the folder nothing)",
    ]


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_table("known", pd.DataFrame({"a": [1]}))
    with pytest.raises(InputError, match="'curves', expected one of: known"):
        folder.read_table("curves")


@needs_kill
@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["SIGTERM", "Ctrl-C twice"]
)
@pytest.mark.parametrize("amid", ["units", "report"])
def test_a_stopped_run_ends_with_the_same_bytes(
    tmp_path: Path, numbers: list[signal.Signals], amid: str
) -> None:
    """`scripts/kill_runs.py` does the same to every experiment."""
    settings = {"n_units": 8, "delay_s": 0.02}
    expected = results(run_toy(tmp_path / "whole", **settings).path, RECORDING)
    out = tmp_path / "stopped"
    process = start(run_toy, out, **settings)
    wait_for(lambda: len(units(out)) >= 3 if amid == "units" else (out / "tables").exists())
    for number in numbers:
        os.kill(process.pid or 0, number)
        time.sleep(0.005)
    process.join()
    assert process.exitcode
    assert not (out / "report.html").exists()
    run_toy(out, **settings)
    assert results(out, RECORDING) == expected
