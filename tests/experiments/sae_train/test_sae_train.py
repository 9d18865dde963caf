"""``sae_train`` as a run: what it leaves, against its own loop, stopped and gone on, bad input."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from circuits_toy import write_tones
from hooked_alm import HookedALM
from hooked_alm.converters.dictionaries import load_dictionary
from hooked_alm.errors import InputError
from hooked_alm.experiments.materials.clip_rows import ClipRows
from hooked_alm.experiments.materials.dictionaries import PlacedDictionary
from hooked_alm.experiments.materials.dictionary_partners import stability_table
from hooked_alm.experiments.sae_train.experiment import TrainDictionaries
from hooked_alm.experiments.sae_train.settings import SAETrainConfig
from hooked_alm.experiments.sae_train.tables import recovered_table
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.intervals import Draws
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.dictionary.training import DictionaryTrainer
from sae_train_verdicts import POINT as TOY_POINT
from sae_train_verdicts import toy_results
from stopped_runs import interrupted, results
from tiny import TinyModels

pytestmark = pytest.mark.usefixtures("small_figures")
POINTS = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]
SMALL: dict[str, Any] = {
    "n_rows": 160, "step_rows": 16, "steps_per_checkpoint": 4, "n_resamples": 1000, "expansion": 2,
    "k": 3, "points": POINTS, "batch_size": 2, "max_bytes": 20_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of four speakers."""
    folder = tmp_path_factory.mktemp("clips")
    names = write_tones(folder, 8)
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "speaker"])
        table.writerows([name, f"s{number % 4}"] for number, name in enumerate(names))
    return folder


def toy(tiny_models: TinyModels, clips: Path, **settings: Any) -> TrainDictionaries:
    values = {"model": str(tiny_models.folder()), "audio": str(clips), **SMALL, **settings}
    return TrainDictionaries(SAETrainConfig(**values))


@pytest.fixture(scope="module")
def finished(
    tiny_models: TinyModels, clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    return runner.run(toy(tiny_models, clips), tmp_path_factory.mktemp("run") / "run")


def test_a_run_has_its_dictionaries_and_its_report(finished: RunFolder) -> None:
    found = results(finished.path)
    assert not [name for name in found if name.startswith("checkpoints")]
    assert set(finished.read_table("controls").verdict) == {"pass"}
    held_out = finished.provenance["inputs"]["held_out_groups"]
    assert len(held_out) == 1
    for point in POINTS:
        for seed in (0, 1):
            stored = load_dictionary(finished.path / "sae" / point / f"seed_{seed}")
            assert stored.point == point
            assert stored.about["learnt_from"] == "rows"
            assert stored.about["held_out_groups"] == held_out
            assert stored.sae.cfg.k == 3
            assert f"noise/{point}/seed_{seed}/cfg.json" in found
        assert {f"figures/partners_{point}.csv", f"figures/training_{point}.png"} <= found.keys()
    training = finished.read_table("training")
    assert training.step.max() == 9
    assert len(training) == 10 * len(POINTS) * 2 * 2


def test_the_dictionaries_are_those_of_a_plain_loop(
    finished: RunFolder, tiny_models: TinyModels, clips: Path
) -> None:
    """The same rows by hand, step by step, given to a trainer of its own."""
    one = toy(tiny_models, clips)
    one.identify()
    one.load()
    rows, config = one.rows, one.config
    mixed = rows.mixed(one.split.learnt, config.max_bytes)
    per_epoch = len(mixed) // config.step_rows
    assert per_epoch < config.n_steps  # rows are seen again
    batches: list[dict[str, torch.Tensor]] = []
    for epoch in range(config.n_steps // per_epoch + 1):
        batches += mixed.epoch(config.step_rows, seed=config.seed, epoch=epoch)
    for point in POINTS:
        trainer = DictionaryTrainer(one.shapes[point], config.training(), batches[0][point], seed=1)
        for batch in batches[: config.n_steps]:
            trainer.step(batch[point])
        stored = load_dictionary(finished.path / "sae" / point / "seed_1").sae
        for name, value in trainer.trained().named_parameters():
            assert torch.equal(value, dict(stored.named_parameters())[name])


def test_rows_are_those_of_the_clips_that_are_learnt(
    tiny_models: TinyModels, clips: Path, gqa: HookedALM
) -> None:
    one = toy(tiny_models, clips)
    one.identify()
    one.load()
    rows: ClipRows = one.rows
    split = one.split
    assert {*split.learnt, *split.held_out} == set(range(8))
    assert {split.groups[i] for i in split.learnt}.isdisjoint(split.held_out_groups)
    part = rows.parts(split.learnt)[0]
    for point, values in rows.run(part).values.items():
        expected = rows_of(gqa, rows.heard(part), point)["prompt"].values[point]
        assert torch.equal(values, expected)
        assert len(values) == rows.count(part)


@torch.no_grad()
def test_what_the_answer_loses(finished: RunFolder, tiny_models: TinyModels, clips: Path) -> None:
    """Against hooks by hand: reconstructions at the audio, and their divergence at the readout."""
    one = toy(tiny_models, clips)
    one.identify()
    one.load()
    model, rows, point = one.model, one.rows, POINTS[0]
    sae = load_dictionary(finished.path / "sae" / point / "seed_0").sae
    table = finished.read_table("recovery")
    table = table[(table.point == point) & (table.seed == 0)].set_index("clip")
    for part in rows.parts(one.split.held_out):
        x = rows.heard(part)
        mask = x.spans.mask("audio")[..., None]
        edits = {"kl": sae, "kl_zero": torch.zeros_like}
        clean = model(x)[:, -1].double().log_softmax(-1)
        for column, edit in edits.items():

            def hook(
                value: torch.Tensor, hook: object, edit: Any = edit, mask: torch.Tensor = mask
            ) -> torch.Tensor:
                return torch.where(mask, edit(value), value)

            other = model.run_with_hooks(x, fwd_hooks=[(point, hook)])[:, -1].double()
            kl = (clean.exp() * (clean - other.log_softmax(-1))).sum(-1)
            for row, clip in enumerate(part):
                found = table.loc[rows.clips[clip].name, column]
                assert found == pytest.approx(float(kl[row]), rel=1e-4, abs=1e-9)
    assert (table.kl_kept == 0).all()
    assert (table.kl_mean > 0).all()


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "matryoshka", "standard"])
def test_other_architectures(
    architecture: str, tiny_models: TinyModels, clips: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "points": [POINTS[0]], "n_dictionaries": 1, "noise": False, "n_rows": 48
    }  # fmt: skip
    settings["k"] = None if architecture == "standard" else 3
    one = toy(tiny_models, clips, architecture=architecture, **settings)
    folder = runner.run(one, tmp_path / "run")
    assert [*folder.read_table("findings").claim] == [f"recovers {POINTS[0]}"]
    stored = load_dictionary(folder.path / "sae" / POINTS[0] / "seed_0").sae
    assert stored.cfg.architecture == architecture


