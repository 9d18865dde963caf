"""``lora_blocks`` names the block that carries the rule, and norms do not, on the English clips."""

import shutil
from pathlib import Path

import pytest

from hooked_alm.bundled import CLIPS
from hooked_alm.experiments.lora_blocks.experiment import LoraBlocks
from hooked_alm.experiments.workbench.truth_runs import run_truths


def test_the_block_is_named_whatever_its_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraBlocks, "page", lambda self, page, run: None)
    (clips := tmp_path / "clips").mkdir()
    for path in CLIPS.glob("en_*.wav"):
        shutil.copy(path, clips)
    rows = run_truths(LoraBlocks, tmp_path / "runs", {"audio": str(clips), "n_resamples": 1000})
    assert all(row.holds for row in rows), [row.line() for row in rows]
    assert [*rows[0].found.values()] == ["block 1", "block 6"]
