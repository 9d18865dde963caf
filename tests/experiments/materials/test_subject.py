"""What a run's record says of its model: enough to tell the weights apart, all of them."""

import hashlib
import json
import shutil
from pathlib import Path

import torch

from cases.ultravox import CASES
from hooked_alm.experiments.materials.subject import described, load_subject, weights_of
from hooked_alm.experiments.workbench.experiment import ExperimentConfig
from tiny import TinyModels


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def record(folder: Path, **settings: object) -> dict[str, object]:
    config = ExperimentConfig(model=str(folder), **settings)
    return described(load_subject(config), config)


def test_a_folder_is_known_by_its_files_and_a_snapshot_by_its_commit(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tiny_models.folder()
    found = record(folder)
    assert found["weights_sha256"] == sha256(folder / "model.safetensors")
    assert found["revision"] is None
    assert "parts" not in found
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    assert {"revision": commit, "weights_sha256": None}.items() <= record(snapshot).items()


def test_parts_that_the_checkpoint_names_itself_are_recorded(tmp_path: Path) -> None:
    """Not only those that the settings name."""
    folder = tmp_path / "model"
    folder.mkdir()
    case = next(one for one in CASES if one.name == "Ultravox 0.4")
    case.save(folder, torch.float32)
    parts = case.components(folder)
    given = record(folder, components=parts)["parts"]
    assert given == {name: weights_of(Path(part)) for name, part in parts.items()}
    assert len({part["weights_sha256"] for part in given.values()}) == 2
    config = json.loads((folder / "config.json").read_text())
    config |= {name.replace("model", "model_id"): part for name, part in parts.items()}
    (folder / "config.json").write_text(json.dumps(config))
    assert record(folder)["parts"] == given
