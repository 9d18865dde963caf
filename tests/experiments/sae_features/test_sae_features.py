"""``sae_features`` as a run: what fires where, stopped and gone on, and bad input."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuits_toy import write_tones
from hooked_alm.bundled import DICTIONARIES, dictionary_folder
from hooked_alm.converters.dictionaries import load_dictionary, save_dictionary
from hooked_alm.errors import InputError
from hooked_alm.experiments.sae_features.experiment import SAEFeatures
from hooked_alm.experiments.sae_features.settings import SAEFeaturesConfig
from hooked_alm.experiments.sae_features.tables import (
    domain_table,
    feature_table,
    shown_features,
    strongest_clips,
)
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from sae_features_verdicts import CLIPS, N, toy_results
from stopped_runs import interrupted, results
from tiny import TinyModels

pytestmark = pytest.mark.usefixtures("small_figures")
POINT = "blocks.1.hook_resid_post"
SMALL: dict[str, Any] = {
    "n_resamples": 1000, "n_draws": 20, "domain": "pitch", "domain_clips": 2, "n_shown": 3,
    "n_clips": 2, "batch_size": 2, "unit_batches": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of two pitches."""
    folder = tmp_path_factory.mktemp("clips")
    names = write_tones(folder, 6)
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "pitch"])
        table.writerows(
            [name, "low" if number < 3 else "high"] for number, name in enumerate(names)
        )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary of the tiny model's stream, of random directions."""
    cfg = DictionaryConfig(d_in=54, d_sae=70, architecture="topk", k=5)
    rows = torch.randn(30, 54, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("dictionary") / "sae"
    save_dictionary(SparseAutoencoder.initialised(cfg, rows, 3), path, point=POINT, model="tiny")
    return path


def toy(tiny_models: TinyModels, clips: Path, folder: Path, **settings: Any) -> SAEFeatures:
    where = {"model": str(tiny_models.folder()), "audio": str(clips), "dictionary": str(folder)}
    return SAEFeatures(SAEFeaturesConfig(**{**where, **SMALL, **settings}))


@pytest.fixture(scope="module")
def finished(
    tiny_models: TinyModels, clips: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    return runner.run(toy(tiny_models, clips, folder), tmp_path_factory.mktemp("run") / "run")


@torch.no_grad()
def test_what_is_active_is_what_the_dictionary_says(
    finished: RunFolder, tiny_models: TinyModels, folder: Path, clips: Path
) -> None:
    """Clip by clip, against a run of the model with one hook, and the dictionary's own encoder."""
    model, sae = tiny_models.hooked("gqa"), load_dictionary(folder).sae
    table = finished.read_table("activity").set_index(["clip", "feature"])
    n = 0
    for path in sorted(clips.glob("*.wav")):
        x = model.prepare(str(path), "What do you hear?")
        _, cache = model.run_with_cache(x, names_filter=POINT)
        at = x.spans.positions("audio", 0)
        features = sae.encode(cache[POINT][0, at])
        for latent in features.any(0).nonzero().flatten().tolist():
            row, values = table.loc[(path.stem, latent)], features[:, latent]
            assert row["highest"] == pytest.approx(float(values.max()), rel=1e-4)
            assert row["mean"] == pytest.approx(float(values.mean()), rel=1e-4)
            assert row["share"] == pytest.approx(float((values > 0).float().mean()))
            assert row["at"] == pytest.approx(int(values.argmax()) * 0.04)
            n += 1
    assert n == len(table) > 30


def test_the_page_plays_the_strongest_clips(finished: RunFolder) -> None:
    found = results(finished.path)
    frames = finished.read_table("frames")
    assert frames["feature"].nunique() == 3
    for feature, some in frames.groupby("feature"):
        for clip in some["clip"].unique():
            assert {f"clips/{clip}.wav", f"figures/feature_{feature}__{clip}.png"} <= found.keys()
    assert set(finished.read_table("controls").verdict) == {"pass"}
    promoted = finished.read_table("promoted")
    assert len(promoted) == 3 * 5
    assert promoted.groupby("feature")["logit"].is_monotonic_decreasing.all()


@torch.no_grad()
def test_promoted_tokens(finished: RunFolder, tiny_models: TinyModels, folder: Path) -> None:
    """The direction through the final norm's weight and TransformerLens' W_U."""
    model, sae = tiny_models.hooked("gqa"), load_dictionary(folder).sae
    promoted = finished.read_table("promoted")
    feature = int(promoted["feature"][0])
    mine = promoted[promoted["feature"] == feature]
    logits = (sae.W_dec[feature] * model.head_norm.weight) @ model.W_U
    logits = logits - logits.mean()
    best = logits.topk(5)
    assert mine["token"].tolist() == [model.to_string([i]) for i in best.indices.tolist()]
    np.testing.assert_allclose(mine["logit"], best.values, rtol=1e-4)


def test_the_encoder_promotes_nothing(tiny_models: TinyModels, clips: Path, tmp_path: Path) -> None:
    point = "audio.encoder.blocks.0.hook_resid_post"
    width = tiny_models.hooked("gqa").hook_shapes()[point].rpartition("=")[2]
    cfg = DictionaryConfig(d_in=int(width), d_sae=30, architecture="topk", k=4)
    rows = torch.randn(40, int(width), generator=torch.Generator().manual_seed(0))
    sae = SparseAutoencoder.initialised(cfg, rows, 3)
    save_dictionary(sae, tmp_path / "sae", point=point, model="tiny")
    run = runner.run(toy(tiny_models, clips, tmp_path / "sae"), tmp_path / "run")
    assert run.read_table("promoted").empty
    assert set(run.read_table("controls").verdict) == {"pass"}


def test_stopped_and_in_two_processes(
    finished: RunFolder, tiny_models: TinyModels, clips: Path, folder: Path, tmp_path: Path
) -> None:
    def again() -> SAEFeatures:
        return toy(tiny_models, clips, folder)

    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(again(), [2]), tmp_path / "stopped")
    runner.run(again(), tmp_path / "stopped")
    runner.run(again(), tmp_path / "two", executor=Processes(2))
    expected = results(finished.path)
    assert results(tmp_path / "stopped") == results(tmp_path / "two") == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domain": "emotion"}, "emotion: missing, expected the clip's domain"),
        ({"point": "blocks.0.attn.hook_z"}, "of rows of width 54, expected 60"),
        ({"features": [3, 70]}, r"showing features \[70\]: the dictionary has 0 to 69"),
        ({"dictionary": "bundled:nothing_sae"}, "the package carries bundled:follows_"),
    ],
)
def test_refused(
    settings: dict[str, Any],
    message: str,
    tiny_models: TinyModels,
    clips: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=message):
        runner.run(toy(tiny_models, clips, folder, **settings), tmp_path / "run")
    assert not (tmp_path / "run/units").exists()


