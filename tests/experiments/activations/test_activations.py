"""``activations`` as a run and as a command: rows, resuming, sizes, and every bad input."""

import csv
import itertools
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations_verdicts import cases
from circuits_toy import write_tones
from hooked_alm import ActivationReader, HookedALM
from hooked_alm.errors import HookedALMError, InputError
from hooked_alm.experiments import cli
from hooked_alm.experiments.activations.experiment import StoreActivations
from hooked_alm.experiments.activations.settings import ActivationsConfig
from hooked_alm.experiments.activations.tables import label_table
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.activations import store
from stopped_runs import kill, needs_kill, results, run_experiment, start, wait_for
from tiny import TinyModels
from whisper_toy import Whispers

pytestmark = pytest.mark.usefixtures("small_figures")

RESID, ENCODED = "blocks.2.hook_resid_post", "audio.encoder.blocks.1.hook_resid_post"
SPEAKERS = ("anna", "ben", "anna", "carla", "ben")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of three speakers."""
    folder = tmp_path_factory.mktemp("clips")
    names = write_tones(folder, len(SPEAKERS))
    with (folder / "clips.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "speaker", "pitch", "duration_s"])
        writer.writerows((*row, "high", 9) for row in zip(names, SPEAKERS, strict=True))
    return folder / "clips.csv"


def settings(tiny_models: TinyModels, manifest: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(tiny_models.folder()), "audio": str(manifest), "points": [RESID, ENCODED],
        "spans": ["audio", "readout"], "store_dtype": "float16", "batch_size": 2,
        "unit_batches": 1, "n_threads": 1, "n_resamples": 1000, **changes,
    }  # fmt: skip


@pytest.fixture
def toy(tiny_models: TinyModels, manifest: Path) -> StoreActivations:
    return StoreActivations(ActivationsConfig(**settings(tiny_models, manifest)))


@pytest.fixture(scope="module")
def finished(
    tiny_models: TinyModels, manifest: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    experiment = StoreActivations(ActivationsConfig(**settings(tiny_models, manifest)))
    return runner.run(experiment, tmp_path_factory.mktemp("run") / "run")


# --- What a run leaves


def test_rows_are_those_of_the_same_batches(
    finished: RunFolder, manifest: Path, gqa: HookedALM
) -> None:
    prompt = ActivationReader(finished.path / "activations/prompt")
    encoder = ActivationReader(finished.path / "activations/encoder")
    clips = [manifest.parent / f"tone{i}.wav" for i in range(5)]
    decoded, encoded = [], []
    for batch in (clips[:2], clips[2:4], clips[4:]):
        x = gqa.prepare([str(one) for one in batch], "What do you hear?")
        _, cache = gqa.run_with_cache(x, names_filter=[RESID, ENCODED])
        decoded.append(cache[RESID][x.spans.mask("audio", "readout")])
        encoded.append(cache[ENCODED][:, :20].flatten(0, 1))
    assert torch.equal(prompt.read(RESID, range(len(prompt))), torch.cat(decoded).half())
    assert torch.equal(encoder.read(ENCODED, range(len(encoder))), torch.cat(encoded).half())
    assert len(encoder.card.shards) == 3
    for reader in (prompt, encoder):
        reader.check()
        assert reader.columns[-2:] == ["speaker", "pitch"], "not what a table computes"
        of_clip = dict(zip((f"tone{i}" for i in range(5)), SPEAKERS, strict=True))
        said = zip(reader.column("clip"), reader.column("speaker"), strict=True)
        assert {*said} == {*of_clip.items()}
        assert {*zip(reader.column("prompt"), reader.column("clip"), strict=True)} == {
            (i, f"tone{i}") for i in range(5)
        }
        train, held_out = reader.split("speaker", 0.3)
        assert len({*reader.column("speaker")[held_out]}) == 1
        assert len(train) + len(held_out) == len(reader)


def test_its_tables_and_its_page(finished: RunFolder) -> None:
    stores = finished.read_table("stores").set_index("kind")
    assert stores.rows.to_dict() == {"prompt": 5 * 11, "encoder": 5 * 20}
    for kind in ("prompt", "encoder"):
        folder = finished.path / "activations" / kind
        assert stores.folder[kind] == f"activations/{kind}"
        assert stores.bytes[kind] == sum(p.stat().st_size for p in (folder / "shards").iterdir())
    spans = finished.read_table("spans")
    assert {(r.kind, r.span): r.rows for r in spans.itertuples()} == {
        ("prompt", "audio"): 50, ("prompt", "readout"): 5, ("encoder", "audio"): 100,
    }  # fmt: skip
    labels = finished.read_table("labels")
    said = labels[(labels.kind == "encoder") & (labels.column == "speaker")]
    assert {r.value: (r.clips, r.rows) for r in said.itertuples()} == {
        "anna": (2, 40), "ben": (2, 40), "carla": (1, 20),
    }  # fmt: skip
    assert set(finished.read_table("controls").verdict) == {"pass"}
    page = (finished.path / "report.html").read_text("utf-8")
    for words in ("What is stored", RESID, "Neighbours are alike", "activations/encoder"):
        assert words in page


def test_the_size_is_told_before_anything_runs(
    toy: StoreActivations, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a weight, and never too small."""
    monkeypatch.setattr(HookedALM, "from_pretrained", None)
    plan = toy.planned()
    stores = finished.read_table("stores").set_index("kind")
    assert {kind: plan.n_rows(kind) for kind in plan.kinds} == stores.rows.to_dict()
    told = plan.n_bytes(range(len(plan.shards)))
    assert stores.bytes.sum() < told
    values = 55 * 54 * 2 + 100 * 24 * 2
    assert told < values + 155 * 24 + 6 * 20_000
    *lines, last = plan.lines()
    assert lines[0] == f"encoder: 100 rows of 1 points ({ENCODED}), 48 bytes a row in float16"
    assert last.startswith("5 clips in 3 shards: about ")