def test_means_over_clips(tiny_models: TinyModels, clips: Path, tmp_path: Path) -> None:
    """Mariotte's recipe: what is learnt is one row a clip, and nothing else reads such rows."""
    settings = {"recipe": "mariotte", "step_rows": 4, "n_latents": 24, "noise": False}
    one = toy(tiny_models, clips, **settings)
    folder = runner.run(one, tmp_path / "run")
    single = one.rows.of.values([2])  # type: ignore[attr-defined]
    assert one.rows.n_rows == [1] * 8
    for point, row in one.rows.values([5, 2]).items():
        assert row.shape[0] == 2
        torch.testing.assert_close(row[1], single[point].mean(0), rtol=1e-5, atol=1e-6)
    assert folder.read_table("recovered").empty
    page = (folder.path / "report.html").read_text("utf-8")
    assert "the mean over a clip is at no place of a run" in page
    assert "Means over each clip of rows" in page
    placed = PlacedDictionary.read(str(folder.path / "sae" / POINTS[0] / "seed_0"))
    assert not placed.sae.b_dec.any()
    with pytest.raises(InputError, match="a dictionary of means over whole clips"):
        placed.check(one.rows.points[0], "it")


def test_the_encoder_has_dictionaries_too(
    tiny_models: TinyModels, clips: Path, tmp_path: Path
) -> None:
    point = "audio.encoder.blocks.0.hook_resid_post"
    one = toy(tiny_models, clips, points=[point], n_dictionaries=1, noise=False, n_rows=64)
    folder = runner.run(one, tmp_path / "run")
    assert set(folder.read_table("controls").verdict) == {"pass"}
    assert load_dictionary(folder.path / "sae" / point / "seed_0").point == point


# --- Stopped, and gone on


@pytest.mark.parametrize("before", [(2,), (3, 2)])
def test_a_stopped_run_ends_with_the_same_bytes(
    before: tuple[int, ...],
    finished: RunFolder,
    tiny_models: TinyModels,
    clips: Path,
    tmp_path: Path,
) -> None:
    for stop in before:
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(toy(tiny_models, clips), [stop]), tmp_path / "run")
    runner.run(toy(tiny_models, clips), tmp_path / "run")
    assert results(tmp_path / "run") == results(finished.path)


def test_two_processes_leave_the_same_bytes(
    finished: RunFolder, tiny_models: TinyModels, clips: Path, tmp_path: Path
) -> None:
    runner.run(toy(tiny_models, clips), tmp_path / "run", executor=Processes(2))
    assert results(tmp_path / "run") == results(finished.path)


