"""Truths: every model must give what is known of it, and a line says what it gave."""

from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from hooked_alm.experiments.cli import app
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.truth_runs import run_truths
from hooked_alm.experiments.workbench.truths import Between, Estimate, Truth, TruthRow, compared
from workbench_toy import Toy


def model_of(folder: RunFolder) -> str:
    return str(folder.provenance["config"]["model"])


def least(folder: RunFolder) -> float:
    return float(folder.read_table("mean")["mean"].min())


class Known(Toy):
    """What it finds does not depend on the model, but for its name."""

    truths: ClassVar = (
        Truth(
            claim="its name",
            find=model_of,
            known={name: f"bundled:{name}" for name in ("follows_text", "follows_voice")},
        ),
        Truth(
            claim="the least mean",
            find=least,
            known={"follows_text": Between(low=0.5), "follows_voice": Between(high=0.5)},
        ),
        Truth(
            claim="something that is not there",
            find=lambda folder: float("nan"),
            known={"follows_text": Between()},
        ),
    )
    truth_settings: ClassVar = {"n_units": 2, "n_resamples": 1000}


def test_a_truth_holds_where_every_model_gives_what_is_known(tmp_path: Path) -> None:
    names, least_mean, missing = run_truths(Known, tmp_path)
    assert names.holds
    assert names.found == {one: f"bundled:{one}" for one in ("follows_text", "follows_voice")}
    # The same number in both models cannot be on both sides.
    assert not least_mean.holds
    assert least_mean.found["follows_text"] == least_mean.found["follows_voice"] > 0
    assert not missing.holds  # NaN is in no range
    assert {path.name for path in tmp_path.iterdir()} == {"follows_text", "follows_voice"}
    before = Toy.n_run
    assert run_truths(Known, tmp_path)[0] == names
    assert before == Toy.n_run


def test_a_line_says_what_was_found_and_what_is_known() -> None:
    known = {"base": Between(high=0.3), "twin": Between(0.9, 1), "other": "head 2.0"}
    row = TruthRow("share", {"base": 0.25, "twin": 0.951, "other": "none"}, known, holds=False)
    assert row.line() == (
        "NO   share: base 0.25 (at most 0.3) | twin 0.95 (0.9 to 1) | other none (head 2.0)"
    )
    assert str(Between(low=2)) == "at least 2"


def test_an_estimate_holds_with_all_of_its_interval(tmp_path: Path) -> None:
    known = {"base": Between(high=0.5), "twin": Between(low=0.5)}
    found = {"base": Estimate(0.2, 0.1, 0.3), "twin": Estimate(0.8, 0.6, 0.9)}
    truth = Truth(claim="share", find=lambda folder: found[folder.path.name], known=known)
    folders = {name: RunFolder(tmp_path / name) for name in known}
    (row,) = compared([truth], folders)
    assert row.holds
    assert row.expectation == "reverses"
    assert "base 0.20 [0.10, 0.30] (at most 0.5)" in row.line()
    for unsure in (Estimate(0.8, 0.4, 0.9), Estimate(0.8, float("nan"), float("nan"))):
        found["twin"] = unsure
        (row,) = compared([truth], folders)
        assert not row.holds


def test_an_experiment_without_truths_is_refused() -> None:
    result = CliRunner().invoke(app, ["truths", "activations"])
    assert result.exit_code
    with pytest.raises(Exception, match="running the truths of activations: got an experiment"):
        raise result.exception  # type: ignore[misc]
