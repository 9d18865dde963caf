"""``trigger_defence`` as a run: cells against plain transformers, stopped, in parts, refused."""

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from safetensors.numpy import load_file
from torch import Tensor

from hooked_alm.errors import HookedALMError, InputError
from hooked_alm.experiments.trigger_defence.experiment import TriggerDefence
from hooked_alm.experiments.trigger_defence.settings import TriggerDefenceConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.settings import load_settings
from hooked_alm.methods.robustness.denoise import spectral_gate
from robust_cases import neurons_of
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
    "n_resamples": 1000, "batch_size": 3, "prompts": PROMPTS,
    "labels": {"en": {"q": "q", "z": "z"}},
    "label_column": "sound", "target": "z", "steps": 3, "eps": 0.05, "alpha": 0.02,
    "percent": 10, "further_percents": (), "n_attacked": 8, "bias": 0.5, "min_effect": 1e-6,
    "attn_implementation": "eager",
}  # fmt: skip
PLACES = ("lm", "audio")
ATOL = 4 * FAST_ENGINE[torch.float32]


def write_table(folder: Path, column: str = "sound", speakers: int = 4) -> Path:
    """Noise of two labels, one of each for every speaker."""
    rows = []
    for n in range(2 * speakers):
        sound = np.random.default_rng(n).normal(0, 0.1, 6400)
        soundfile.write(folder / f"clip{n}.wav", sound, 16_000)
        rows.append([f"clip{n}.wav", "qz"[n % 2], "en", f"s{n // 2}"])
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", column, "language", "speaker"], *rows])
    return folder / "table.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("clips"))


def toy(tiny_models: TinyModels, table: Path, **settings: Any) -> TriggerDefence:
    where = {"model": str(tiny_models.folder()), "audio": str(table)}
    return TriggerDefence(TriggerDefenceConfig(**{**where, **SMALL, **settings}))


