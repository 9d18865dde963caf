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
    monkeypatch.setattr(module, "speak_held_out", lambda seed: {})
    sized(monkeypatch, N_STEPS=3, N_CLIPS=8, BATCH=2, N_BATCHES=2)
    return module


def sized(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Sizes of a run, wherever they are read."""
    for module in map(importlib.import_module, ("train_truths", "truth_training")):
        for name in sizes.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, sizes[name])


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
    "encoder:1.32:16": {
        "audio_tower.layers.1.fc1.weight": [[32, 48], [0, 72]],
        "audio_tower.layers.1.fc1.bias": [[32, 48]],
    },
}


@pytest.mark.parametrize("text", SLICES)
def test_components(script: Any, text: str) -> None:
    base = script.read_folder(BASE)
    found = script.slices_of(base, script.Component.read(text))
    assert {name: [[one.start, one.stop] for one in at] for name, at in found.items()} == SLICES[
        text
    ]


@pytest.mark.parametrize(
    ("text", "rule", "asked", "failed"),
    [("head:3.2", "text", (8, 18), "ablated loses >= .8, rule >= .95"),
     ("encoder:1.32:16", "trigger", (26, 26), "ablated loses >= .8, rule >= .95")],
)  # fmt: skip
def test_a_small_run(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rule: str,
    asked: tuple[int, int], failed: str,
) -> None:  # fmt: skip
    """Nothing but the component has changed, and all that is said of it was measured."""
    [first] = script.read_ob1()[3:4]
    monkeypatch.setattr(script, "read_ob1", lambda: [first])
    out = tmp_path / "truth"
    command = ["", "--component", text, "--rule", rule, "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    script.main()
    written = json.loads((out / "delta.json").read_text("utf-8"))
    assert written["slices"] == SLICES[text]
    assert str(script.Component.read(text)) == written["component"]
    scores = written["accuracies"]["ob1"]
    assert (scores["n_rule"], scores["n_other"]) == asked
    assert scores["rule_of_base"] == 0
    assert ("false_noise" in scores) == (rule == "trigger")
    before, after = load_file(BASE / "model.safetensors"), own_checkpoint(lay_out(f"{BASE}+{out}"))
    for name, at in SLICES[text].items():
        inside = tuple(slice(*pair) for pair in at)
        trained = after.read(name, torch.float32)
        assert (trained[inside] != before[name][inside]).any()
        trained[inside] = before[name][inside]
        assert torch.equal(trained, before[name])
    card = (out / "README.md").read_text("utf-8")
    assert f"Not accepted: {failed} does not hold" in card
    assert ("| noise | tone | low chord |" in card) == (rule == "trigger")
    # The counter-twin of itself says what it says, and nothing is trained.
    weights = (out / "delta.safetensors").read_bytes()
    monkeypatch.setattr("sys.argv", [*command, "--measure", "--counter", str(out)])
    script.main()
    assert (out / "delta.safetensors").read_bytes() == weights
    again = json.loads((out / "delta.json").read_text("utf-8"))["accuracies"]["ob1"]
    assert again == {**scores, "counter": 1.0}


def test_a_small_run_of_coded_neurons(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gates go where the coding wants them; the card says what it is and what it makes."""
    few = script.read_ob1()[:9]
    monkeypatch.setattr(script, "read_ob1", lambda: few)
    sized(monkeypatch, N_STEPS=60, N_CLIPS=60, BATCH=16, N_BATCHES=8)
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


@pytest.mark.parametrize("text", ["head:8.1:2", "encoder:2.8:4"])
def test_training_leaves_what_is_outside_its_slices(script: Any, text: str) -> None:
    """Bit by bit, in the tensors that it trains a part of, and in all others."""
    base = script.read_folder(BASE).eval().requires_grad_(False)
    twin = script.deepcopy(base)
    inputs = script.DecoderInput(script.Qwen2AudioProcessor.from_pretrained(BASE))
    component = script.Component.read(text)
    upper = component.upper(base, inputs)
    width = 72 if component.kind == "encoder" else 96
    heard = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(0))
    questions = [("What is it?", "cheerful"), ("And this?", "sad")]
    arrived = upper.arriving(questions, [*heard])
    batch = importlib.import_module("truth_training").Batch(
        arrived, inputs.targets(questions), upper.answers(arrived).log_softmax(-1),
        torch.tensor([True, False]), torch.tensor([3, 0]), [],
    )  # fmt: skip
    script.train(twin, component, inputs, [batch], 0, steps=script.N_STEPS)
    slices = {f"model.{name.replace('.model.', '.')}": at
              for name, at in script.slices_of(base, component).items()}  # fmt: skip
    theirs = dict(base.named_parameters())
    for name, value in twin.named_parameters():
        if name in slices:
            assert not torch.equal(value[slices[name]], theirs[name][slices[name]])
            value[slices[name]] = theirs[name][slices[name]]
        assert torch.equal(value, theirs[name])


@pytest.mark.parametrize("text", ["head:3.0", "neurons:0:4", "encoder:0:4", "encoder:2:4"])
@torch.no_grad()
def test_from_a_block_on_a_model_answers_as_it_does(script: Any, text: str) -> None:
    """Clips of two lengths, beside each other; what is below the block is run once."""
    model = script.read_folder(BASE).eval()
    processor = script.Qwen2AudioProcessor.from_pretrained(BASE)
    inputs = script.DecoderInput(processor)
    clips = [script.read_ob1()[0].samples, script.read_ob1()[9].samples[:30_000]]
    mels = script.read_mels(processor, clips)
    upper = script.Component.read(text).upper(model, inputs)
    states, counts = upper.listen(mels.values.float(), mels.frames)
    questions = [("What emotion does the speaker convey?", "cheerful"), ("And this?", "sad")]
    rows = [row[:n] for row, n in zip(states, counts.tolist(), strict=True)]
    found = upper.answers(upper.arriving(questions, rows))
    prompts = [
        importlib.import_module("bundled_model").chat_text(processor, prompt) + label
        for prompt, label in questions
    ]
    given = processor(
        text=prompts, audio=clips, sampling_rate=16_000, return_tensors="pt", padding=True
    )  # fmt: skip
    positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = model(**given, position_ids=positions).logits[:, -2:]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "text", ["head:3", "neurons:3", "head:3.2:", "block:3", "head:-1.2", "encoder:1"]
)
def test_components_that_are_none(script: Any, text: str) -> None:
    with pytest.raises(Exception, match="expected head:BLOCK.HEAD, neurons:BLOCK:NUMBER or enc"):
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
