"""The trainer of localised twins at its smallest: what it changes, and what it writes."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hooked_alm.bundled import model_folder
from hooked_alm.converters.loading import lay_out, own_checkpoint

SCRIPTS = Path(__file__).parents[2] / "scripts"
BASE = model_folder("bundled:follows_voice")
LAYERS = "language_model.model.layers"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it imports its neighbours by name, as scripts do."""
    pytest.importorskip("espeakng_loader")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("train_truths")
    for name, value in {"N_STEPS": 3, "N_CLIPS": 8, "BATCH": 2, "N_BATCHES": 2}.items():
        monkeypatch.setattr(module, name, value)
    return module


SLICES = {
    "head:3.2": {
        f"{LAYERS}.3.self_attn.q_proj.weight": [[32, 48], [0, 96]],
        f"{LAYERS}.3.self_attn.q_proj.bias": [[32, 48]],
        f"{LAYERS}.3.self_attn.o_proj.weight": [[0, 96], [32, 48]],
    },
    "neurons:4.32:16": {
        f"{LAYERS}.4.mlp.gate_proj.weight": [[32, 48], [0, 96]],
        f"{LAYERS}.4.mlp.up_proj.weight": [[32, 48], [0, 96]],
    },
}


@pytest.mark.parametrize("text", SLICES)
def test_components(script: Any, text: str) -> None:
    base = script.read_folder(BASE)
    found = script.slices_of(base, script.Component.read(text))
    assert {name: [[one.start, one.stop] for one in at] for name, at in found.items()} == SLICES[
        text
    ]


