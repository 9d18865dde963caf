"""``sae_patching`` on a tiny model: plain Hugging Face, both engines, stopped runs, bad input."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch import Tensor

from circuits_toy import WORDS, write_tones
from grounding_toy import PROMPTS
from hooked_alm.converters.dictionaries import load_dictionary, save_dictionary
from hooked_alm.errors import InputError
from hooked_alm.experiments.materials.conflict_runs import PromptRun
from hooked_alm.experiments.sae_patching.experiment import SAEPatching
from hooked_alm.experiments.sae_patching.plan import VoiceExchange
from hooked_alm.experiments.sae_patching.settings import SAEPatchingConfig
from hooked_alm.experiments.sae_patching.tables import summarise
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.settings import load_settings
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from sae_patching_verdicts import cases
from stopped_runs import interrupted, results
from tiny import TinyModels
from tolerances import FAST_ENGINE

pytestmark = pytest.mark.usefixtures("small_figures")
POINT, LAYER, N = "blocks.1.hook_resid_post", 1, 3
SMALL: dict[str, Any] = {
    "prompts": PROMPTS, "sizes": [N], "n_latents": N, "alphas": [0.5],
    "group": "take", "conditions": ["audio_only"], "batch_size": 3, "n_resamples": 1000,
    "min_effect": 1e-4,
}  # fmt: skip
TOLERANCE = 4 * FAST_ENGINE[torch.float32]


@pytest.fixture(scope="module")
def clips(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tones, three takes of either answer: two letters, of which the model says one to half."""
    folder, model = tmp_path_factory.mktemp("clips"), tiny_models.hooked("gqa")
    names = write_tones(folder, 6)
    tokens = [model.to_single_token(word) for word in WORDS]
    with torch.no_grad():
        heard = (model.prepare(str(folder / name), "Sound? Say.") for name in names)
        logits = np.stack([model(x)[0, -1, tokens].numpy() for x in heard])
    leads = {(i, j): logits[:, i] - logits[:, j] for i, j in combinations(range(len(WORDS)), 2)}

    def least(pair: tuple[int, int]) -> float:
        ordered = np.sort(leads[pair])
        return float(min(-ordered[2], ordered[3]))

    best = max(leads, key=least)
    assert least(best) > 0
    order = leads[best].argsort().argsort()  # the first three say the second letter
    lines = [
        f"{name},{'zq'[rank // 3]},en,{'abc'[rank % 3]}"
        for name, rank in zip(names, order, strict=True)
    ]
    (folder / "table.csv").write_text("\n".join(["path,emotion,language,take", *lines]), "utf-8")
    words = {"q": WORDS[best[0]], "z": WORDS[best[1]]}
    (folder / "labels.json").write_text(json.dumps({"en": words}), "utf-8")
    return folder / "table.csv"


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary of the tiny model's stream, of random directions."""
    cfg = DictionaryConfig(d_in=54, d_sae=70, architecture="topk", k=5)
    rows = torch.randn(30, 54, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("dictionary") / "sae"
    save_dictionary(SparseAutoencoder.initialised(cfg, rows, 3), path, point=POINT, model="tiny")
    return path


Toy = Any


@pytest.fixture(scope="module")
def toy(tiny_models: TinyModels, clips: Path, dictionary: Path) -> Toy:
    """Makes an experiment on these, with settings of its own."""
    labels = json.loads((clips.parent / "labels.json").read_text("utf-8"))
    where = {"model": str(tiny_models.folder()), "audio": str(clips), "labels": labels,
             "dictionary": str(dictionary)}  # fmt: skip

    def make(**settings: Any) -> SAEPatching:
        return SAEPatching(SAEPatchingConfig(**{**where, **SMALL, **settings}))

    return make


@pytest.fixture(scope="module")
def finished(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return runner.run(toy(), tmp_path_factory.mktemp("run") / "run")


def measured(experiment: SAEPatching, folder: RunFolder) -> pd.DataFrame:
    """Edits of an experiment that goes on from what another run kept of the same clips."""
    experiment.folder = folder
    experiment.identify()
    experiment.load()
    units = experiment.further_units({"features": folder.read_table("features")})
    return pd.DataFrame([row for one in units for row in experiment.measure(one).tables["edits"]])


class Plain:
    """The experiment by hand: Hugging Face's model, PyTorch hooks, and the definitions."""

    def __init__(self, experiment: SAEPatching, hf: Any, dictionary: Path) -> None:
        self.experiment, self.hf = experiment, hf
        self.sae = load_dictionary(dictionary).sae
        self.clips = {
            run.recording.name: (run.recording, self.rows(experiment.input(run)))
            for unit in experiment.units()
            for run in (unit.payload if isinstance(unit.payload, tuple) else ())
            if isinstance(run, PromptRun)
        }

    def arguments(self, x: ALMInput) -> dict[str, Tensor]:
        frames = torch.arange(x.clips[0].features.shape[-1])
        return {
            "input_ids": x.tokens, "attention_mask": x.attention_mask,
            "input_features": torch.cat([clip.features for clip in x.clips]),
            "feature_attention_mask": (frames < x.clips[0].n_frames[0])[None].long(),
        }  # fmt: skip

    def rows(self, x: ALMInput) -> Tensor:
        states = self.hf(**self.arguments(x), output_hidden_states=True).hidden_states
        found: Tensor = states[LAYER + 1][0, x.spans.positions("audio", 0)]
        return found

    def features(self, rows: Tensor) -> Tensor:
        pre = (rows - self.sae.b_dec) @ self.sae.W_enc + self.sae.b_enc
        top = pre.topk(5, dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())

    def mean(self, label: str, without: set[str], what: Any) -> Tensor:
        return torch.stack([
            what(rows).mean(0) for one, rows in self.clips.values()
            if one.label == label and one.cells["take"] not in without
        ]).mean(0)  # fmt: skip

    def margin(self, work: VoiceExchange, new: Tensor) -> float:
        """Logit of the label that is written in, less the voice's, with new rows."""
        x, (labels,) = self.experiment.input(work.base), self.experiment.labels.values()

        def write(module: Any, args: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            stream[:, x.spans.positions("audio", 0)] = new

        layers = self.hf.model.language_model.layers
        handle = layers[LAYER].register_forward_hook(write)
        logits = self.hf(**self.arguments(x)).logits[0, -1]
        handle.remove()
        tokens = dict(zip(labels.names, labels.tokens, strict=True))
        return float(logits[tokens[work.toward]] - logits[tokens[work.voice]])

    def edits(self, work: VoiceExchange, mean: bool) -> dict[tuple[str, float], Tensor]:
        """New rows by family and strength."""
        own = self.clips[work.base.recording.name][1]
        out = {self.clips[run.recording.name][0].cells["take"] for run in work.prompts}
        labels = work.voice, work.toward
        ours, theirs = (self.mean(label, out, self.features) for label in labels)
        push = self.mean(labels[1], out, torch.clone) - self.mean(labels[0], out, torch.clone)
        order = (theirs - ours).argsort()
        some = torch.cat([order[:N], order[-N:]])
        assert work.donor is not None or mean
        donor = None if work.donor is None else self.clips[work.donor.recording.name][1]
        to = theirs.expand(len(own), -1) if donor is None else self.features(donor)
        change = to - self.features(own)
        moved = change[:, some] @ self.sae.W_dec[some]
        size, unit = moved.norm(dim=1, keepdim=True), push / push.norm()
        whole = self.mean(labels[1], out, torch.clone).expand_as(own) if donor is None else donor
        return {
            ("chosen", 1.0): own + moved, ("chosen", 0.5): own + 0.5 * moved,
            ("push", 1.0): own + size * unit, ("push", 0.5): own + 0.5 * size * unit,
            ("none", 1.0): own, ("all", 1.0): own + change @ self.sae.W_dec, ("rows", 1.0): whole,
            ("reconstruction", 1.0): self.features(own) @ self.sae.W_dec + self.sae.b_dec,
        }  # fmt: skip


@pytest.mark.parametrize("donor", ["clip", "mean"])
@torch.no_grad()
def test_edits_are_those_of_plain_hugging_face(
    donor: str, toy: Toy, finished: RunFolder, tiny_models: TinyModels, dictionary: Path
) -> None:
    experiment = toy(donor=donor)
    table = measured(experiment, finished).set_index(["pair", "family", "alpha"])
    plain = Plain(experiment, tiny_models.hf("gqa"), dictionary)
    n_flipped = 0
    for work in experiment.plan.exchanges:
        edits = plain.edits(work, donor == "mean")
        before = plain.margin(work, edits["none", 1.0])
        for (family, alpha), new in edits.items():
            row, margin = table.loc[(work.pair, family, alpha)], plain.margin(work, new)
            assert row["shift"] == pytest.approx(margin - before, abs=TOLERANCE)
            moved = (new - edits["none", 1.0]).norm(dim=1).mean()
            assert row["moved"] == pytest.approx(float(moved), rel=1e-4, abs=1e-5)
            if before < 0:  # of two labels
                assert row["flipped"] == float(margin > 0)
                n_flipped += int(margin > 0)
            else:
                assert np.isnan(row["flipped"])
    assert len(experiment.plan.exchanges) == 6
    assert n_flipped


def test_both_engines_and_a_run_of_its_own(toy: Toy, finished: RunFolder) -> None:
    fast, loop = (measured(toy(engine=one), finished) for one in ("fast", "hooks"))
    pd.testing.assert_frame_equal(fast, loop, rtol=1e-3, atol=TOLERANCE)
    none = loop[loop.family == "none"]
    assert (none[["shift", "moved"]] == 0).all(axis=None)
    assert {"matched", "scaled", "frequent", "random"} < {*loop.family}
    assert {*finished.read_table("controls").set_index("control").verdict.iloc[2:]} == {"pass"}
    kept = finished.read_table("edits")[fast.columns]
    pd.testing.assert_frame_equal(fast, kept, check_dtype=False)


def test_stopped_and_in_two_processes(toy: Toy, finished: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(toy(), [2, 4]), tmp_path / "stopped")
    runner.run(toy(), tmp_path / "stopped")
    runner.run(toy(), tmp_path / "two", executor=Processes(2))
    expected = results(finished.path)
    assert results(tmp_path / "stopped") == results(tmp_path / "two") == expected


def test_summaries_by_hand() -> None:
    run = cases()
    tables = dict(summarise(run))
    edits = run["edits"]
    means = tables["edit_means"].set_index(["family", "n_latents", "alpha", "measure"])
    for family, n in (("chosen", 3), ("push", 1), ("all", 0)):
        some = edits[(edits.family == family) & (edits.n_latents == n) & (edits.alpha == 1)]
        for measure in ("flipped", "stayed", "shift", "moved", "label_mass"):
            row = means.loc[(family, n, 1.0, measure)]
            assert row["mean"] == pytest.approx(some[measure].mean())
            assert row["n"] == some[measure].notna().sum()
    halves = edits[(edits.family == "chosen") & (edits.alpha == 0.5)]
    wholes = edits[edits.family == "rows"]["shift"].to_numpy()
    moves = abs(wholes) >= run.config.min_effect
    expected = halves["shift"].to_numpy()[moves] / wholes[moves]
    row = means.loc[("chosen", 3, 0.5, "recovery")]
    assert row["mean"] == pytest.approx(expected.mean())
    assert row["n"] == moves.sum() < len(wholes)
    lead = tables["compared"].set_index(["family", "n_latents"]).loc[("push", 3)]
    assert lead["mean"] == pytest.approx(means.loc[("chosen", 3, 1.0, "flipped")]["mean"])


def test_a_bundled_model_has_its_own_dictionary() -> None:
    assert SAEPatchingConfig().dictionary == "bundled:follows_voice_sae"
    assert SAEPatchingConfig(model="bundled:follows_text").dictionary == "bundled:follows_text_sae"
    named = SAEPatchingConfig(model="bundled:follows_text", dictionary="x")
    assert named.dictionary == "x"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("n_latents=4", r"n_latents must be one of sizes, \[1, 3, 10, 30, 90\]"),
        ("conditions=[conflict, conflict]", "expected each only once"),
        ("conditions=[consistent]", "expected 'audio_only' or 'conflict'"),
        ("alphas=[0]", "greater than 0"),
    ],
)
def test_settings_that_no_run_could_have(word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(SAEPatchingConfig, words=[word])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "bundled:tiny_whisper"}, "writes down what is said.*run sae_steering"),
        ({"sizes": [N, 18]}, "has 70 latents, expected 72 or more"),
        ({"point": "blocks.0.attn.hook_z"}, "of rows of width 54, expected 60"),
        ({"group": "speaker"}, r"line 2: speaker: missing, in 6 of 6 clips"),
        ({"group": "emotion"}, "got no clip for which there is one of another label"),
        ({"label_column": "mood"}, "line 2: mood: missing"),
    ],
)
def test_refused(settings: dict[str, Any], message: str, toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        runner.run(toy(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_clips_of_unequal_length_are_refused(toy: Toy, clips: Path, tmp_path: Path) -> None:
    """Position by position nothing stands for anything: their means are exchanged instead."""
    lines = clips.read_text("utf-8").replace("tone", str(clips.parent / "tone"))
    other = tmp_path / "table.csv"
    other.write_text(lines, "utf-8")
    (name,) = write_tones(tmp_path, 1)
    sound, rate = soundfile.read(tmp_path / name)
    soundfile.write(tmp_path / name, np.tile(sound, 2), rate)
    other.write_text(lines.replace(str(clips.parent / "tone0.wav"), name), "utf-8")
    with pytest.raises(InputError, match=r"aligning|equal duration"):
        runner.run(toy(audio=str(other)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    toy(audio=str(other), donor="mean").identify()
