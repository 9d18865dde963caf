"""Convergence finds the planted jump by the raw norm alone, on some of the bundled clips."""

from pathlib import Path

import pytest

from hooked_alm.experiments.convergence.experiment import Convergence
from hooked_alm.experiments.materials.transcription import SPOKEN
from hooked_alm.experiments.workbench.truth_runs import run_truths


def test_a_planted_jump_is_found_by_the_raw_norm_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Convergence, "page", lambda self, page, run: None)
    (clips := tmp_path / "clips").mkdir()
    for path in sorted(SPOKEN.glob("*.ogg"))[::40]:
        (clips / path.name).symlink_to(path)
    rows = run_truths(Convergence, tmp_path / "runs", {"audio": str(clips), "n_resamples": 1000})
    assert [row.holds for row in rows] == [True, True, True]
    assert [*rows[0].found.values()] == [0, 1, 4]
