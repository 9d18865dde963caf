"""``class_neurons`` as a run: cells against plain transformers, stopped, in parts, refused."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuits_toy import write_tones
from class_neurons_verdicts import cases, edit
from hooked_alm.errors import InputError
from hooked_alm.experiments.class_neurons.experiment import ClassNeurons
from hooked_alm.experiments.class_neurons.settings import ClassNeuronsConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.neurons.sets import NEURON_CONTROLS, SELECTORS
from stopped_runs import interrupted, results
from tiny import TinyModels
from tolerances import FAST_ENGINE

pytestmark = pytest.mark.usefixtures("small_figures")
PROMPTS = {
    "en": {
        "ask": "Sound? ", "label_only": "Say.", "obey": "Say {label}.", "mention": "Not {label}.",
        "choose": "Of {labels}.", "unrelated": "x",
    }
}  # fmt: skip
SMALL: dict[str, Any] = {
    "n_resamples": 1000, "only_right": False, "batch_size": 4, "alphas": (-1, 0, 2), "rate": 0.03,
    "n_draws": 1, "min_drive": 1e-6, "prompts": PROMPTS, "labels": {"en": {"q": "q", "z": "z"}},
    "label_column": "sound",
}  # fmt: skip


def write_table(folder: Path, column: str = "sound", speakers: int = 4) -> Path:
    """Tones of two labels, two a speaker."""
    names = write_tones(folder, 2 * speakers)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", column, "language", "speaker"])
        writer.writerows(
            [name, "qz"[n % 2], "en", f"s{n // 2}"] for n, name in enumerate(names)
        )  # fmt: skip
    return folder / "table.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("clips"))


def toy(tiny_models: TinyModels, table: Path, **settings: Any) -> ClassNeurons:
    where = {"model": str(tiny_models.folder()), "audio": str(table)}
    return ClassNeurons(ClassNeuronsConfig(**{**where, **SMALL, **settings}))


@pytest.fixture(scope="module")
def finished(
    tiny_models: TinyModels, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    return runner.run(toy(tiny_models, table), tmp_path_factory.mktemp("run") / "run")


def test_neurons_are_those_that_hooks_on_the_published_model_select(
    finished: RunFolder, tiny_models: TinyModels, table: Path
) -> None:
    """MAD, LAP and means from the published model's activations, item by item."""
    gates = published_gates(finished, tiny_models, table)
    answers = finished.read_table("answers")
    logged = answers[answers.logged == 1]
    assert {*logged.half} == {"discovery"}
    by_class = {
        cls: torch.cat([gates[clip] for clip in logged[logged.cls == cls]["clip"]])
        for cls in ("q", "z")
    }
    mean = np.stack([one.double().mean(0).numpy() for one in by_class.values()])
    lap = np.stack([(one > 0).double().mean(0).numpy() for one in by_class.values()])
    neurons = finished.read_table("neurons")
    for number, cls in enumerate(by_class):
        for selector, score in (("mad", mean[number] - mean[1 - number]), ("lap", lap[number])):
            mine = neurons[(neurons.chosen_by == selector) & (neurons.cls == cls)]
            assert len(mine) == round(0.03 * 4 * 34)
            best = np.sort(score.ravel())[::-1][: len(mine)]
            np.testing.assert_allclose(mine.score, best, rtol=0, atol=1e-5)
            at = mine.block.to_numpy(), mine.neuron.to_numpy()
            np.testing.assert_allclose(mine["mean"], mean[number][at], rtol=0, atol=1e-5)
            np.testing.assert_allclose(mine.lap, lap[number][at], rtol=0, atol=1e-6)


def published_gates(
    finished: RunFolder, models: TinyModels, table: Path
) -> dict[str, torch.Tensor]:
    """Clip -> activations [pos, block, neuron] of the published model."""
    hf, found = models.hf("gqa"), {}
    for clip in finished.read_table("answers")["clip"]:
        kept: list[torch.Tensor] = []
        handles = [
            layer.mlp.act_fn.register_forward_hook(
                lambda _, given, out, kept=kept: kept.append(out[0])
            )
            for layer in hf.model.language_model.layers
        ]
        hf_logits(models, table, clip)
        for handle in handles:
            handle.remove()
        found[clip] = torch.stack(kept, dim=1)
    return found


@torch.no_grad()
def hf_logits(models: TinyModels, table: Path, clip: str) -> torch.Tensor:
    """The published model's logits at the last position, with the arguments that it takes."""
    model = models.hooked("gqa")
    x = model.prepare(str(table.parent / f"{clip}.wav"), "Sound? Say.")
    return models.hf("gqa")(**model.hf_arguments(x)).logits[0, -1]


