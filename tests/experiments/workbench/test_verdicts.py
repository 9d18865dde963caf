"""Controls, claims and defects of the toy: what takes a claim back, and where it is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hooked_alm.errors import InputError
from hooked_alm.experiments.workbench.claims import Claim
from hooked_alm.experiments.workbench.controls import FAIL, PASS, SKIPPED, at_most
from hooked_alm.experiments.workbench.experiment import Unit, UnitResult
from hooked_alm.experiments.workbench.report import read_report, report_lines
from workbench_toy import Toy, ToyConfig, run_toy


def verdict(**settings: Any) -> Any:
    config = ToyConfig(**settings)
    tables = {"delta": pd.DataFrame(), "mean": pd.DataFrame({"mean": [1.0, 2.0]})}
    return Toy.judge(Toy.results(config, {}, tables))


def test_a_sound_run_makes_its_claims() -> None:
    found = verdict()
    assert list(found.controls.verdict) == [PASS, SKIPPED]
    assert {name: one.doubts for name, one in found.findings.items()} == {
        "rises": (),
        "follows_words": ("nobody asked",),
        "follows_signs": ("nobody asked",),
    }
    assert found.warnings == {}
    table = found.table().set_index("claim")
    assert table.rests_on["rises"] == "delta"
    assert table.statement["rises"] == "It rises. 2.00."


def test_a_failed_control_takes_back_what_rests_on_its_tables() -> None:
    found = verdict(wrong=0.7)
    assert found.controls.verdict[0] == FAIL
    assert found.findings["rises"].doubts == ("the control 'nothing is wrong' failed",)
    assert found.findings["follows_words"].doubts == ("nobody asked",)
    said = found.warnings["Failed controls"]["nothing is wrong"]
    assert said == (
        "Found largest difference 0.7 logits of 1, expected at most 0.5. It takes back: rises."
    )


def test_a_known_defect_takes_back_what_it_touches() -> None:
    found = verdict(variant="seed")
    assert found.findings["rises"].doubts == ("known defects C8",)
    said = found.warnings["Known defects of these settings"]["C8"]
    assert said == "the consistent curve is zero. It takes back: rises."
    assert not found.findings["rises"].established


def test_the_reason_is_on_top_of_page_and_terminal(tmp_path: Path) -> None:
    folder = run_toy(tmp_path / "run", n_units=1, wrong=0.7)
    page = (folder.path / "report.html").read_text("utf-8")
    assert 0 < page.index("It takes back: rises.") < page.index('<ul class="headlines">')
    assert page.index("Because: the control &#39;nothing is wrong&#39; failed.") > 0
    lines = report_lines(read_report(folder))
    assert lines[0] == "Failed controls:"
    assert lines[1].startswith("  nothing is wrong: Found")
    assert lines[2].startswith("not established: It rises. Because: the control")
    assert list(folder.read_table("controls").verdict) == [FAIL, SKIPPED]
    assert not folder.read_table("findings").established.any()


@pytest.mark.parametrize(
    ("off", "passed"),
    [([0.1, -0.5], True), ([0.1, -0.6], False), ([0.1, np.nan], False), ([], None)],
)
def test_differences_must_be_small_and_known(off: list[float], passed: bool | None) -> None:
    assert at_most(off, 0.5).passed is passed


def test_declarations_name_tables_that_there_are() -> None:
    def judge(run: Any) -> None: ...

    with pytest.raises(InputError, match=r"Odd: got claim 'x' names dleta; .* delta, odd"):

        class Odd(Toy):
            claims = (Claim(name="x", rests_on=("dleta",), judge=judge),)

    with pytest.raises(InputError, match="claim 'x' names no table"):

        class Odder(Toy):
            claims = (Claim(name="x", rests_on=(), judge=judge),)


def test_undeclared_rows_and_units_out_of_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "measure", lambda self, unit: UnitResult({"dleta": [{}]}))
    with pytest.raises(InputError, match="zh_sad_0: got rows of dleta, expected .* delta, odd"):
        run_toy(tmp_path / "a", n_units=1)
    monkeypatch.setattr(Toy, "units", lambda self: [Unit("b", after="a"), Unit("a")])
    with pytest.raises(InputError, match=r"got b before what it comes after \(a\)"):
        run_toy(tmp_path / "b", n_units=1)