@pytest.fixture(scope="module")
def finished(
    tiny_models: TinyModels, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    return runner.run(toy(tiny_models, table), tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def waves(finished: RunFolder, table: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Clip -> its samples, clean and attacked."""
    found = {}
    for file in finished.read_table("kept").file:
        for name, delta in load_file(finished.path / f"arrays/{file}.safetensors").items():
            if name.startswith("delta/"):
                clip = name.removeprefix("delta/")
                clean = soundfile.read(table.parent / f"{clip}.wav", dtype="float32")[0]
                found[clip] = clean, clean + delta
    return found


class Published:
    """The published model, asked about waveforms with hooks on what neurons do."""

    def __init__(self, models: TinyModels) -> None:
        self.model, self.hf = models.hooked("gqa"), models.hf("gqa")
        tokenizer = self.model.tokenizer
        self.q, self.z = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in "qz")

    @torch.no_grad()
    def logits(self, wave: np.ndarray) -> Tensor:
        x = self.model.prepare(wave, "Sound? Say.")
        found: Tensor = self.hf(**self.model.hf_arguments(x)).logits[0, -1].double()
        return found

    def margin(self, wave: np.ndarray) -> float:
        logits = self.logits(wave)
        return float(logits[self.q] - logits[self.z])

    @contextmanager
    def hooked(self, place: str, make: Any) -> Iterator[None]:
        """Hooks of all blocks; ``make`` gets the block's number and what its neurons did."""
        handles = [
            module.register_forward_hook(lambda _, given, out, block=block: make(block, out))
            for block, module in enumerate(neurons_of(self.hf, place))
        ]
        yield
        for handle in handles:
            handle.remove()

    def values(self, place: str, wave: np.ndarray) -> list[Tensor]:
        """What neurons do, a tensor for each block."""
        kept: dict[int, Tensor] = {}
        with self.hooked(place, lambda block, out: kept.update({block: out.clone()})):
            self.logits(wave)
        return [kept[block] for block in sorted(kept)]


@pytest.fixture(scope="module")
def published(tiny_models: TinyModels) -> Published:
    return Published(tiny_models)


def test_attacks_are_what_the_published_model_hears(
    finished: RunFolder, published: Published, waves: Mapping[str, Any]
) -> None:
    """Loss and margins, clean and attacked, of every clip; eps; and what is attacked."""
    rows = finished.read_table("attack")
    assert {*rows.label} == {"q"}
    assert {*rows["clip"]} == {*waves}
    for row in rows.to_dict("records"):
        clean, attacked = waves[row["clip"]]
        logits = published.logits(attacked)
        assert row["loss"] == pytest.approx(-logits.log_softmax(-1)[published.z].item(), abs=ATOL)
        assert row["margin"] == pytest.approx(published.margin(attacked), abs=ATOL)
        assert row["margin_clean"] == pytest.approx(published.margin(clean), abs=ATOL)
        assert row["loss"] < row["loss_start"]
        assert np.abs(attacked - clean).max() <= 0.05 + 1e-6
        is_target = int(logits.argmax()) == published.z
        assert (row["answer"] == "z") == is_target
    steps = finished.read_table("losses").groupby("clip").step.max()
    assert {*steps} == {3}


def chosen_by_hand(
    rows: pd.DataFrame, published: Published, waves: Mapping[str, Any], place: str
) -> list[tuple[int, int]]:
    """The most sensitive neurons of a place, from the published model's activations."""
    total: Any = 0.0
    for clip in rows["clip"][rows.half == "discovery"]:
        clean, attacked = (published.values(place, wave) for wave in waves[clip])
        n = 20 if place == "audio" else None  # 40 frames; the encoder's others are padding
        sums = [
            (b - a).flatten(0, -2)[:n].sum(0).abs() for a, b in zip(clean, attacked, strict=True)
        ]
        total = total + torch.stack(sums).numpy()
    best = np.argsort(-total, axis=None, kind="stable")[: int(total.size / 10)]
    return [(int(i // total.shape[1]), int(i % total.shape[1])) for i in best]


@pytest.mark.parametrize("place", PLACES)
def test_neurons_and_defences_are_those_of_the_published_model(
    finished: RunFolder, published: Published, waves: Mapping[str, Any], place: str
) -> None:
    """Every defence of a place, of every clip that is defended: rows and neurons by hooks."""
    attack, listed = finished.read_table("attack"), finished.read_table("sensitivity")
    listed = listed[listed.place == place]
    mine = listed[listed.chosen_by == "sensitive"]
    found = [*zip(mine.block, mine.neuron, strict=True)]
    assert found == chosen_by_hand(attack, published, waves, place)
    rows = finished.read_table("defences")
    rows = rows[rows.place == place]
    assert {*rows["clip"]} == {*attack["clip"][attack.half == "held-out"]}
    n_all = sum(one.shape[-1] for one in published.values(place, next(iter(waves.values()))[0]))
    for row in rows.to_dict("records"):
        clean, attacked = waves[row["clip"]]
        donors = {"clean": clean, "denoised": spectral_gate(attacked, 16_000)}
        donor = published.values(place, donors.get(row["donor"], clean))
        units = listed[listed.chosen_by == row["chosen_by"]].iloc[
            : int(n_all * row["percent"] / 100)
        ]
        hook = holding({**row, "units": units, "donor": donor})
        with published.hooked(place, hook):
            assert row["margin"] == pytest.approx(published.margin(attacked), abs=ATOL), row


def holding(row: dict[str, Any]) -> Callable[[int, Tensor], Tensor]:
    """Hooks of a defence: of a block's number, and of what its neurons did."""

    def hold(block: int, out: Tensor) -> Tensor:
        out, at = out.clone(), row["units"].neuron[row["units"].block == block].tolist()
        if row["kind"] == "patch":
            out[..., at] = row["donor"][block][..., at]
        else:
            out[..., at] = 0 if row["kind"] == "prune" else out[..., at] + 0.5
        return out

    return hold


def test_clean_clips_and_inputs(
    finished: RunFolder, published: Published, waves: Mapping[str, Any]
) -> None:
    """Own values change nothing; an input without noise is heard as such."""
    utility, rows = finished.read_table("utility"), finished.read_table("defences")
    own = utility[(utility.donor == "clean") & (utility.place != "input")]
    assert {*own.place} == {*PLACES}
    np.testing.assert_allclose(own.margin, own.margin_before, atol=ATOL)
    assert {*utility.label} == {"q", "z"}
    assert {*utility.chosen_by} == {"sensitive"}
    for row in rows[rows.kind == "denoise"].to_dict("records"):
        denoised = spectral_gate(waves[row["clip"]][1], 16_000)
        assert row["margin"] == pytest.approx(published.margin(denoised), abs=ATOL)


def test_stopped_and_in_two_processes(
    finished: RunFolder, tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(toy(tiny_models, table), [2, 5]), tmp_path / "stopped")
    runner.run(toy(tiny_models, table), tmp_path / "stopped")
    runner.run(toy(tiny_models, table), tmp_path / "two", executor=Processes(2))
    expected = results(finished.path)
    assert results(tmp_path / "stopped") == results(tmp_path / "two") == expected


def test_the_published_choices_are_seen(
    tiny_models: TinyModels, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C45: a patch changes nothing, and the control says so. C20: beyond eps, into one half."""
    monkeypatch.setattr(TriggerDefence, "page", lambda self, page, run: None)
    settings = {key: value for key, value in SMALL.items() if key not in ("eps", "alpha", "steps")}
    config = TriggerDefenceConfig(
        model=str(tiny_models.folder()), audio=str(table), variant="seed", steps=2, **settings
    )
    assert (config.eps, config.alpha, config.stop_loss) == (0.05, 0.0005, 1.0)
    folder = runner.run(TriggerDefence(config), tmp_path / "run")
    controls = folder.read_table("controls").set_index("control").verdict
    failed = {*controls.index[controls == "FAIL"]}
    assert {"a patch is no identity", "perturbations are within eps and full scale"} <= failed
    rows = folder.read_table("defences")
    patched = rows[rows.kind == "patch"]
    np.testing.assert_allclose(patched.margin, patched.margin_before, atol=ATOL)
    assert (folder.read_table("attack").largest > 0.1).all()
    assert sorted(folder.read_json("run.json", "")["known_defects"]) == ["C20", "C45"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "angry"}, "expected one of the labels q, z. Targets are the model's own"),
        ({"target": "prompts.txt"}, "no file of prompts"),
        ({"group": "room"}, "table.csv line 2: room: missing"),
        ({"label_column": "pitch"}, "line 2: pitch: missing"),
        ({"dictionary": "nowhere"}, "nowhere"),
    ],
)
def test_refused(
    settings: dict[str, Any], message: str, tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(HookedALMError, match=message):
        runner.run(toy(tiny_models, table, **settings), tmp_path / "run")
    assert not (tmp_path / "run/units").exists()


def test_one_speaker_cannot_be_halved(tiny_models: TinyModels, tmp_path: Path) -> None:
    table = write_table(tmp_path, speakers=1)
    with pytest.raises(InputError, match="got one group"):
        runner.run(toy(tiny_models, table), tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attack_prompts_file=prompts.txt"], "no file of prompts is read"),
        (["percent=0.5"], "percents must name each once"),
        (["places=[lm, lm]"], "places: .*expected each only once"),
        (["eps=0"], "eps"),
        (["places=[decoder]"], "places"),
    ],
)
def test_settings_that_do_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(TriggerDefenceConfig, words=words)
