"""Models whose depths or routes are known: every truth comes out, and reverses where it must."""

import pytest

from hooked_alm.experiments.attribute_lens.experiment import AttributeLens
from hooked_alm.experiments.attribute_lens.truths import TRUTHS
from hooked_alm.experiments.workbench.truth_runs import run_truths
from hooked_alm.experiments.workbench.truths import TruthRow

SETTINGS = {
    "batch_size": 18, "n_resamples": 1000, "prompts": ("question",), "window": 10,
    "absences": False, "enrich_modes": ("add",), "enrich_sources": (1,), "enrich_layers": (8,),
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[TruthRow]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AttributeLens, "page", lambda self, page, run: None)
        return run_truths(AttributeLens, tmp_path_factory.mktemp("truths"), SETTINGS)


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.claim)
def test_a_truth_comes_out(rows: list[TruthRow], truth: object) -> None:
    row = rows[TRUTHS.index(truth)]
    assert row.holds, row.line()


def test_no_model_passes_for_another(rows: list[TruthRow]) -> None:
    """What must reverse between two models does not hold of both."""
    for row in rows:
        ranges = {*map(str, row.known.values())}
        if len(ranges) > 1:
            found = {
                value if isinstance(value, str) else round(value, 3) for value in row.found.values()
            }
            assert len(found) > 1, row.line()