def test_a_dose_is_what_hooks_on_the_published_model_give(
    finished: RunFolder, tiny_models: TinyModels, table: Path
) -> None:
    """Every set at every strength, of two judged clips."""
    neurons = finished.read_table("neurons").set_index(["chosen_by", "draw", "cls"]).sort_index()
    doses = finished.read_table("doses")
    assert {*doses.chosen_by} == {*SELECTORS, *NEURON_CONTROLS}
    assert {*doses[doses.chosen_by == "mad"].alpha} == {-1, 0, 2}
    hf, model = tiny_models.hf("gqa"), tiny_models.hooked("gqa")
    q, z = (model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "qz")
    for clip in doses["clip"].unique()[:2]:
        for row in doses[doses["clip"] == clip].to_dict("records"):
            key = row["chosen_by"], row["draw"], row["of"]
            part = neurons.loc[[key]] if key in neurons.index else neurons.iloc[:0]
            handles = [
                layer.mlp.act_fn.register_forward_hook(
                    scaling(part[part.block == block].neuron.tolist(), 1 + row["alpha"])
                )
                for block, layer in enumerate(hf.model.language_model.layers)
            ]
            logits = hf_logits(tiny_models, table, clip).double()
            for handle in handles:
                handle.remove()
            lead = float(logits[q] - logits[z]) * (1 if row["cls"] == "q" else -1)
            assert row["lead"] == pytest.approx(lead, abs=4 * FAST_ENGINE[torch.float32])


def scaling(neurons: list[int], factor: float) -> Any:
    """A hook that scales some neurons at every position."""

    def hook(_: object, given: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, :, neurons] *= factor
        return out

    return hook


def test_stopped_and_in_two_processes(
    finished: RunFolder, tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(toy(tiny_models, table), [3]), tmp_path / "stopped")
    runner.run(toy(tiny_models, table), tmp_path / "stopped")
    runner.run(toy(tiny_models, table), tmp_path / "two", executor=Processes(2))
    expected = results(finished.path)
    assert results(tmp_path / "stopped") == results(tmp_path / "two") == expected


def test_halves_share_no_speaker(finished: RunFolder) -> None:
    answers = finished.read_table("answers")
    halves = answers.groupby("half").group.agg(lambda one: {*one})
    assert not halves["discovery"] & halves["held-out"]
    assert {*finished.read_table("doses").group} == halves["held-out"]
    drive = finished.read_table("drive")
    assert {*drive.group} == halves["held-out"]
    share = drive[drive.chosen_by == "mad"]
    moved = share[["effect_audio", "effect_text"]].clip(lower=0)
    expected = moved.effect_audio / moved.sum(axis=1)
    np.testing.assert_allclose(share.share, expected.where(moved.sum(axis=1) >= 1e-6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "room"}, "table.csv line 2: room: missing"),
        ({"label_column": "pitch"}, "line 2: pitch: missing"),
        ({"only_right": True, "labels": {"en": {"q": "q", "z": "x"}}},
         "selecting neurons: got items of the classes"),
        ({"rate": 0.001}, "got 0 of 136, expected one to all of them"),
    ],
)  # fmt: skip
def test_refused(
    settings: dict[str, Any], message: str, tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        runner.run(toy(tiny_models, table, **settings), tmp_path / "run")


def test_one_speaker_cannot_be_halved(tiny_models: TinyModels, tmp_path: Path) -> None:
    table = write_table(tmp_path, speakers=1)
    with pytest.raises(InputError, match="got one group"):
        runner.run(toy(tiny_models, table), tmp_path / "run")
    assert not (tmp_path / "run/units").exists()


def test_halves_without_the_same_classes(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Of two speakers, one says one label alone."""
    table = write_table(tmp_path, speakers=2)
    table.write_text(table.read_text().replace("tone3.wav,z", "tone3.wav,q"))
    with pytest.raises(InputError, match=r"dealing 4 clips .* classes q, z, of which .* lacks"):
        runner.run(toy(tiny_models, table), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alphas": (0, 1)}, "alphas must include -1 and 0"),
        ({"alphas": (-1, 0, 1, 1)}, "each only once"),
        ({"rule": "instruction"}, "needs condition 'conflict'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassNeuronsConfig(**settings)


def test_a_class_of_one_group_is_not_judged() -> None:
    """Groups are resampled: of one alone nothing says how others would have come out."""
    run = edit("doses", "cls == 'sad'", "group", lambda groups: "g09")(cases())
    claim = next(one for one in ClassNeurons.claims if one.name == "specific_{}")
    finding = claim.judge(run, "mad")
    assert finding.doubts == ("sad: judged on one group alone",)
