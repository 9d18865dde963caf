"""Component patching on a tiny Whisper: every cell against Hugging Face's, and as a whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from hooked_alm.errors import InputError
from hooked_alm.experiments.component_patching.experiment import ComponentPatching
from hooked_alm.experiments.component_patching.measure import ALL
from hooked_alm.experiments.component_patching.settings import ComponentPatchingConfig
from hooked_alm.experiments.component_patching.tables import misheard
from hooked_alm.experiments.materials.stand_ins import noise_like, silence_like
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from stopped_runs import interrupted
from tiny import TinyModels
from tolerances import ENGINE
from whisper_components import activation, patched
from whisper_toy import LAYERS, Whispers, noise

WORDS = (("cat", "dog"), ("dog", "cat"), ("cat", "cow"))
SITES = {"block": "resid_post", "attn": "attn_out", "cross_attn": "cross_attn_out",
         "mlp": "mlp_out", "head": "z", "cross_head": "cross_attn.z"}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "n_resamples": 1000, "language": "en", "normaliser": "none", "n_noise": 2, "alphas": (0, 0.5, 1)
}  # fmt: skip
HEADER = "path,text,speaker,acoustic_word,contextual_word,donor"


def write_table(folder: Path, *lines: str, header: str = HEADER) -> Path:
    table = folder / "table.csv"
    table.write_text("\n".join([header, *lines]) + "\n", "utf-8")
    return table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sentences, one of them without a minimal pair."""
    folder, lines = tmp_path_factory.mktemp("confusable"), []
    for n, (said, context) in enumerate(WORDS):
        donor = "" if n == 2 else f"d{n}.wav"
        soundfile.write(folder / f"c{n}.wav", noise(0.4 + 0.1 * n, seed=n), 16_000)
        lines.append(f"c{n}.wav,two {said}s and a {said} again,s{n},{said},{context},{donor}")
        if donor:
            # It is longer: what of the encoder is the clip's end is the other's padding.
            soundfile.write(folder / donor, noise(0.5 + 0.1 * n, seed=7 + n), 16_000)
            lines.append(f"{donor},,s{n},,,")
    return write_table(folder, *lines)


def experiment(model: Path, table: Path, **changes: Any) -> ComponentPatching:
    given = {**SETTINGS, **changes}
    return ComponentPatching(ComponentPatchingConfig(model=str(model), audio=str(table), **given))


