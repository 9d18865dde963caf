"""``sae_compare`` as a run: every quantity against its own computation, stopped, and bad input."""

import csv
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from circuits_toy import write_tones
from hooked_alm.converters.dictionaries import load_dictionary, save_dictionary
from hooked_alm.errors import InputError
from hooked_alm.experiments.sae_compare import experiment as declared
from hooked_alm.experiments.sae_compare.experiment import CompareDictionaries
from hooked_alm.experiments.sae_compare.settings import SAECompareConfig
from hooked_alm.experiments.sae_compare.tables import dictionary_table, reconstruction_table
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from hooked_alm.methods.dictionary.disentanglement import completeness, read_factors
from hooked_alm.methods.dictionary.k_sparse import Deletion, k_sparse_probe, unlearn
from hooked_alm.methods.statistics.probing import spread_folds
from sae_compare_verdicts import NAMES, toy_results
from stopped_runs import interrupted, results
from tiny import TinyModels

pytestmark = pytest.mark.usefixtures("small_figures")
POINT, OTHER = "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"
N_CLIPS = 12
SMALL: dict[str, Any] = {
    "n_resamples": 1000, "labels": ["pitch"], "ks": [1, 3], "n_random": 1, "batch_size": 4,
    "unit_batches": 1, "factors": ["size", "f0_median_hz", "duration_s"], "n_folds": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of two pitches and six speakers, with a number that one of them lacks."""
    folder = tmp_path_factory.mktemp("clips")
    names = write_tones(folder, N_CLIPS)
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "pitch", "speaker", "size"])
        for number, name in enumerate(names):
            pitch = "low" if number < N_CLIPS // 2 else "high"
            table.writerow([name, pitch, f"s{number % 6}", "" if number == 3 else 0.5 * number])
    return folder


def made(folder: Path, point: str, width: int, d_sae: int, seed: int, **about: Any) -> Path:
    """A dictionary of random directions."""
    cfg = DictionaryConfig(d_in=width, d_sae=d_sae, architecture="topk", k=5)
    rows = torch.randn(30, width, generator=torch.Generator().manual_seed(seed))
    sae = SparseAutoencoder.initialised(cfg, rows, seed)
    save_dictionary(sae, folder, point=point, model="tiny", about=about)
    return folder


@pytest.fixture(scope="module")
def run_of_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dictionaries of a point, with dictionaries of noise beside them, and one of another."""
    run = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        made(run / f"sae/{POINT}/seed_{seed}", POINT, 54, 70, 3 + seed, dead=[])
        made(run / f"noise/{POINT}/seed_{seed}", POINT, 54, 70, 13 + seed, dead=[2 + seed])
    made(run / f"sae/{OTHER}/seed_0", OTHER, 60, 40, 5, dead=[])
    return run


def listed(run: Path) -> list[Any]:
    return [
        {"path": str(run / f"sae/{POINT}/seed_0"), "name": "first"},
        {"path": str(run / f"sae/{POINT}/seed_1"), "name": "second"},
        {"path": str(run / f"sae/{OTHER}/seed_0"), "name": "of heads"},
    ]


def toy(tiny_models: TinyModels, clips: Path, run: Path, **settings: Any) -> CompareDictionaries:
    where = {"model": str(tiny_models.folder()), "audio": str(clips), "dictionaries": listed(run)}
    return CompareDictionaries(SAECompareConfig(**{**where, **SMALL, **settings}))


@pytest.fixture(scope="module")
def finished(
    tiny_models: TinyModels,
    clips: Path,
    run_of_training: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    one = toy(tiny_models, clips, run_of_training)
    return runner.run(one, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def rows(tiny_models: TinyModels, clips: Path) -> dict[str, list[torch.Tensor]]:
    """Rows of every clip at both points, from the model with one hook a point."""
    model, found = tiny_models.hooked("gqa"), {POINT: [], OTHER: []}
    for number in range(N_CLIPS):
        x = model.prepare(str(clips / f"tone{number}.wav"), "What do you hear?")
        with torch.no_grad():
            _, cache = model.run_with_cache(x, names_filter=[*found])
        for point, values in found.items():
            values.append(cache[point][0, x.spans.positions("audio", 0)].flatten(1).float())
    return found


def means(some: list[torch.Tensor]) -> np.ndarray:
    return np.stack([one.double().mean(0).numpy() for one in some])


@torch.no_grad()
def codes(rows: dict[str, list[torch.Tensor]], run: Path, seed: int) -> list[torch.Tensor]:
    sae = load_dictionary(run / f"sae/{POINT}/seed_{seed}").sae
    return [sae.encode(one) for one in rows[POINT]]


def held_out() -> tuple[np.ndarray, list[str], np.ndarray]:
    labels = np.array([0 if i >= N_CLIPS // 2 else 1 for i in range(N_CLIPS)])  # high, low
    groups = [f"s{i % 6}" for i in range(N_CLIPS)]
    return labels, groups, spread_folds(labels, groups, 3)


def test_a_run_is_whole(finished: RunFolder) -> None:
    assert set(finished.read_table("controls").verdict) == {"pass"}
    claims = [*finished.read_table("findings").claim]
    assert claims[0] == "agree: first and second"
    assert claims[1:3] == ["few: pitch off first", "deleted: pitch off first"]
    assert {"disentangled: of heads", "complete: second"} <= {*claims}
    found = results(finished.path)
    assert {"figures/partners_000.png", "figures/few_pitch__002.csv"} <= found.keys()
    table = finished.read_table("dictionaries").set_index("dictionary")
    assert [*table.index] == ["first", "second", "of heads"]
    assert np.isfinite(table[["fvu", "l0", "pitch (k = 3)", "r2"]]).all(axis=None)
    assert np.isfinite(table.partner_share).tolist() == [True, True, False]
    text = (finished.path / "report.html").read_text("utf-8")
    assert "Of other points, so that their directions are not compared: first and of heads" in text
    assert "by their files, of other models: first of tiny" in text
    assert "No dictionary of noise lies beside of heads" in text
    assert "whichever fold is held out: duration_s" in text


@torch.no_grad()
def test_quality_of_all_rows(
    finished: RunFolder, rows: dict[str, list[torch.Tensor]], run_of_training: Path
) -> None:
    x = torch.cat(rows[POINT]).double()
    sae = load_dictionary(run_of_training / f"sae/{POINT}/seed_1").sae
    features = sae.encode(x.float())
    fvu = float((x - sae.decode(features)).square().sum() / (x - x.mean(0)).square().sum())
    one = finished.read_table("quality").set_index("dictionary").loc["second"]
    table = finished.read_table("reconstruction").set_index("dictionary").loc["second"]
    dead = int((features == 0).all(0).sum())
    assert (one.n_rows, one.n_dead, table.dead) == (len(x), dead, dead)
    assert one.dead_share == pytest.approx(dead / 70)
    assert [one.fvu, table.fvu] == pytest.approx([fvu] * 2, rel=1e-4)
    l0 = float((features > 0).sum(1).double().mean())
    assert [one.l0, table.l0] == pytest.approx([l0] * 2, rel=1e-6)


@torch.no_grad()
def test_partners_and_how_they_fire(
    finished: RunFolder, rows: dict[str, list[torch.Tensor]], run_of_training: Path
) -> None:
    """A table of cosines, an assignment of SciPy's, and NumPy's correlation over all rows."""
    saes = [load_dictionary(run_of_training / f"sae/{POINT}/seed_{seed}").sae for seed in (0, 1)]
    fired = [torch.cat(codes(rows, run_of_training, seed)).numpy() for seed in (0, 1)]
    alive = [np.flatnonzero((one > 0).any(axis=0)) for one in fired]
    units = [(sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).numpy()[at]
             for sae, at in zip(saes, alive, strict=True)]  # fmt: skip
    cosines = units[0] @ units[1].T
    ours, theirs = linear_sum_assignment(-cosines)
    partners = finished.read_table("partners")
    mine = partners[partners.source == "rows"]
    matched = mine[mine.how == "matched"].set_index("latent")
    assert [*matched.index] == alive[0].tolist()
    picked = matched.loc[alive[0][ours]]
    assert picked.partner.tolist() == alive[1][theirs].tolist()
    np.testing.assert_allclose(picked.cosine, cosines[ours, theirs], atol=1e-5)
    greedy = mine[mine.how == "greedy"].set_index("latent")
    np.testing.assert_allclose(greedy.cosine, cosines.max(axis=1), atol=1e-5)
    correlated = finished.read_table("correlations").set_index("latent")
    assert len(correlated) == len(ours)
    for a, b in list(zip(alive[0][ours], alive[1][theirs], strict=True))[:10]:
        expected = np.corrcoef(fired[0][:, a], fired[1][:, b])[0, 1]
        assert correlated.correlation[a] == pytest.approx(expected, abs=1e-4)
    table = finished.read_table("stability").set_index(["source", "how"])
    assert table.cosine["rows", "matched"] == pytest.approx(cosines[ours, theirs].sum() / len(ours))
    assert table.correlation["rows", "matched"] == pytest.approx(correlated.correlation.mean())
    assert {*partners.source} == {"rows", "noise", "untrained"}
    assert table.n_latents["noise", "matched"] == 69  # one of them is dead
    assert table.n_latents["untrained", "matched"] == len(alive[0])


def test_labels_off_few_features_and_without_them(
    finished: RunFolder, rows: dict[str, list[torch.Tensor]], run_of_training: Path
) -> None:
    """Group by group, from features of a plain loop; in principal directions of NumPy's eigh."""
    given, reads = held_out(), finished.read_table("reads")
    labels, groups, folds = given
    x = means(rows[POINT])
    values, vectors = np.linalg.eigh(np.cov(x.T))
    scores = (x - x.mean(0)) @ vectors[:, np.argsort(-values)[: N_CLIPS - 1]]
    features = {
        ("first", "codes"): means(codes(rows, run_of_training, 0)),
        (POINT, "rows"): x,
        (POINT, "principal"): scores,
    }
    for (owner, kind), some in features.items():
        mine = reads[(reads.owner == owner) & (reads.kind == kind)]
        assert mine.ranked.value_counts().nunique() == 1
        for by in ("mean_difference", "random"):
            expected = {
                "kept": k_sparse_probe(some, labels, groups, folds, [1, 3], by=by),
                **{
                    how: unlearn(some, labels, groups, folds, [1, 3], how=how, by=by)
                    for how in get_args(Deletion)
                },
            }
            for how, hits in expected.items():
                for k, row in zip((1, 3), hits, strict=True):
                    at = (mine.how == how) & (mine.ranked == by) & (mine.k == k)
                    found = mine[at].set_index("group").value
                    for group in found.index:
                        there = [i for i, one in enumerate(groups) if one == group]
                        assert found[group] == row[there].mean(), (owner, kind, how, by, k)
    table = finished.read_table("k_sparse")
    one = table[(table.owner == "first") & (table.how == "kept") & (table.k == 3)].iloc[0]
    kept = reads[(reads.owner == "first") & (reads.how == "kept") & (reads.k == 3)]
    assert one.accuracy == kept[kept.ranked == "mean_difference"].value.mean()
    assert (one.n, one.n_groups) == (N_CLIPS, 6)


def test_factors_held_apart(
    finished: RunFolder, rows: dict[str, list[torch.Tensor]], run_of_training: Path
) -> None:
    groups = [f"s{i % 6}" for i in range(N_CLIPS)]
    folds = np.array([int(group[1]) % 3 for group in groups])
    size = 0.5 * np.arange(N_CLIPS)
    size[3] = np.nan
    sounds = finished.read_table("sounds").f0_median_hz.to_numpy()
    x = means(codes(rows, run_of_training, 0))
    x = x[:, np.ptp(x, axis=0) > 0]
    expected = read_factors(x, np.stack([size, sounds], axis=1), folds)
    factors = finished.read_table("factors")
    mine = factors[(factors.owner == "first") & (factors.kind == "codes")].set_index("factor")
    assert [*mine.index] == ["size", "f0_median_hz"]
    np.testing.assert_allclose(mine.r2, expected.r2, atol=1e-3)
    np.testing.assert_allclose(mine.completeness, completeness(expected.weights), atol=1e-3)
    assert mine.n_clips.tolist() == [N_CLIPS - 1, N_CLIPS]
    table = finished.read_table("factors_read")
    of_codes = table[(table.owner == "first") & (table.kind == "codes")].set_index("factor")
    np.testing.assert_allclose(of_codes.r2[["size", "f0_median_hz"]], expected.r2, atol=1e-3)
    dci = finished.read_table("dci")
    shapes = dci.groupby(["owner", "kind"]).n_codes.first()
    assert shapes["first", "rotated"] == shapes["first", "codes"] == x.shape[1]
    assert shapes["factors", "itself"] == 2


def test_stopped_and_in_two_processes(
    finished: RunFolder,
    tiny_models: TinyModels,
    clips: Path,
    run_of_training: Path,
    tmp_path: Path,
) -> None:
    def again() -> CompareDictionaries:
        return toy(tiny_models, clips, run_of_training)

    for before in (2, 7):  # while clips are read, and while these are compared
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(again(), [before]), tmp_path / "stopped")
    runner.run(again(), tmp_path / "stopped")
    runner.run(again(), tmp_path / "two", executor=Processes(2))
    expected = results(finished.path)
    assert results(tmp_path / "stopped") == results(tmp_path / "two") == expected


def test_one_dictionary_and_no_factors(
    tiny_models: TinyModels,
    clips: Path,
    run_of_training: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without scikit-learn, too."""
    monkeypatch.setattr(declared, "find_spec", lambda name: None)
    folder = str(run_of_training / f"sae/{POINT}/seed_0")
    one = toy(tiny_models, clips, run_of_training, dictionaries=[folder], factors=[])
    run = runner.run(one, tmp_path / "run")
    assert [*run.read_table("dictionaries").dictionary] == ["seed_0"]
    claims = [*run.read_table("findings").claim]
    assert claims == ["few: pitch off seed_0", "deleted: pitch off seed_0"]
    with pytest.raises(InputError, match=r"hooked_alm\[probes\]"):
        toy(tiny_models, clips, run_of_training).identify()


def test_random_folds_take_claims_back(
    tiny_models: TinyModels, clips: Path, run_of_training: Path
) -> None:
    with pytest.raises(InputError, match="has the column speaker, whose values would be on both"):
        toy(tiny_models, clips, run_of_training, cv="random").identify()
    forced = toy(tiny_models, clips, run_of_training, cv="random", force=True)
    assert "C58" in forced.known_defects()


# --- Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ["mood"]}, "their table has no column mood"),
        ({"factors": ["weight"]}, "their table has no column weight"),
        ({"factors": ["pitch"]}, "manifest.csv line 2: pitch: got 'low', expected a number"),
        ({"model": "bundled:follows_voice"}, "reading first at .* of width 54, expected 96"),
        ({"dictionaries": ["bundled:no_sae"]}, "bundled:no_sae: .*the package carries"),
        ({"dictionaries": ["bundled:follows_voice_sae"] * 2}, "got follows_voice_sae twice"),
    ],
)
def test_refused(
    settings: dict[str, Any],
    message: str,
    tiny_models: TinyModels,
    clips: Path,
    run_of_training: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=message):
        runner.run(toy(tiny_models, clips, run_of_training, **settings), tmp_path / "run")
    assert not (tmp_path / "run/units").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranked_by": "random"}, "must be a ranking"),
        ({"factors": ["a", "a"]}, "named once each"),
        ({"dictionaries": []}, "at least 1 item"),
        ({"dictionaries": [{"name": "a"}]}, "path"),
        ({"ks": [0]}, "greater than or equal to 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAECompareConfig(**settings)


def test_a_file_that_does_not_say_its_point(
    tiny_models: TinyModels, clips: Path, run_of_training: Path, tmp_path: Path
) -> None:
    """dictionary_learning's: nothing but numbers, named in the list of settings."""
    sae = load_dictionary(run_of_training / f"sae/{POINT}/seed_0").sae
    torch.save(
        {"encoder.weight": sae.encoder, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T,
         "b_dec": sae.b_dec, "k": torch.tensor(5)}, tmp_path / "ae.pt",
    )  # fmt: skip
    entry = {"path": str(tmp_path / "ae.pt"), "architecture": "topk"}
    one = toy(tiny_models, clips, run_of_training, dictionaries=[entry])
    with pytest.raises(InputError, match="do not say of which point"):
        one.identify()
    one = toy(tiny_models, clips, run_of_training, dictionaries=[{**entry, "point": POINT}])
    about = one.identify()["dictionaries"]["ae.pt"]
    assert (about["point"], about["d_sae"], about["noise"]) == (POINT, 70, None)
    assert json.dumps(about)


# --- Summaries


def test_summaries_by_hand() -> None:
    run = toy_results()
    table = reconstruction_table(run).set_index("dictionary")
    assert [*table.index] == [*NAMES]
    assert table.fvu["a"] == pytest.approx(0.1)
    assert table.l0["a"] == pytest.approx(3)
    agree = run["stability"].set_index(["source", "how"])
    assert agree.share["rows", "matched"] == 0.75
    assert agree.correlation["rows", "matched"] == pytest.approx(0.8)
    assert np.isnan(agree.correlation["noise", "matched"])
    apart = run["held_apart"].set_index(["owner", "kind"])
    assert apart.completeness["a", "codes"] == 0.9
    # Folds 0 to 6 are 0.002 apart: the spread of the jackknife, times t of 6 degrees of freedom.
    spread = np.sqrt(6 / 7 * ((0.002 * np.arange(7) - 0.006) ** 2).sum())
    assert apart.completeness_high["a", "codes"] - 0.9 == pytest.approx(2.4469 * spread, rel=1e-4)
    read = run["factors_read"].set_index(["owner", "kind", "factor"])
    assert read.r2["a", "codes", "mean of all"] == pytest.approx(1 - 0.33)
    short = dictionary_table(run).set_index("dictionary")
    assert short["mood (k = 4)"]["a"] == pytest.approx(0.9 + 0.015)
    assert short["mood (all)"]["b"] == pytest.approx(0.95 + 0.015)
    assert short.partner_share.tolist() == [0.75, 0.75]
    assert isinstance(short, pd.DataFrame)


def test_trainings_that_began_alike_have_found_nothing_together() -> None:
    run = toy_results()
    for seeds, is_made in (((0, 1), True), ((None, None), True), ((3, 3), False)):
        for name, seed in zip(NAMES, seeds, strict=True):
            run.inputs["dictionaries"][name] = {**run.inputs["dictionaries"][name], "seed": seed}
        found = CompareDictionaries.judge(run).findings["agree: a and b"]
        assert found.established == is_made
        assert ("both began with the same directions" in found.doubts) != is_made
