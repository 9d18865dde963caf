"""The benchmark of what follows the measurement, at its smallest, without the figures.

Times are not tested: at this size they mean nothing.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.workbench.page import Page
from hooked_alm.experiments.workbench.results import Results

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_conclude.py"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("bench_conclude", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_conclude"] = module
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("bench_conclude")


def test_every_stage_is_measured(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def keep(_: EmotionConflict, page: Page, run: Results[Any]) -> None:
        page.section("Results")
        seen.append(run.tables)

    monkeypatch.setattr(EmotionConflict, "page", keep)
    out = tmp_path / "found.json"
    bench.main(["--clips", "30", "--blocks", "3", "--resamples", "1000", "--out", str(out)])
    (found,) = json.loads(out.read_text())
    stages = [row["stage"] for row in found["stages"]]
    assert {"summary: critical_layers", "controls and claims", "page", "render"} <= {*stages}
    assert all(row["peak_mib"] > 0 for row in found["stages"])
    assert found["report_bytes"] < 200_000
    (tables,) = seen
    assert "FAIL" not in tables["controls"].verdict.tolist(), "made up as a model would leave them"
    assert tables["findings"].set_index("claim").established["H2_dominance"]
    assert tables["runs"]["clip"].nunique() == 30
