"""What a run's record says of its model: enough to tell the weights apart, all of them."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperFeatureExtractor

from all_cases import CASES as ALL_CASES
from cases import kimi_audio
from cases.ultravox import CASES
from hooked_alm import HookedALM
from hooked_alm.converters.loading import lay_out
from hooked_alm.errors import InputError
from hooked_alm.experiments.grounding.experiment import Grounding
from hooked_alm.experiments.grounding.settings import GroundingConfig
from hooked_alm.experiments.materials.subject import (
    WEIGHT_FILES,
    described,
    weights_of,
)
from hooked_alm.experiments.workbench.experiment import ExperimentConfig
from hooked_alm.experiments.workbench.identity import differences
from hooked_alm.experiments.workbench.run_folder import RunFolder
from tiny import TinyModels, build_tokenizer


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def record(folder: Path, **settings: object) -> dict[str, object]:
    config = ExperimentConfig(model=str(folder), **settings)
    return described(laid_out(config), config)


def laid_out(config: ExperimentConfig) -> HookedALM:
    components = dict(config.components)
    return lay_out(config.model, components=components, lora=config.lora).model


def test_a_model_whose_prompts_need_another_model_is_refused_by_name(tmp_path: Path) -> None:
    """No processor file makes Kimi-Audio's codes; with all of them, prompts would lack a stream."""
    kimi_audio.CASES[0].save(tmp_path, torch.float32)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path)
    config = GroundingConfig(model=str(tmp_path))
    with pytest.raises(InputError, match=r"running grounding on .* codes of Kimi-Audio come from"):
        Grounding(config).lay_out(hears=True)
    model = laid_out(config)
    assert model.tokenizer is not None
    with pytest.raises(InputError, match=r"preparing a prompt .* give them to `encode`"):
        model.prepare(None, "What is it?")


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


# --- Every file that decides the numbers


def with_a_space(path: Path) -> None:
    """A change that leaves everything readable."""
    path.write_bytes(path.read_bytes() + b" ")


def test_a_run_goes_on_only_with_the_same_files(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Each file in turn: the folder of the run refuses, and says which one it is."""
    folder = shutil.copytree(tiny_models.folder(), tmp_path / "model")
    config = ExperimentConfig(model=str(folder))
    model = laid_out(config)
    templates = "additional_chat_templates/a.jinja"
    for name in ("vocab.json", "merges.txt", "tokenizer.model", templates):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    run = RunFolder(tmp_path / "run")

    def made_with() -> dict[str, Any]:
        return {"inputs": {"model": described(model, config)}}

    rest = {"experiment": "", "config": {}, "environment": {}}
    run.write_json("run.json", {**made_with(), **rest})
    assert run.check(made_with())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", templates} < names
    for name in sorted(names):
        before = (folder / name).read_bytes()
        with_a_space(folder / name)
        key = "weights_sha256" if name.endswith(".safetensors") else f"files.{name}"
        with pytest.raises(InputError, match=rf"a different inputs\.model\.{re.escape(key)} \("):
            run.check(made_with())
        (folder / name).write_bytes(before)
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(InputError, match=r"files\.added_tokens\.json \(now .*folder nothing"):
        run.check(made_with())


def test_a_changed_rope_is_another_run(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_models.folder(), tmp_path / "model")
    before = record(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"rope_theta": 77.0}
    (folder / "config.json").write_text(json.dumps(config))
    after = record(folder)
    assert [line.split(" ")[0] for line in differences(after, before)] == ["files.config.json"]


OPENED: list[str] = []
IS_WATCHED = [False]


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and IS_WATCHED[0] and isinstance(arguments[0], str | Path):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_watch)  # cannot be taken back: it does nothing until it is asked to


@pytest.mark.parametrize("name", ["SALMONN", "Ultravox 0.4", "Granite"])
def test_whatever_loading_reads_is_known_by_its_hash(tmp_path: Path, name: str) -> None:
    """Of every kind of checkpoint, parts too, for which the system is asked what was opened."""
    case = next(case for key, case in ALL_CASES.items() if key.startswith(name))
    folder = tmp_path / "model"
    folder.mkdir()
    case.save(folder, torch.float32)
    parts = case.components(folder)
    OPENED.clear()
    IS_WATCHED[0] = True
    try:
        found = record(folder, components=parts)
    finally:
        IS_WATCHED[0] = False
    known = {str(folder / file) for file in found["files"]}  # type: ignore[attr-defined]
    for part, where in parts.items():
        files = [file for file in found["files"] if file.startswith(f"{part}/")]  # type: ignore[attr-defined]
        known |= {str(Path(where) / file.removeprefix(f"{part}/")) for file in files}
    roots = (str(folder), *map(str, parts.values()))
    read = {one for one in OPENED if one.startswith(roots) and Path(one).is_file()}
    assert {one for one in read if Path(one).suffix not in WEIGHT_FILES} - known == set()
    assert known & read
