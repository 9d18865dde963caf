"""What reports say where too few units are resampled for an interval."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hooked_alm.experiments.workbench import figures
from hooked_alm.experiments.workbench.claims import shown
from hooked_alm.experiments.workbench.intervals import HOW_MADE, NOT_DRAWN, Draws
from hooked_alm.experiments.workbench.page import Page
from hooked_alm.experiments.workbench.report import Figure
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.statistics.bootstrap import COVERAGE, MIN_UNITS


@pytest.mark.parametrize("draw", [figures.curves, figures.bars])
@pytest.mark.parametrize("n", [MIN_UNITS - 1, MIN_UNITS])
def test_a_missing_interval_is_said_and_not_drawn(tmp_path: Path, draw: object, n: int) -> None:
    values = np.random.default_rng(0).normal(size=(2 * n, 3))
    rows = Draws(0, 1000).points(values, [i // 2 for i in range(2 * n)])
    table = pd.DataFrame(rows).assign(depth=range(3))
    page = Page(RunFolder(tmp_path))
    page.section("Curves")
    page.figure("curves", draw(table, "depth"), table, "A curve", "Read it.")  # type: ignore[operator]
    (item,) = page.sections[0].items
    assert isinstance(item, Figure)
    is_known = n == MIN_UNITS
    assert (NOT_DRAWN in item.how_to_read) is not is_known
    assert ("(no interval)" in shown(rows[0])) is not is_known
    assert rows[0]["n_clusters"] == n


def test_reports_say_what_was_measured() -> None:
    for n, (mean, curve) in COVERAGE.items():
        assert f"{100 * mean:.0f} % ({100 * curve:.0f} %) with {n}" in HOW_MADE
    assert f"Fewer than {MIN_UNITS} units" in HOW_MADE


def test_the_best_point_is_ahead_of_the_nearest_and_surely_of_all() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 1)) + np.array([0.0, 3.0, 1.0]) + 0.1 * rng.normal(size=(20, 3))
    draws, clips = Draws(0, 1000), [*range(20)]
    best, means = draws.best(values, clips), values.mean(axis=0)
    assert (best.at, best.next) == (1, 2)
    assert best.lead == pytest.approx(means[1] - means[2])
    assert 1.8 < best.lead_low < best.lead
    # What all points share is no doubt about a lead: it is of differences.
    assert draws.row(values[:, 1], clips)["low"] < means[1] - 0.3
    alone = draws.best(values[:, :1], clips)
    assert (alone.at, alone.next) == (0, None)
    assert np.isnan([alone.lead, alone.lead_low]).all()
