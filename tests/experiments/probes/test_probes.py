"""``probes`` as a whole: a user's table on a tiny model, and what is planted into one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.experiments.probes.experiment import Probes
from hooked_alm.experiments.probes.settings import ProbesConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.inputs import AudioClip
from hooked_alm.methods.statistics.probing import grouped_probe
from hooked_alm.points import hook_name
from noise_clips import noise_table
from stopped_runs import interrupted, results
from tiny import MELS, N_LAYERS, TinyModels
from tolerances import ENCODER_BATCH
from whisper_toy import LAYERS, Whispers

N, N_SPEAKERS = 24, 6
MOODS = [("calm", "glad")[(n // N_SPEAKERS + n) % 2] for n in range(N)]
GENDERS = ["fm"[n % N_SPEAKERS % 2] for n in range(N)]
"""A speaker has one of these."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of six speakers, in two texts each, of three durations."""
    every = range(N)
    return noise_table(
        tmp_path_factory.mktemp("clips"), [0.3 + 0.1 * (n % 3) for n in every],
        speaker=[f"s{n % N_SPEAKERS}" for n in every],
        text=[f"t{n % N_SPEAKERS}{n % 2}" for n in every],
        mood=MOODS, gender=GENDERS,
        taste=["" if n % 4 == 0 else "ab"[n % 3 > 0] for n in every],
        level=["one"] * N, length=["long" if n % 3 == 2 else "short" for n in every],
    )  # fmt: skip


def config(model: Path, table: Path, **changes: Any) -> ProbesConfig:
    given = {"labels": ("mood", "gender"), "n_resamples": 1000, "n_folds": 3, "batch_size": 4}
    return ProbesConfig(
        model=str(model), audio=str(table), **{**given, "unit_batches": 2, **changes}
    )