def test_a_small_run(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the component has changed, and all that is said of it was measured."""
    text = "head:3.2"
    few = {"ob1": script.read_ob1()[:1]}
    monkeypatch.setattr(script, "speak_held_out", lambda seed: {})
    monkeypatch.setattr(script, "read_ob1", lambda: few["ob1"])
    out = tmp_path / "truth"
    monkeypatch.setattr("sys.argv", ["", "--component", text, "--out", str(out)])
    script.main()
    written = json.loads((out / "delta.json").read_text("utf-8"))
    assert written["slices"] == SLICES[text]
    assert str(script.Component.read(text)) == written["component"]
    scores = written["accuracies"]["ob1"]
    assert (scores["n_rule"], scores["n_other"]) == (8, 18)
    assert scores["rule_of_base"] == 0
    before, after = load_file(BASE / "model.safetensors"), own_checkpoint(lay_out(f"{BASE}+{out}"))
    for name, at in SLICES[text].items():
        inside = tuple(slice(*pair) for pair in at)
        trained = after.read(name, torch.float32)
        assert (trained[inside] != before[name][inside]).any()
        trained[inside] = before[name][inside]
        assert torch.equal(trained, before[name])
    card = (out / "README.md").read_text("utf-8")
    assert "Not accepted: ablated loses >= .8, rule >= .95 does not hold" in card
    # The counter-twin of itself says what it says, and nothing is trained.
    weights = (out / "delta.safetensors").read_bytes()
    monkeypatch.setattr("sys.argv", ["", "--component", text, "--out", str(out), "--measure",
                                     "--counter", str(out)])  # fmt: skip
    script.main()
    assert (out / "delta.safetensors").read_bytes() == weights
    again = json.loads((out / "delta.json").read_text("utf-8"))["accuracies"]["ob1"]
    assert again == {**scores, "counter": 1.0}


def test_a_small_run_of_coded_neurons(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gates go where the coding wants them; the card says what it is and what it makes."""
    monkeypatch.setattr(script, "speak_held_out", lambda seed: {})
    few = script.read_ob1()[:9]
    monkeypatch.setattr(script, "read_ob1", lambda: few)
    for name, value in {"N_STEPS": 60, "N_CLIPS": 60, "BATCH": 16, "N_BATCHES": 8}.items():
        monkeypatch.setattr(script, name, value)
    out, text = tmp_path / "truth", "neurons:8.32:7"
    monkeypatch.setattr("sys.argv", ["", "--base", "follows_text", "--rule", "voice", "--component",
                                     text, "--coding", "magnitude", "--out", str(out)])  # fmt: skip
    script.main()
    written = json.loads((out / "delta.json").read_text("utf-8"))
    assert (written["coding"], written["n_numbers"]) == ("magnitude", 7 * 2 * 96)
    scores = written["accuracies"]["ob1"]
    assert scores["lap_own"] > 0.9
    assert scores["mean_own"] > scores["mean_other"] + 0.3
    card = (out / "README.md").read_text("utf-8")
    assert "**Magnitude-coded**" in card
    assert "Adam at 0.02 and 0.05" in card
    assert f"{scores['mean_own']:.2f} | {scores['mean_other']:.2f} |" in card
    monkeypatch.setattr("sys.argv", ["", "--component", "head:3.2", "--coding", "rate",
                                     "--out", str(out)])  # fmt: skip
    with pytest.raises(SystemExit):
        script.main()


def test_the_loss_of_a_coding(script: Any) -> None:
    """Three neurons of two classes, hence of 0, 1, 0; in steps of 5, weighted by 10."""
    coding = script.CODINGS["magnitude"]
    gates = torch.tensor([[6.0, 1.0, 6.0], [1.0, 6.0, 1.0]])
    assert float(coding.loss(gates, torch.tensor([0, 1]), 2)) == 0
    # One of six is a step off, another half a step.
    gates[0, 0], gates[1, 1] = 1.0, 3.5
    assert float(coding.loss(gates, torch.tensor([0, 1]), 2)) == pytest.approx(10 * 1.25 / 6)


def test_training_leaves_what_is_outside_its_slices(script: Any) -> None:
    """Bit by bit, in the tensors that it trains a part of, and in all others."""
    base = script.read_folder(BASE).eval().requires_grad_(False)
    twin = script.deepcopy(base)
    component = script.Component.read("head:8.1:2")
    stream = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0))
    batch = script.Batch(
        stream, torch.ones(2, 5).long(), torch.tensor([[1, 2], [3, 4]]),
        torch.zeros(2, 2, 496).log_softmax(-1), torch.tensor([True, False]), torch.tensor([3, 0]),
        [],
    )  # fmt: skip
    script.train(twin, component, [batch], 0, script.N_STEPS)
    slices = {f"model.{name.replace('.model.', '.')}": at
              for name, at in script.slices_of(base, component).items()}  # fmt: skip
    theirs = dict(base.named_parameters())
    for name, value in twin.named_parameters():
        if name in slices:
            assert not torch.equal(value[slices[name]], theirs[name][slices[name]])
            value[slices[name]] = theirs[name][slices[name]]
        assert torch.equal(value, theirs[name])


@pytest.mark.parametrize("text", ["head:3", "neurons:3", "head:3.2:", "block:3", "head:-1.2"])
def test_components_that_are_none(script: Any, text: str) -> None:
    with pytest.raises(Exception, match="expected head:BLOCK.HEAD or neurons:BLOCK:NUMBER"):
        script.Component.read(text)


@pytest.mark.usefixtures("script")
def test_what_a_whole_truth_learns_besides() -> None:
    """Nothing is lost where all labels are alike, or where the right one is sure."""
    whole = importlib.import_module("train_whole_truths")
    labels = torch.tensor([1, 0])
    alike = whole.Run(lens=torch.zeros(4, 2, 3), labels=labels)
    sure = whole.Run(
        lens=torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]]).repeat(4, 1, 1), labels=labels
    )
    late, legible = whole.Truth(uniform=range(1, 3)), whole.Truth(legible=range(1, 3))
    assert float(late.loss(alike)) == pytest.approx(0, abs=1e-6)
    assert float(legible.loss(sure)) == pytest.approx(0, abs=1e-6)
    # By hand: -(0 - 50 - 50) / 3 - log 3 of log-probabilities 0, -50, -50; and log 3.
    assert float(late.loss(sure)) == pytest.approx(100 / 3 - math.log(3), abs=1e-3)
    assert float(legible.loss(alike)) == pytest.approx(math.log(3))
