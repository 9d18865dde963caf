"""Twins whose circles rest on one head: the run names it, and the kind of its attention."""

import pytest

from hooked_alm.experiments.asr_components.experiment import AsrComponents
from hooked_alm.experiments.asr_components.truths import TRUTHS
from hooked_alm.experiments.workbench.truth_runs import run_truths
from hooked_alm.experiments.workbench.truths import TruthRow

SETTINGS = {"scopes": ("cell",), "n_exact": 2, "n_random": 0, "n_resamples": 1000}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[TruthRow]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AsrComponents, "page", lambda self, page, run: None)
        return run_truths(AsrComponents, tmp_path_factory.mktemp("truths"), SETTINGS)


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.claim)
def test_a_truth_comes_out(rows: list[TruthRow], truth: object) -> None:
    row = rows[TRUTHS.index(truth)]
    assert row.holds, row.line()
    assert len({*row.found.values()}) == 3  # none of the models passes for another