def test_a_file_that_does_not_say_its_point(
    tiny_models: TinyModels, clips: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "sae")
    (tmp_path / "sae/hooked_alm.json").unlink()
    text = (tmp_path / "sae/cfg.json").read_text().replace(f'"hook_name": "{POINT}",', "")
    (tmp_path / "sae/cfg.json").write_text(text)
    with pytest.raises(InputError, match="do not say of which point"):
        toy(tiny_models, clips, tmp_path / "sae").identify()


def test_summaries_by_hand() -> None:
    run = toy_results(n_sad=2, n_happy=3)
    features = feature_table(run.tables, CLIPS, run.config)
    assert features["domain"].tolist() == ["sad"] * 2 + ["happy"] * 3 + [""]
    assert features["n_clips"].tolist() == [N] * 5 + [2 * N]
    assert features["domain_share"].tolist() == [1.0] * 5 + [0.5]
    assert features["clip"].tolist() == ["c19"] * 2 + ["c39"] * 4
    domains = domain_table(run.tables, CLIPS, run.config).set_index("domain")
    assert domains["features"].to_dict() == {"happy": 3, "sad": 2}
    assert (domains["p"] == 1 / 201).all()
    assert (domains["n_features"] == 6).all()
    assert shown_features(run.tables, CLIPS, run.config) == [4, 3, 2, 1, 0, 5]
    assert strongest_clips(run.tables, 1, run.config) == ["c19", "c18", "c17", "c16"]
    named = run.config.model_copy(update={"features": (5, 11, 0)})
    assert shown_features(run.tables, CLIPS, named) == [5, 0]


def test_bundled_dictionaries_are_of_their_models() -> None:
    names = sorted(path.parent.name for path in DICTIONARIES.glob("*/cfg.json"))
    assert "follows_voice_sae" in names
    for name in names:
        stored = load_dictionary(dictionary_folder(f"bundled:{name}"))
        assert stored.about["model"] == f"bundled:{name.partition('_sae')[0]}"
        assert stored.sae.cfg.d_in == 96
        assert all(isinstance(latent, int) for latent in stored.about.get("dead", ()))