@pytest.fixture(scope="module")
def run(
    small_figures: None, whispers: Whispers, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    out = tmp_path_factory.mktemp("run") / "run"
    return runner.run(experiment(whispers.folder(), table), out)


@pytest.fixture
def unpaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest."""
    monkeypatch.setattr(ComponentPatching, "page", lambda self, page, run: None)


@torch.no_grad()
def test_every_cell_is_hugging_faces(run: RunFolder, whispers: Whispers, table: Path) -> None:
    """Of two clips, with the transcript up to the word: values, and how far it was moved."""
    hf, model = whispers.hf(), whispers.hooked()
    rows = run.read_table("patched")
    told = []
    for said, context in WORDS:
        text, other = (f" two {said}s and a {word} again" for word in (said, context))
        both = [model.tokenizer(one).input_ids for one in (text, other)]
        at = next(i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b)
        told.append((both[0], at, (both[0][at], both[1][at])))
    for n, (ids, at, pair) in enumerate(told[:2]):
        path = table.parent / f"c{n}.wav"
        x = model.prepare(path, language="en")
        tokens = torch.cat([x.tokens, torch.tensor([ids[:at]])], dim=1)
        clips = {("silence", 0): silence_like(model, path),
                 ("pair", 0): model.read_clip(path.parent / f"d{n}.wav")}  # fmt: skip
        clips |= {("noise", k): noise_like(model, path, None, f"0/c{n}/{k}") for k in (0, 1)}
        own = {"input_features": x.clips[0].features, "decoder_input_ids": tokens}
        heard = {key: {**own, "input_features": clip.features} for key, clip in clips.items()}
        whole = hf(**own).logits[0, -1]
        limit = 4 * ENGINE[torch.float32] * float(whole.abs().max())
        mine = rows[rows["clip"] == f"c{n}"]
        assert len(mine) > 100
        for row in mine.to_dict("records"):
            stack, site, layer = row["stack"], SITES[row["site"]], row["layer"]
            head = None if row["head"] == ALL else row["head"]
            a = activation(hf, own, stack, site, layer)
            key = row["reference"], row["draw"]
            ref = torch.zeros_like(a)
            if key[0] != "zero":
                ref = activation(hf, heard[key], stack, site, layer)
            logits = patched(hf, own, stack, site, layer, head, ref, row["alpha"])[0, -1]
            # The other of these two asks about the same words; the third is the stranger.
            for name, some in (("", pair), ("stranger", told[2][2])):
                np.testing.assert_allclose(row[name or "value"], _odds(logits, some), atol=limit)
                base = row[f"{name}_base".lstrip("_")]
                np.testing.assert_allclose(base, _odds(whole, some), atol=limit)
            far = ref - a if head is None else (ref - a)[:, :, head]
            np.testing.assert_allclose(row["moved"], row["alpha"] * far.norm().item(), rtol=1e-4)
    assert set(run.read_table("controls").verdict) == {"pass"}


def _odds(logits: Tensor, pair: tuple[int, int]) -> float:
    return float(logits[pair[0]] - logits[pair[1]])


def test_tables(run: RunFolder) -> None:
    """A row for every component, head, reference and strength that was asked for."""
    table = run.read_table("components")
    sites = {("encoder", s) for s in ("block", "attn", "mlp", "head")}
    sites |= {("decoder", s) for s in SITES}
    assert {*zip(table["stack"], table.site, strict=True)} == sites
    is_head = table.site.str.contains("head")
    assert {*table[is_head].reference} == {"noise", "zero"}
    assert {*table[is_head].alpha} == {1.0}
    assert {*table[~is_head].reference} == {"noise", "silence", "pair", "zero"}
    cells = table[~is_head].groupby(["stack", "site", "layer"]).size()
    assert set(cells) == {3 + 1 + 1 + 1}  # strengths of noise, silence, pair, zero
    assert table[table.reference == "pair"].n.unique().tolist() == [2]  # one clip has none
    assert len(run.read_table("behaviour")) == 4
    n_blocks = table[~is_head].groupby("stack")["layer"].nunique().to_dict()
    assert n_blocks == LAYERS


@pytest.mark.usefixtures("unpaged")
def test_stopped_or_in_two_processes_it_leaves_the_same_bytes(
    whispers: Whispers, table: Path, tmp_path: Path
) -> None:
    def again() -> ComponentPatching:
        return experiment(whispers.folder(), table, sites=("mlp",), n_noise=1, alphas=(0, 1))

    once = runner.run(again(), tmp_path / "once")
    tables = {path.name: path.read_bytes() for path in once.path.glob("tables/*")}
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(again(), {2}), tmp_path / "stopped")
    for name, executor in (("stopped", {}), ("two", {"executor": Processes(2)})):
        found = runner.run(again(), tmp_path / name, **executor)
        assert {p.name: p.read_bytes() for p in found.path.glob("tables/*")} == tables


@pytest.mark.usefixtures("unpaged")
def test_the_plain_loop_finds_the_same(
    run: RunFolder, whispers: Whispers, table: Path, tmp_path: Path
) -> None:
    small = experiment(whispers.folder(), table, engine="hooks", sites=("attn", "head"), n_noise=1)
    found = runner.run(small, tmp_path / "run").read_table("patched")
    keys = ["clip", "stack", "site", "layer", "head", "reference", "draw", "alpha"]
    both = found.merge(run.read_table("patched"), on=keys, suffixes=("", "_fast"))
    assert len(both) == len(found) > 100
    np.testing.assert_allclose(both.value, both.value_fast, atol=1e-4)


@pytest.mark.usefixtures("unpaged")
def test_a_language_model_that_hears(tiny_models: TinyModels, table: Path, tmp_path: Path) -> None:
    """It has no cross-attention; its references fill the prompt's positions, or are refused."""
    changes = {"language": None, "n_noise": 1, "alphas": (0, 1), "sites": ("block", "head")}
    with pytest.raises(InputError, match=r"table\.csv line 2: donor: got a prompt of \d+"):
        runner.run(experiment(tiny_models.folder(), table, **changes), tmp_path / "refused")
    lines = table.read_text("utf-8").splitlines()
    alone = [f"{table.parent}/{line.rsplit(',', 1)[0]}," for line in lines[1:] if line[0] == "c"]
    found = runner.run(
        experiment(tiny_models.folder(), write_table(tmp_path, *alone), **changes), tmp_path / "run"
    )
    assert not found.read_table("components").site.str.contains("cross").any()
    assert set(found.read_table("controls").verdict) == {"pass"}
    with pytest.raises(InputError, match="has any of the sites cross_attn"):
        runner.run(
            experiment(tiny_models.folder(), table, **{**changes, "sites": ("cross_attn",)}),
            tmp_path / "none",
        )


@pytest.mark.parametrize(
    ("cells", "match"),
    [("a cat,,cat,dog,nowhere.wav", r"donor: got 'nowhere\.wav', expected the path of one other"),
     ("a cat,,cat,dog,x.wav", r"donor: got 'x\.wav'"),
     ("a cat,,cat,cat,", "contextual_word: got 'cat', expected another word"),
     ("a cat,,cat,,", "contextual_word: got ''"),
     ("a cat,,dog,cat,", "'dog' is 0 times in the text 'a cat', expected once"),
     ("a cat or cat,,cat,dog,", "'cat' is 2 times"),
     ("a concat,,cat,dog,", "'cat' is 0 times"),
     (",,cat,dog,", "'cat' is 0 times in the text ''"),
     ("a cat,,,dog,", "got no clip with an acoustic_word, expected the columns path, text"),
     ("a ca,,ca,cat,", "the same tokens as far as both go on")],
)  # fmt: skip
def test_items_that_are_none(whispers: Whispers, tmp_path: Path, cells: str, match: str) -> None:
    soundfile.write(tmp_path / "x.wav", noise(0.3), 16_000)
    table = write_table(tmp_path, f"x.wav,{cells}")
    with pytest.raises(InputError, match=match):
        runner.run(experiment(whispers.folder(), table), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("alphas", [(0, 0.5), (0.5, 1), (0, 1, 1), (0, 1, 2), (-1, 0, 1), (1,)])
def test_strengths_that_are_none(alphas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="alphas"):
        ComponentPatchingConfig(alphas=alphas)


def test_a_clip_is_misheard_where_the_contextual_word_is_likelier(run: RunFolder) -> None:
    results = ComponentPatching.results(
        ComponentPatchingConfig(**SETTINGS), {}, {"runs": run.read_table("runs")}
    )
    runs = results["runs"]
    expected = {*runs[(runs.reference == "none") & (runs.value < 0)]["clip"]}
    assert misheard(results) == expected
    flipped = replace(results, tables={"runs": runs.assign(value=-runs.value)})
    assert misheard(flipped) == {f"c{n}" for n in range(3)} - expected
