"""Models whose depths or routes are known: every truth comes out, and reverses where it must."""

import itertools
from pathlib import Path

import pytest

from hooked_alm.experiments.attribute_lens.experiment import AttributeLens
from hooked_alm.experiments.attribute_lens.truths import TRUTHS
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.truth_runs import run_truths
from hooked_alm.experiments.workbench.truths import Truth, TruthRow, compared

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


def test_no_model_passes_for_another(rows: list[TruthRow], tmp_path: Path) -> None:
    """Where models must differ, what was found in one is not what is known of another."""
    n_swapped = 0
    for row in rows:
        for one, other in itertools.permutations(row.found, 2):
            if row.known[one] != row.known[other]:
                found, known = row.found[one], {other: row.known[other]}
                swapped = Truth(claim=row.claim, find=lambda _, found=found: found, known=known)
                [judged] = compared([swapped], {other: RunFolder(tmp_path)})
                assert not judged.holds, judged.line()
                n_swapped += 1
    assert n_swapped == 16
