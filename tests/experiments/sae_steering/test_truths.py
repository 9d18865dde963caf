"""A model that writes nothing where nothing is said: there is nothing to remove."""

import pytest

from hooked_alm.experiments.sae_steering.experiment import SAESteering
from hooked_alm.experiments.sae_steering.truths import TRUTHS
from hooked_alm.experiments.workbench.truth_runs import run_truths
from hooked_alm.experiments.workbench.truths import TruthRow

SETTINGS = {"further_alphas": (), "n_random": 1, "n_resamples": 1000, "batch_size": 36}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[TruthRow]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SAESteering, "page", lambda self, page, run: None)
        return run_truths(SAESteering, tmp_path_factory.mktemp("truths"), SETTINGS)


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.claim)
def test_a_truth_comes_out(rows: list[TruthRow], truth: object) -> None:
    row = rows[TRUTHS.index(truth)]
    assert row.holds, row.line()