def test_labels_of_clips_without_a_table_are_none() -> None:
    run = cases()
    run.inputs["labels"].clear()  # type: ignore[attr-defined]
    assert label_table(run).empty


def test_the_dtype_is_the_runs_own_if_none_is_given(
    tiny_models: TinyModels, manifest: Path, tmp_path: Path, gqa: HookedALM
) -> None:
    config = settings(tiny_models, manifest, store_dtype=None, spans=["readout"], points=[RESID])
    folder = runner.run(StoreActivations(ActivationsConfig(**config)), tmp_path / "run")
    reader = ActivationReader(folder.path / "activations/prompt")
    assert reader.card.contents.dtype == "float32"
    x = gqa.prepare([str(manifest.parent / f"tone{i}.wav") for i in (0, 1)], "What do you hear?")
    expected = gqa.run_with_cache(x, names_filter=RESID)[1][RESID][:, -1]
    assert torch.equal(reader.read(RESID, [0, 1]), expected)


def test_whisper(whispers: Whispers, manifest: Path, tmp_path: Path) -> None:
    """Without an instruction, in a language that is given or heard."""
    config = ActivationsConfig(
        model=str(whispers.folder()), audio=str(manifest), batch_size=3, unit_batches=2,
        points=["audio.encoder.blocks.{0,2}.hook_resid_post", "blocks.1.cross_attn.hook_z"],
        spans=["audio", "readout"], language="en", n_threads=1,
    )  # fmt: skip
    folder = runner.run(StoreActivations(config), tmp_path / "run")
    assert set(folder.read_table("controls").verdict) == {"pass"}
    encoder = ActivationReader(folder.path / "activations/encoder")
    assert encoder.points == [f"audio.encoder.blocks.{i}.hook_resid_post" for i in (0, 2)]
    assert len(encoder) == 5 * 20
    prompt = ActivationReader(folder.path / "activations/prompt")
    assert prompt.column("span").tolist() == ["readout"] * 5
    model = whispers.hooked()
    x = model.prepare([str(manifest.parent / f"tone{i}.wav") for i in range(3)], language="en")
    _, cache = model.run_with_cache(x, names_filter="blocks.1.cross_attn.hook_z")
    found = prompt.read("blocks.1.cross_attn.hook_z", [0, 1, 2])
    assert torch.equal(found, cache["blocks.1.cross_attn.hook_z"][:, -1].flatten(1))


# --- Killed and resumed


class Killed(BaseException):
    """What a process that is gone would not do."""