def test_a_damaged_dictionary_is_noticed(
    finished: RunFolder, tiny_models: TinyModels, clips: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    (tmp_path / "run/units/judge__001.json").unlink()
    path = tmp_path / "run/sae" / POINTS[1] / "seed_1/sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match="damaged file, expected what training has left"):
        runner.run(toy(tiny_models, clips), tmp_path / "run")


# --- Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": ["blocks.0.hook_resid_post", "audio.encoder.blocks.0.hook_resid_post"]},
         "points of the encoder and the prompt|points of the prompt and the encoder"),
        ({"points": ["blocks.9.hook_resid_post"]}, "this model has none of that name"),
        ({"spans": ["nothing"]}, "nothing"),
        ({"step_rows": 10_000}, "expected at least one step's 10000"),
        ({"group": "accent"}, "accent: missing, in 8 of 8 clips"),
        ({"k": 200}, "k=200, expected 1 to d_sae=120"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt(
    settings: dict[str, Any], message: str, tiny_models: TinyModels, clips: Path, tmp_path: Path
) -> None:
    with pytest.raises((InputError, ValueError), match=message):
        runner.run(toy(tiny_models, clips, **settings), tmp_path / "run")
    assert not (tmp_path / "run/units").exists()


def test_one_speaker_alone_is_refused(tiny_models: TinyModels, clips: Path, tmp_path: Path) -> None:
    shutil.copytree(clips, tmp_path / "clips")
    table = pd.read_csv(tmp_path / "clips/manifest.csv").assign(speaker="one")
    table.to_csv(tmp_path / "clips/manifest.csv", index=False)
    with pytest.raises(InputError, match=r"one group \(one\), expected two or more"):
        toy(tiny_models, tmp_path / "clips").identify()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_shares": [0.5]}, "prefix_shares"),
        ({"n_rows": 0}, "greater than or equal to 1"),
        ({"architecture": "standard", "k": 3}, "k=3 decides nothing of standard"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAETrainConfig(**settings)


def test_a_published_recipe() -> None:
    """AudioSAE's card: 200,000 steps at 2e-4, falling from step 160,000 on, without AuxK."""
    config = SAETrainConfig(recipe="audiosae")
    assert (config.architecture, config.k, config.shape(768).d_sae) == ("batchtopk", 50, 6144)
    plan = config.training()
    assert (plan.n_steps, plan.aux_weight) == (200_000, 0)
    rates = [plan.rate(step, 6144) for step in (1_000, 160_000, 180_000, 199_999)]
    assert rates == pytest.approx([2e-4, 2e-4, 1e-4, 5e-9])
    assert {config.provenance[name] for name in ("k", "learning_rate")} == {"card"}
    assert config.provenance["step_rows"] == "ours"
    changed = SAETrainConfig(recipe="audiosae", k=20)
    assert (changed.k, changed.provenance["k"], changed.aux_weight) == (20, "given", 0)
    assert SAETrainConfig(**changed.model_dump()) == changed
    assert SAETrainConfig().provenance == {}


def test_recipes_of_code() -> None:
    """FREUD's L1 autoencoder is tied and has no centre; Mariotte's rows are clips' means."""
    freud = SAETrainConfig(recipe="freud")
    assert freud.shape(384).k is None
    plan = freud.training()
    assert (plan.is_tied, plan.is_centred, plan.l1_weight) == (True, False, 0.2)
    assert freud.provenance == {
        "architecture": "code", "is_tied": "code", "is_centred": "code", "aux_weight": "ours",
        "l1_weight": "ours",
    }  # fmt: skip
    mariotte = SAETrainConfig(recipe="mariotte")
    assert (mariotte.pool, mariotte.shape(768).d_sae, mariotte.shape(768).k) == ("mean", 2048, 102)
    assert mariotte.training().keeps_norms is False
    assert [mariotte.training().rate(step, 2048) for step in (2_000, 62_499)] == [1e-3, 1e-3]


# --- Summaries


def test_summaries_by_hand() -> None:
    run = toy_results(found_again=0.75, kl=0.1)
    draws = Draws(0, 1000)
    stability = stability_table(run["partners"], draws).set_index(["source", "how"])
    ours = stability.loc[("rows", "matched")]
    assert ours["share"] == 0.75
    assert ours["cosine"] == pytest.approx(0.75 * 0.9 + 0.25 * 0.3)
    assert (ours["n_latents"], ours["n_pairs"]) == (48, 1)
    assert stability.loc[("noise", "matched"), "share"] == pytest.approx(2 / 48)
    found = recovered_table(run["recovery"], draws).iloc[0]
    assert found["kl"] == pytest.approx(0.1 * 1.03)
    assert found["kl_mean"] == pytest.approx(0.53)
    assert found["recovered"] == pytest.approx(1 - 0.103 / 0.53)
    assert found["n_groups"] == 7
    assert np.isfinite(found["gain_low"])
    assert found["point"] == TOY_POINT
