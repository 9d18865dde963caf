"""The demonstration: what reverses between the twins, what it prints, when it fails."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from emotion_toy import INPUTS, Side, toy_recordings, toy_sounds, toy_tables
from hooked_alm.experiments.emotion_conflict import demo
from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.emotion_conflict.truths import TRUTHS
from hooked_alm.experiments.workbench.conclude import conclude
from hooked_alm.experiments.workbench.report import read_report
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.runner import _start
from hooked_alm.experiments.workbench.truths import TruthRow, compared

N_CLIPS = 10


def finished_run(path: Path, side: Side) -> RunFolder:
    """A run folder as the runner leaves it, from hand-made tables."""
    config = EmotionConflictConfig(model=f"bundled:follows_{side}", n_resamples=1000)
    folder, tables = RunFolder(path), toy_tables(config, side, n_clips=N_CLIPS)
    path.mkdir(parents=True)
    experiment = EmotionConflict(config)
    experiment.folder = folder
    made_with = {
        "experiment": experiment.name,
        "source": experiment.source(),
        "schema_version": experiment.schema_version,
        "config": config.model_dump(mode="json"),
        "inputs": {"model": {"weights_sha256": side}},
    }
    # The record is the runner's own, of which the demonstration reads some.
    _start(experiment, folder, made_with, device=None)
    experiment.recordings = toy_recordings(path / "audio", N_CLIPS)
    tables |= toy_sounds(experiment.recordings)
    for name, table in tables.items():
        folder.write_table(name, table)
    # The page of each run is not what is tested here.
    with pytest.MonkeyPatch().context() as patched:
        patched.setattr(EmotionConflict, "page", lambda self, page, run: page.section("Empty"))
        conclude(experiment, INPUTS, tables, folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    out = tmp_path_factory.mktemp("demo")
    sides: dict[str, Side] = {"follows_text": "text", "follows_voice": "voice"}
    return {name: finished_run(out / name, side) for name, side in sides.items()}


class Edited(RunFolder):
    """A run with other tables in the place of some."""

    def __init__(self, run: RunFolder, **tables: pd.DataFrame) -> None:
        super().__init__(run.path)
        self.tables = tables

    def read_table(self, name: str) -> pd.DataFrame:
        return self.tables[name] if name in self.tables else super().read_table(name)


def rows_of(runs: dict[str, RunFolder]) -> list[TruthRow]:
    return [*compared(TRUTHS, runs)]


def holding(rows: list[TruthRow]) -> set[str]:
    return {row.claim for row in rows if row.holds}


def test_opposite_rules_reverse_what_they_should(runs: dict[str, RunFolder]) -> None:
    rows = rows_of(runs)
    assert holding(rows) == {row.claim for row in rows}
    assert {row.expectation for row in rows} == {"reverses", "stays"}


def test_the_same_rule_reverses_nothing(runs: dict[str, RunFolder]) -> None:
    rows = rows_of(dict.fromkeys(runs, runs["follows_text"]))
    assert holding(rows) == {row.claim for row in rows if row.expectation == "stays"}


def test_an_unsure_estimate_holds_nothing(runs: dict[str, RunFolder]) -> None:
    findings = runs["follows_voice"].read_table("findings")
    findings.loc[findings.claim == "H2_dominance", "high"] = 0.5
    rows = rows_of({**runs, "follows_voice": Edited(runs["follows_voice"], findings=findings)})
    assert holding(rows) == {row.claim for row in rows} - {"H2, TE(text) − TE(voice) (logits)"}


def test_a_failed_control_does_not_stay(runs: dict[str, RunFolder]) -> None:
    controls = runs["follows_voice"].read_table("controls")
    controls.loc[3, "verdict"] = "FAIL"
    row = rows_of({**runs, "follows_voice": Edited(runs["follows_voice"], controls=controls)})[-1]
    assert not row.holds
    assert [*row.found.values()] == ["none fails", "a run patched with itself"]


@pytest.mark.parametrize("is_equal", [True, False])
def test_it_prints_in_order_and_fails_with_verify(
    runs: dict[str, RunFolder],
    is_equal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def verify(model: str) -> SimpleNamespace:
        is_fine = is_equal or model.endswith("follows_text")
        verdict = "bit-identical to HF: " + ("yes" if is_fine else "no (first at depth 3)")
        return SimpleNamespace(passed=is_fine, verdict=lambda: verdict)

    out = runs["follows_text"].path.parent
    monkeypatch.setattr(demo, "_run", lambda name, out: runs[name])
    monkeypatch.setattr(demo.parity, "verify", verify)
    if is_equal:
        demo.main(out)
    else:
        with pytest.raises(SystemExit) as stop:
            demo.main(out)
        assert stop.value.code == 1
    printed = capsys.readouterr().out
    expected = [
        "bit-identical to HF: yes  (bundled:follows_text)",
        "bit-identical to HF: " + ("yes" if is_equal else "no (first at depth 3)"),
        *("In conflict the answer follows the instruction.", "The text dominates the voice."),
        *("In conflict the answer follows the voice.", "The voice dominates the text."),
        *("Reverses between the two models", "  yes  answers T in conflict", "Stays the same"),
        *("follows_text/report.html", "follows_voice/report.html", "comparison/report.html"),
    ]
    places = [printed.find(text) for text in expected]
    assert -1 not in places, expected[places.index(-1)]
    assert places == sorted(places)


def test_the_comparison_page_names_both_runs(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    verdicts = dict.fromkeys(demo.TWINS, "bit-identical to HF: yes")
    folder = RunFolder(tmp_path / "comparison")
    page = demo.write_comparison(folder, runs, rows_of(runs), verdicts)
    text = page.read_text("utf-8")
    for expected in ("../follows_text/report.html", "../follows_voice/report.html", "Calibration"):
        assert expected in text
    report = read_report(folder)
    assert all(line.established for line in report.headlines)
    assert [line.text for line in report.headlines] == [
        "4 of 4 conclusions about arbitration reverse.",
        "5 of 5 other measurements stay the same.",
    ]
    # Written again into the same folder, as a second demo does.
    again = demo.write_comparison(folder, runs, rows_of(runs), verdicts)
    assert again.read_text("utf-8") == text