@pytest.mark.parametrize("stop", [6, 14])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    finished: RunFolder, toy: StoreActivations, tmp_path: Path, stop: int,
    tiny_models: TinyModels, manifest: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Between the files of a shard, between shard and unit, and while the stores are finished."""
    write, calls = store.write_atomic, itertools.count(1)

    def stopping(path: Path, *parts: Any) -> None:
        if next(calls) == stop:
            raise Killed
        write(path, *parts)

    monkeypatch.setattr(store, "write_atomic", stopping)
    with pytest.raises(Killed):
        runner.run(toy, tmp_path / "run")
    monkeypatch.setattr(store, "write_atomic", write)
    again = StoreActivations(ActivationsConfig(**settings(tiny_models, manifest)))
    runner.run(again, tmp_path / "run")
    assert results(tmp_path / "run") == results(finished.path)


@needs_kill
def test_kill(finished: RunFolder, tmp_path: Path, tiny_models: TinyModels, manifest: Path) -> None:
    given, out = settings(tiny_models, manifest), tmp_path / "run"
    process = start(run_experiment, "activations", out, **given)
    wait_for(lambda: (out / "activations/prompt/shards/00000.parquet").exists())
    kill(process)
    assert not (out / "report.json").exists()
    runner.run(StoreActivations(ActivationsConfig(**given)), out)
    names = results(finished.path).keys()
    assert results(out).keys() == names
    free = {name for name in names if name.startswith("figures/")}
    for name in names - free:
        assert results(out)[name] == results(finished.path)[name], name


def test_a_damaged_shard_of_a_finished_unit_is_refused_by_name(
    finished: RunFolder, toy: StoreActivations, tmp_path: Path,
    tiny_models: TinyModels, manifest: Path,
) -> None:  # fmt: skip
    """Before anything runs; and the cure that it names is one."""
    shutil.copytree(finished.path, out := tmp_path / "run")
    damaged = out / "activations/encoder/shards" / (name := "00001.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-3])
    message = rf"{name}: .* damaged.* Delete .*units/shard__00001\.json, too"
    with pytest.raises(InputError, match=message):
        runner.run(toy, out)
    damaged.with_suffix(".parquet").unlink()
    (out / "units/shard__00001.json").unlink()
    runner.run(StoreActivations(ActivationsConfig(**settings(tiny_models, manifest))), out)
    assert results(out) == results(finished.path)


# --- The command


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["hooked-alm", "activations", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code


def words(tiny_models: TinyModels, manifest: Path, out: Path) -> list[object]:
    return [
        "--points", f"blocks.{{2,}}.hook_resid_post,{ENCODED}".replace(",}", "}"),
        "--spans", "audio,readout", "--manifest", manifest, "--model", tiny_models.folder(),
        "--out", out, "-s", "store_dtype=float16", "-s", "batch_size=2", "-s",
        "unit_batches=1", "-s", "n_threads=1", "-s", "n_resamples=1000",
    ]  # fmt: skip


def test_the_command_is_the_experiment(
    finished: RunFolder, tiny_models: TinyModels, manifest: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "run"
    command(monkeypatch, *words(tiny_models, manifest, out), "--dry-run")
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("5 clips in 3 shards: about ")
    assert not out.exists()
    command(monkeypatch, *words(tiny_models, manifest, out))
    said = capsys.readouterr().out.splitlines()
    assert said[: len(told)] == told
    assert said[-3:] == [
        str(out / name) for name in ("activations/encoder", "activations/prompt", "report.html")
    ]
    mine, theirs = (
        {name: data for name, data in results(path).items() if name.startswith("activations")}
        for path in (out, finished.path)
    )
    assert mine == theirs


def test_a_disk_without_room_is_refused(
    toy: StoreActivations, finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded; what is there already needs none."""
    needed = toy.planned().n_bytes(range(3))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    toy.check_room(tmp_path / "run", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    toy.check_room(tmp_path / "run", (1, 3))  # a shard of the run needs less
    message = r"storing activations in .*run: got a disk with .* free, expected .* for 3 shards"
    with pytest.raises(InputError, match=message):
        toy.check_room(tmp_path / "run", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0))
    toy.check_room(finished.path, None)
    assert not (tmp_path / "run").exists()


# --- Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": ["blocks.0.hook_resid_pst"]}, "Nearest: blocks.0.hook_resid_post"),
        ({"points": ["blocks.*.attn.hook_pattern"]}, "it has two axes of positions"),
        ({"points": ["hook_audio_embed"]}, "its axes are clip audio_pos"),
        ({"spans": ["word"]}, "clips.csv line 2: choosing spans: got word, expected some of all"),
        ({"spans": ["padding"], "points": [ENCODED]}, "choosing spans of|choosing spans: got padd"),
        ({"audio": "/nowhere"}, "loading clips from /nowhere: got no audio files"),
        ({"model": "/nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tiny_models: TinyModels, manifest: Path, tmp_path: Path, changes: Any, message: str
) -> None:
    config = ActivationsConfig(**settings(tiny_models, manifest, **changes))
    with pytest.raises(HookedALMError, match=message):
        runner.run(StoreActivations(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_table_whose_columns_are_the_index_own(
    tiny_models: TinyModels, manifest: Path, tmp_path: Path
) -> None:
    table = manifest.with_name("own.csv")
    table.write_text(manifest.read_text("utf-8").replace("pitch", "span"), "utf-8")
    config = ActivationsConfig(**settings(tiny_models, table))
    with pytest.raises(InputError, match=r"got the columns span, expected other names"):
        runner.run(StoreActivations(config), tmp_path / "run")


def test_a_model_without_ears(tiny_models: TinyModels, manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_models.folder() / name, folder)
    config = ActivationsConfig(**settings(tiny_models, manifest, model=str(folder)))
    with pytest.raises(InputError, match="has no audio front-end, or its folder no processor"):
        StoreActivations(config).planned()


def test_a_folder_of_clips_needs_no_table(
    tiny_models: TinyModels, manifest: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(3):
        shutil.copy(manifest.parent / f"tone{i}.wav", folder)
    config = ActivationsConfig(**settings(tiny_models, folder, points=[RESID], batch_size=4))
    run = runner.run(StoreActivations(config), tmp_path / "run")
    reader = ActivationReader(run.path / "activations/prompt")
    assert reader.columns == ["clip", "prompt", "position", "seconds", "span"]
    assert np.unique(reader.column("clip").astype(str)).tolist() == ["tone0", "tone1", "tone2"]
    assert json.loads((run.path / "run.json").read_text("utf-8"))["inputs"]["labels"] == {}


def test_bad_patterns_are_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="a brace without its other"):
        ActivationsConfig(points=["blocks.{0.hook_resid_post"])