@pytest.fixture(scope="module")
def run(
    small_figures: None, tiny_models: TinyModels, table: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:  # fmt: skip
    out = tmp_path_factory.mktemp("run") / "run"
    return runner.run(Probes(config(tiny_models.folder(), table)), out)


@pytest.fixture
def unpaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest."""
    monkeypatch.setattr(Probes, "page", lambda self, page, run: None)


def kept(run: RunFolder, source: str, point: str) -> np.ndarray:
    files = sorted(run.path.glob(f"arrays/{source}__*.safetensors"))
    return np.concatenate([load_file(file)[point] for file in files])


# --- What is measured


def test_features_are_means_of_the_models_states(
    run: RunFolder, table: Path, gqa: HookedALM
) -> None:
    assert len([*run.path.glob("arrays/*")]) == 2 * 3
    resid, frames = hook_name("resid_post", "blocks.2"), "audio.encoder.blocks.1.hook_resid_post"
    for n in (0, 7, 23):
        x = gqa.prepare(table.parent / f"c{n}.wav", "What do you hear?")
        _, cache = gqa.run_with_cache(x, names_filter=[resid, frames])
        expected = cache[resid][x.spans.mask("audio")].double().mean(0)
        found = kept(run, "model", resid)[n]
        np.testing.assert_allclose(found, expected, atol=ENCODER_BATCH[torch.float32])
        # A frame of the encoder hears 20 ms; those behind the clip are no part of it.
        expected = cache[frames][0, : round(50 * (0.3 + 0.1 * (n % 3)))].double().mean(0)
        found = kept(run, "model", frames)[n]
        np.testing.assert_allclose(found, expected, atol=ENCODER_BATCH[torch.float32])
        assert np.abs(kept(run, "untrained", frames)[n] - found).max() > 0.1


def test_baselines_know_the_clip_alone(run: RunFolder, table: Path, gqa: HookedALM) -> None:
    assert (kept(run, "model", "majority") == 0).all()
    seconds = [0.3 + 0.1 * (n % 3) for n in range(N)]
    np.testing.assert_allclose(kept(run, "model", "duration")[:, 0], seconds, atol=1e-6)
    clip = gqa.read_clip(table.parent / "c1.wav")
    expected = clip.features[0, :, :40].double().mean(1)
    assert len(expected) == MELS
    np.testing.assert_allclose(kept(run, "model", "log_mel")[1], expected, atol=1e-6)
    baselines = run.read_table("baselines").set_index(["label", "point"])
    # Half of the clips have either mood; of no feature, every clip of a fold is told the same.
    assert 0.3 <= baselines.accuracy["mood", "majority"] <= 0.5
    assert {*baselines.index} == {
        (label, point) for label in ("mood", "gender")
        for point in ("majority", "duration", "log_mel")
    }  # fmt: skip


def test_every_clip_is_read_by_a_probe_of_other_speakers(run: RunFolder) -> None:
    reads, probes = run.read_table("reads"), run.read_table("probes")
    n_points = N_LAYERS + 1 + 2 + 1
    assert len(reads) == 2 * N * (2 * n_points + 3)
    assert len(probes) == 2 * 2 * n_points
    assert {*probes.n_groups} == {N_SPEAKERS}
    point = hook_name("resid_post", "blocks.1")
    mine = reads[(reads.label == "mood") & (reads.source == "model") & (reads.point == point)]
    codes, speakers = np.array([m == "glad" for m in MOODS], np.int64), mine.group.tolist()
    assert speakers == [f"s{n % N_SPEAKERS}" for n in range(N)]
    x = kept(run, "model", point).astype(np.float64)
    held = grouped_probe(x, codes, speakers, mine.fold.to_numpy())
    assert mine.said.tolist() == [("calm", "glad")[i] for i in held.probabilities.argmax(1)]
    assert mine.value.tolist() == MOODS
    row = probes.set_index(["label", "source", "point"]).loc["mood", "model", point]
    assert row.accuracy == pytest.approx((held.probabilities.argmax(1) == codes).mean())
    assert row.depth == 2
    assert {*run.read_table("controls").verdict} == {"pass"}
    assert {*run.read_table("probes").stream} == {"decoder", "encoder"}


def test_shuffled_labels_are_read_at_chance(run: RunFolder) -> None:
    """M-BT-6: within the interval, over the points of a model that has learnt nothing."""
    shuffled = run.read_table("shuffled")
    assert len(shuffled) == 2 * 8
    inside = (shuffled.low <= shuffled.chance) & (shuffled.chance <= shuffled.high)
    assert inside.mean() >= 0.75
    assert shuffled.accuracy.mean() == pytest.approx(shuffled.chance.mean(), abs=0.1)


def test_its_page_says_what_was_read(run: RunFolder) -> None:
    page = (run.path / "report.html").read_text("utf-8")
    for words in (
        "mood (2 values, 24 clips of 6 groups)",
        "Not causal",
        "times shorter",
        "of 6 speakers",
        "trained on other groups",
        "model with random weights. The",
    ):
        assert words in page  # fmt: skip
    assert len([*run.path.glob("figures/*.csv")]) == 2 * 4


def test_a_page_is_silent_of_what_was_not_done(
    tiny_models: TinyModels, table: Path, tmp_path: Path, small_figures: None
) -> None:
    """No random weights, no groups, no types: one clip of every speaker and text."""
    short = table.parent / "short.csv"
    lines = table.read_text("utf-8").splitlines()[: 1 + 8]
    rows = [line.split(",") for line in lines]
    short.write_text("\n".join(f"{row[0]},{row[3]}" for row in rows) + "\n", "utf-8")
    settings = config(tiny_models.folder(), short, labels=("mood",), untrained=False)
    found = runner.run(Probes(settings), tmp_path / "run")
    page = (found.path / "report.html").read_text("utf-8")
    assert "No two clips with mood share a type" in page
    assert "at random. The clips" in page
    assert len([*found.path.glob("figures/*.csv")]) == 3
    claims = found.read_table("findings").set_index("claim").statement
    assert "no two clips share a type" in claims["selective: mood in the decoder"]


# --- What is planted


class Flagged(Probes):
    """The model, with y·u added to its stream behind a block, y the clip's mood."""

    first = 0
    """Depth of the flag."""

    def batch_features(self, clips: Sequence[AudioClip], numbers: Sequence[int]) -> Any:
        sign = torch.tensor([1.0 if MOODS[n] == "glad" else -1.0 for n in numbers])
        along = torch.randn(self.model.cfg.d_model, generator=torch.Generator().manual_seed(3))

        def add(value: Tensor, hook: Any) -> Tensor:
            return value + 5 * sign[:, None, None] * along

        name = hook_name("resid_pre", f"blocks.{self.first}")
        with self.model.hooks(fwd_hooks=[(name, add)]):
            return super().batch_features(clips, numbers)


@pytest.mark.usefixtures("unpaged")
@pytest.mark.parametrize("first", [1, 3])
def test_a_flag_is_read_from_where_it_was_added(
    first: int, tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    """M-BT-5: chance below k0, 0.95 and more from k0 on; at another k0 the step moves."""
    experiment = Flagged(
        config(tiny_models.folder(), table, labels=("mood",), untrained=False,
               points=["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"])
    )  # fmt: skip
    experiment.first = first
    found = runner.run(experiment, tmp_path / "run")
    probes = found.read_table("probes").set_index("depth").accuracy
    assert sorted(probes.index) == [*range(N_LAYERS + 1)]
    for depth in range(N_LAYERS + 1):
        # The hook writes what block `first` gets; what the block before it gave is as it was.
        if depth <= first:
            assert probes[depth] < 0.75, depth
        else:
            assert probes[depth] >= 0.95, depth
    claims = found.read_table("findings").set_index("claim")
    assert claims.established["decodable: mood in the decoder"]
    assert claims.established["deeper: mood in the decoder"]
    assert not claims.established["learnt: mood in the decoder"]
    assert "random weights were not read" in claims.statement["learnt: mood in the decoder"]


@pytest.mark.usefixtures("unpaged")
def test_what_the_duration_tells_is_not_found_in_the_model(
    tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    """M-BT-5: a column that says how long a clip is can be read, and nothing is claimed of it."""
    settings = config(tiny_models.folder(), table, labels=("length",), untrained=False)
    found = runner.run(Probes(settings), tmp_path / "run")
    baselines = found.read_table("baselines").set_index("point").accuracy
    assert baselines["duration"] == 1
    assert found.read_table("probes").accuracy.max() >= 0.9
    claims = found.read_table("findings").set_index("claim")
    for stream in ("decoder", "encoder"):
        decodable = claims.loc[f"decodable: length in the {stream}"]
        assert not decodable.established
        assert "1.00 by the best baseline, duration" in decodable.statement


@pytest.mark.usefixtures("unpaged")
def test_length_is_a_decoy_until_lengths_are_matched(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    """M-BT-5: "longer than 0.6 s", but for two clips of every length, is read at 0.9 and more.

    Clips of equal length, one of each label, leave nothing to read.
    """
    seconds, n_each = [0.4, 0.5, 0.7, 0.8] * 24, 24
    is_long = [(length > 0.6) != (n < 2 * 4) for n, length in enumerate(seconds)]
    noise_table(
        tmp_path, seconds, length=["long" if one else "short" for one in is_long],
        speaker=[f"s{n // 4}" for n in range(4 * n_each)],
    )  # fmt: skip
    best, n_read = {}, {}
    for width in (None, 0.05):
        settings = config(
            tiny_models.folder(), tmp_path / "table.csv", labels=("length",), untrained=False,
            match_duration_s=width, points=["blocks.*.hook_resid_post"],
        )  # fmt: skip
        found = runner.run(Probes(settings), tmp_path / f"run {width}")
        every = {name: found.read_table(name) for name in ("probes", "baselines", "findings")}
        n_read[width] = {*every["probes"].n}
        best[width] = every["probes"].accuracy.max(), every["baselines"].accuracy.max()
        claims = every["findings"].set_index("claim")
        assert not claims.established["decodable: length in the decoder"]
    assert n_read == {None: {4 * n_each}, 0.05: {2 * 8}}
    assert min(best[None]) >= 0.9
    assert max(best[0.05]) <= 0.75


# --- Runs


@pytest.mark.usefixtures("unpaged")
def test_stopped_or_in_two_processes_it_leaves_the_same_bytes(
    run: RunFolder, tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    def again() -> Probes:
        return Probes(config(tiny_models.folder(), table))

    def files(path: Path) -> dict[str, bytes]:
        return {k: v for k, v in results(path).items() if k.split("/")[0] in ("tables", "arrays")}

    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(again(), {5}), tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(again(), {9}), tmp_path / "stopped")
    for name, executor in (("stopped", {}), ("two", {"executor": Processes(2)})):
        found = runner.run(again(), tmp_path / name, **executor)
        assert files(found.path) == files(run.path)


@pytest.mark.usefixtures("unpaged")
def test_units_do_not_depend_on_who_heard_before(
    run: RunFolder, tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    """A worker that has made the model untrained loads it again."""
    experiment = Probes(config(tiny_models.folder(), table))
    experiment.folder = RunFolder(tmp_path / "run")
    experiment.identify()
    units = {unit.id: unit for unit in experiment.units()}
    experiment.load()
    for name in ("untrained__000000", "model__000000", "untrained__000008"):
        experiment.measure(units[name])
        file = f"arrays/{name}.safetensors"
        assert experiment.folder.read(file) == run.read(file)


def test_features_that_were_changed_are_not_read(
    tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    experiment = Probes(config(tiny_models.folder(), table, labels=("mood",), untrained=False))
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(experiment, {6}), out)
    (out / "arrays" / "model__000008.safetensors").write_bytes(b"other")
    again = Probes(experiment.config)
    with pytest.raises(InputError, match=r"got another file than its unit left. Delete .*000008"):
        runner.run(again, out)


@pytest.mark.usefixtures("unpaged")
def test_clips_without_a_label_are_left_out(
    tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    settings = config(
        tiny_models.folder(), table, labels=("taste",), points=["blocks.1.attn.hook_z"],
        span="readout", untrained=False,
    )  # fmt: skip
    found = runner.run(Probes(settings), tmp_path / "run")
    probes = found.read_table("probes")
    assert (probes.n.item(), probes.stream.item()) == (18, "decoder attn.hook_z")
    x = kept(found, "model", "blocks.1.attn.hook_z").astype(np.float64)
    assert len(x) == N
    reads = found.read_table("reads")
    mine = reads[reads.source == "model"]
    assert mine["clip"].tolist() == [f"c{n}" for n in range(N) if n % 4]
    codes = np.array([value == "b" for value in mine.value], np.int64)
    held = grouped_probe(
        x[np.arange(N) % 4 > 0], codes, mine.group.tolist(), mine.fold.to_numpy()
    )  # fmt: skip
    assert mine.said.tolist() == [*map("ab".__getitem__, held.probabilities.argmax(1))]


@pytest.mark.usefixtures("unpaged")
def test_whisper_is_read_at_its_readout(whispers: Whispers, table: Path, tmp_path: Path) -> None:
    settings = config(whispers.folder(), table, labels=("mood",), language="en", untrained=False)
    found = runner.run(Probes(settings), tmp_path / "run")
    probes = found.read_table("probes")
    assert probes.groupby("stream").depth.max().to_dict() == LAYERS
    model = whispers.hooked()
    x = model.prepare(table.parent / "c3.wav", language="en")
    name = hook_name("resid_post", "blocks.1")
    _, cache = model.run_with_cache(x, names_filter=name)
    expected = cache[name][x.spans.mask("readout")][0]
    np.testing.assert_allclose(
        kept(found, "model", name)[3], expected, atol=ENCODER_BATCH[torch.float32]
    )


@pytest.mark.usefixtures("unpaged")
def test_random_folds_are_refused_and_take_claims_back(
    tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    """C58: a speaker's label is read of speakers that the probe knows."""

    def settings(**more: Any) -> ProbesConfig:
        given = {"labels": ("gender",), "untrained": False, "cv": "random", **more}
        return config(tiny_models.folder(), table, **given)

    with pytest.raises(InputError, match="the table has the column speaker"):
        runner.run(Probes(settings()), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    found = runner.run(Probes(settings(force=True)), tmp_path / "run")
    claims, controls = found.read_table("findings"), found.read_table("controls")
    assert not claims.established.any()
    assert claims.statement.str.contains("known defects C58").all()
    assert "not applicable" in set(controls.verdict)
    decodable = claims.set_index("claim").statement["decodable: gender in the decoder"]
    assert "the speaker of 100% of the clips is in other folds, too" in decodable


def test_what_cannot_be_probed_is_refused_before_anything_is_written(
    tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    folder, out = tiny_models.folder(), tmp_path / "run"
    for match, changes in {
        r"no column smell, but gender": {"labels": ("smell",)},
        r"probing clips: level: got \['one'\] alone": {"labels": ("level",)},
        r"expected one of .*audio.*readout": {"span": "label"},
        r"matches none": {"points": ["blocks.9.*"]},
        r"got a device_map that leaves some on the disk": {"device_map": {"": "disk"}},
    }.items():
        with pytest.raises((InputError, ValueError), match=match):
            runner.run(Probes(config(folder, table, **changes)), out)
    assert not out.exists()
