"""``tuned_lens`` as a run: against plain Hugging Face, killed and resumed, and every bad input."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2AudioForConditionalGeneration

from circuits_toy import write_tones
from hooked_alm import HookedALM
from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.materials.ob1 import ob1_clip_names
from hooked_alm.experiments.materials.recordings import load_recordings
from hooked_alm.experiments.materials.trained_lens import LensCard, load_lens, save_lens
from hooked_alm.experiments.tuned_lens.experiment import TuneLens
from hooked_alm.experiments.tuned_lens.items import ob1_prompts, read_prompts
from hooked_alm.experiments.tuned_lens.settings import TunedLensConfig
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.identity import to_json
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.methods.reading.tuned_lens import LensTrainer, TunedLens, unembed_hash
from stopped_runs import kill, needs_kill, results, start, units, wait_for
from tiny import N_LAYERS, TinyModels
from tolerances import BATCHED_ROWS, LENS_SUMS
from tuned_lens_toy import run_tuned_lens
from tuned_lens_verdicts import toy_results

N_GROUPS = 8
SMALL: dict[str, Any] = {
    "n_steps": 12, "prompts_per_step": 4, "steps_per_checkpoint": 5, "n_resamples": 1000,
    "n_threads": 1,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts on each of eight clips; a clip is a group."""
    folder = tmp_path_factory.mktemp("prompts")
    clips = write_tones(folder, N_GROUPS)
    lines = [
        {"prompt": {"audio": clip, "text": text}, "group": clip.removesuffix(".wav")}
        for clip in clips
        for text in ("What emotion is it?", "说话人的情绪是什么？ Answer with one word.")
    ]
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    return file


def toy(tiny_models: TinyModels, prompts: Path, **settings: Any) -> TuneLens:
    values = {"model": str(tiny_models.folder()), "prompts": str(prompts), **SMALL, **settings}
    return TuneLens(TunedLensConfig(**values))


@pytest.fixture(scope="module")
def finished(
    tiny_models: TinyModels, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    return runner.run(toy(tiny_models, prompts), tmp_path_factory.mktemp("run") / "run")


# --- What a run leaves


def test_a_run_has_its_lens_and_its_report(finished: RunFolder, gqa: HookedALM) -> None:
    found = results(finished.path)
    assert {"lens/params.safetensors", "lens/config.json", "report.json"} <= found.keys()
    assert not [name for name in found if name.startswith("checkpoints")]
    for name in ("held_out_kl", "held_out_agrees", "by_place", "training"):
        assert {f"figures/{name}.png", f"figures/{name}.csv"} <= found.keys()
    lens = load_lens(finished.path / "lens", gqa)
    assert not any(parameter.requires_grad for parameter in lens.parameters())
    assert all(translator.weight.any() for translator in lens.translators)
    card = json.loads((finished.path / "lens/config.json").read_text("utf-8"))
    assert card["unembed_sha256"] == unembed_hash(gqa)
    assert (card["scored"], card["n_layers"], card["d_model"]) == ("all", N_LAYERS, 54)
    run = finished.provenance["inputs"]
    held_out = set(run["held_out_groups"])
    assert len(held_out) == 3
    assert set(card["training"]["groups"]) == {f"tone{i}" for i in range(N_GROUPS)} - held_out
    assert set(finished.read_table("held_out").group) == held_out
    page = (finished.path / "report.html").read_text("utf-8")
    assert "The loss counts every position, audio included." in page
    assert "Not established" not in page  # headlines give the reasons as their detail


def test_control_and_training_table(finished: RunFolder) -> None:
    assert (finished.read_table("untrained").difference == 0).all()
    assert set(finished.read_table("controls").verdict) == {"pass"}
    training = finished.read_table("training")
    assert training.step.nunique() == 12
    assert training.depth.nunique() == N_LAYERS
    by_step = training.groupby("step").kl.sum()
    assert by_step.iloc[-4:].mean() < by_step.iloc[:4].mean()
    rates = training.groupby("step").learning_rate.first().to_numpy()
    np.testing.assert_allclose(rates, 0.1 * (12 - np.arange(12)) / 12, rtol=1e-12)


def hf_states(hf: Qwen2AudioForConditionalGeneration, x: Any) -> list[torch.Tensor]:
    """Every depth's residual stream of one prompt, from Hugging Face and one PyTorch hook."""
    kept: list[torch.Tensor] = []
    norm = hf.model.language_model.norm if hasattr(hf.model, "language_model") else None
    assert norm is not None
    handle = norm.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    frames = torch.arange(x.clips[0].features.shape[-1])
    try:
        out = hf(
            input_ids=x.tokens,
            attention_mask=x.attention_mask,
            position_ids=x.position_ids,
            input_features=torch.cat([clip.features for clip in x.clips]),
            feature_attention_mask=torch.stack([frames < c.n_frames[0] for c in x.clips]).long(),
            output_hidden_states=True,
        )
    finally:
        handle.remove()
    # The last of hidden_states is normed already; the hook has it before (defect C2).
    return [*(state[0] for state in out.hidden_states[:-1]), kept[0][0]]


@torch.no_grad()
def test_held_out_numbers_are_those_of_plain_hugging_face(
    finished: RunFolder, prompts: Path, tiny_models: TinyModels, gqa: HookedALM
) -> None:
    """KL and agreement of both lenses at every depth and place, cell by cell."""
    hf = tiny_models.hf()
    params = load_file(finished.path / "lens/params.safetensors")
    table = finished.read_table("held_out").set_index(["prompt", "place", "depth"])
    head = hf.get_output_embeddings().weight
    norm = hf.model.language_model.norm
    n_checked = 0
    for one in read_prompts(prompts):
        if one.id not in table.index.get_level_values(0):
            continue
        side = one.prompt
        x = gqa.prepare(str(side.audio[0]), side.parts[0][1])
        states = hf_states(hf, x)
        target = (norm(states[-1]) @ head.T).double().log_softmax(-1)
        places = {"scored": list(range(x.shape[1]))}
        places |= {place: x.spans.positions(place, 0) for place in ("audio", "text", "readout")}
        places["struct"] = x.spans.positions("struct", 0) + x.spans.positions("audio_struct", 0)
        for depth, r in enumerate(states):
            moved = r
            if depth < N_LAYERS:
                name = f"translators.{depth}"
                moved = r + r @ params[f"{name}.weight"].T + params[f"{name}.bias"]
            for lens, rows in (("logit", r), ("tuned", moved)):
                log_p = (norm(rows) @ head.T).double().log_softmax(-1)
                kl = (target.exp() * (target - log_p)).sum(-1)
                agrees = (log_p.argmax(-1) == target.argmax(-1)).double()
                for place, positions in places.items():
                    row = table.loc[(one.id, place, depth)]
                    assert row.n_positions == len(positions)
                    assert row[f"kl_{lens}"] == pytest.approx(
                        float(kl[positions].mean()), abs=LENS_SUMS
                    )
                    assert row[f"agrees_{lens}"] == pytest.approx(float(agrees[positions].mean()))
                    n_checked += 1
    assert n_checked == 2 * len(table) > 0


def test_scored_positions(tiny_models: TinyModels, prompts: Path) -> None:
    """What is left out of the loss moves nothing: neither its tokens nor the translators."""
    n_tokens = {}
    for scored in ("all", "without_audio", "readout"):
        one = toy(tiny_models, prompts, scored=scored)
        one.identify()
        one.load()
        x = one.inputs[one.train[0].id]
        every = x.attention_mask[0].nonzero().flatten().tolist()
        audio = x.spans.positions("audio", 0)
        expected = {
            "all": every,
            "without_audio": [pos for pos in every if pos not in audio],
            "readout": every[-1:],
        }[scored]
        assert one._positions(x) == expected
        rows = one._rows(one.train[0].id)
        assert rows.shape == (N_LAYERS + 1, len(expected), 54)
        n_tokens[scored] = len(expected)
        assert one._card().scored == scored
    assert n_tokens["all"] > n_tokens["without_audio"] > n_tokens["readout"] == 1


def test_steps_pass_over_all_prompts_before_any_comes_again(
    tiny_models: TinyModels, prompts: Path
) -> None:
    one = toy(tiny_models, prompts)
    one.identify()
    one.load()
    assert len(one.train) == 10
    stream = [prompt.id for step in range(15) for prompt in one._prompts_of(step)]
    passes = [stream[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(some) == sorted(p.id for p in one.train) for some in passes)
    assert passes[0] != passes[1]


def test_memory_changes_no_byte(
    finished: RunFolder, tiny_models: TinyModels, prompts: Path, tmp_path: Path
) -> None:
    one = toy(tiny_models, prompts, max_bytes=0)
    runner.run(one, tmp_path / "run")
    assert not one._kept
    for name in ("lens/params.safetensors", "tables/held_out.parquet", "tables/training.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (finished.path / name).read_bytes(), name


def test_batches_train_and_judge_alike(
    finished: RunFolder, tiny_models: TinyModels, prompts: Path, tmp_path: Path
) -> None:
    """To rounding; and streams are the same to the bit whatever is asked for first."""
    batches = {"batch_size": 3, "unit_batches": 2}
    one = toy(tiny_models, prompts, **batches)
    folder = runner.run(one, tmp_path / "run")
    assert {len(batch) for batch in one._batches.values()} == {1, 3}
    for name in ("training", "held_out"):
        ours, theirs = folder.read_table(name), finished.read_table(name)
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3, atol=BATCHED_ROWS)
    # With room for some, in any order, as before and after a kill.
    some = sum(rows.numel() * rows.element_size() for rows in [*one._kept.values()][:4])
    first, again = (toy(tiny_models, prompts, **batches, max_bytes=some) for _ in range(2))
    for other in (first, again):
        other.identify()
        other.load()
    ours = {prompt.id: first._rows(prompt.id) for prompt in first.train}
    for prompt in reversed(again.train):
        assert torch.equal(again._rows(prompt.id), ours[prompt.id])
    assert 0 < len(again._kept) < len(again.train)


# --- Killed and resumed


class Killed(BaseException):
    """What a process that is gone would not do."""


@pytest.mark.parametrize("moment", ["mid-unit", "before the shard", "amid evaluation", "lens"])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    finished: RunFolder,
    tiny_models: TinyModels,
    prompts: Path,
    tmp_path: Path,
    moment: str,
) -> None:
    """In a step, between a checkpoint and its shard, while judging, and while the lens is saved."""
    out = tmp_path / "run"
    calls = {"step": 0, "json": 0}
    step, write = LensTrainer.step, RunFolder.write_json

    def stop_at_step(self: LensTrainer, batches: Any) -> Any:
        calls["step"] += 1
        if moment == "mid-unit" and calls["step"] == 8:
            raise Killed
        return step(self, batches)

    def stop_at_shard(self: RunFolder, name: str, value: Any) -> None:
        if moment == "before the shard" and name.endswith("train__0001.json"):
            assert (out / "checkpoints/step_000010.safetensors").exists()
            raise Killed
        calls["json"] += name.startswith("units/heldout")
        if moment == "amid evaluation" and calls["json"] == 3:
            raise Killed
        write(self, name, value)

    def stop_at_lens(lens: TunedLens, card: LensCard, folder: Path) -> None:
        save_lens(lens, card, folder)
        (folder / "config.json").unlink()
        raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LensTrainer, "step", stop_at_step)
        patched.setattr(RunFolder, "write_json", stop_at_shard)
        if moment == "lens":
            patched.setattr("hooked_alm.experiments.tuned_lens.experiment.save_lens", stop_at_lens)
        with pytest.raises(Killed):
            runner.run(toy(tiny_models, prompts), out)
    assert not (out / "report.json").exists()
    n_before = calls["step"]
    # From the last whole unit on, not from the start; the last training unit writes the lens.
    left = 2 if moment == "lens" else {8: 7, 10: 7, 12: 0}[n_before]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LensTrainer, "step", stop_at_step)
        moment, calls["step"] = "", 0
        runner.run(toy(tiny_models, prompts), out)
    assert calls["step"] == left
    assert results(out) == results(finished.path)
    if n_before == 8:  # once more: a finished run is found finished
        runner.run(toy(tiny_models, prompts), out)
        assert results(out) == results(finished.path)


@needs_kill
def test_killed_processes_end_with_the_same_bytes(
    tiny_models: TinyModels, prompts: Path, tmp_path: Path
) -> None:
    settings = {
        "model": str(tiny_models.folder()), "prompts": str(prompts),
        **SMALL, "n_steps": 40, "steps_per_checkpoint": 4,
    }  # fmt: skip
    run_tuned_lens(tmp_path / "whole", **settings)
    out = tmp_path / "killed"
    n_done = 0
    for wait in (0.0, 0.05):
        process = start(run_tuned_lens, out, **settings)
        wait_for(lambda before=n_done: len(units(out)) > before)
        time.sleep(wait)
        kill(process)
        before, n_done = n_done, len(units(out))
        assert before < n_done < 10
    run_tuned_lens(out, **settings)
    assert results(out) == results(tmp_path / "whole")


def test_a_lost_checkpoint_is_named(
    tiny_models: TinyModels, prompts: Path, finished: RunFolder, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished.path, out)
    for unit in (out / "units").glob("*.json"):
        if not unit.name.startswith("train__0000"):
            unit.unlink()
    with pytest.raises(InputError, match=r"step_000005.safetensors: got no such file.*delete"):
        runner.run(toy(tiny_models, prompts), out)
    (out / "checkpoints").mkdir()
    (out / "checkpoints/step_000005.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(InputError, match=r"step_000005.safetensors: got a damaged file"):
        runner.run(toy(tiny_models, prompts), out)


def test_a_changed_lens_is_found(
    tiny_models: TinyModels, prompts: Path, finished: RunFolder, tmp_path: Path
) -> None:
    """A well-formed file with other numbers: what training left is known by its hash."""
    out = shutil.copytree(finished.path, tmp_path / "run")
    params = out / "lens/params.safetensors"
    save_file({name: one + 1e-6 for name, one in load_file(params).items()}, params)
    next((out / "units").glob("heldout__*.json")).unlink()
    with pytest.raises(InputError, match=r"params\.safetensors: got a damaged file.* delete"):
        runner.run(toy(tiny_models, prompts), out)


# --- Summaries


def test_summaries_by_hand() -> None:
    run = toy_results(0.25, 7)
    depths = run["depths"].set_index(["place", "depth"])
    row = depths.loc[("scored", 1)]
    assert row.kl_logit == pytest.approx(1.03)
    assert (row.gain, row.gain_low, row.gain_high) == pytest.approx((0.25,) * 3)
    assert (row.improved, row.n_groups) == (1, 7)
    assert depths.loc[("scored", 2), "gain"] == 0
    settling = run["settling"].set_index("lens")
    # The logit lens agrees at the output alone; the tuned one from depth 1, and from 2.
    assert settling["mean"].to_dict() == {"logit": 2, "tuned": 1.5, "earlier": 0.5}
    assert settling.loc["earlier", ["low", "high"]].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("gain", "n_groups", "reason"),
    [(0.25, 7, ""), (0.25, 5, "only 5 held-out groups"), (-0.25, 7, "not surely at depth 0")],
)
def test_findings(gain: float, n_groups: int, reason: str) -> None:
    run = toy_results(gain, n_groups)
    found = TuneLens.judge(run).findings
    assert found["closer"].established == (not reason)
    assert reason in found["closer"].statement
    assert found["earlier"].established == (n_groups >= 6)
    run.tables["untrained"] = run["untrained"].assign(difference=1e-9)
    spoilt = TuneLens.judge(run).findings
    assert not any(one.established for one in spoilt.values())
    assert "an untrained tuned lens is the logit lens" in spoilt["closer"].statement


# --- Bad input


GOOD = {"prompt": {"text": "What is it?"}, "group": "a", "id": "one"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: got no usable JSON"),
        ("[]", "line 2: the line: got \\[\\], expected an object"),
        ({"group": "b"}, "line 2: prompt: missing"),
        ({**GOOD, "id": "two", "answer": "x"}, "line 2: answer: got an unknown field"),
        (
            {"prompt": {"audio": "none.wav"}},
            r"line 2: prompt.audio: got 'none.wav', expected files that",
        ),
        ({"prompt": {"text": " "}}, "line 2: prompt.text: got ' ', expected text"),
        ({"prompt": {}}, "line 2: prompt: got {}, expected audio, an instruction"),
        (
            {"prompt": {"text": "x"}, "id": "a/b"},
            "line 2: id: got 'a/b', expected up to 100 bytes",
        ),
        ({**GOOD, "prompt": {"text": "y"}}, "line 2: id: got 'one', which mine.jsonl line 1 has"),
    ],
)
def test_bad_prompts_by_file_line_and_field(tmp_path: Path, line: Any, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    second = line if isinstance(line, str) else json.dumps(line)
    file.write_text(json.dumps(GOOD) + "\n" + second + "\n", "utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(file)
    assert f"reading prompts from {file}" in str(caught.value)


def test_bad_inputs_stop_before_any_step(
    tiny_models: TinyModels, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="none.jsonl: got No such file"):
        toy(tiny_models, tmp_path / "none.jsonl").identify()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match="got an empty file"):
        toy(tiny_models, empty).identify()
    one_group = tmp_path / "one.jsonl"
    one_group.write_text(json.dumps(GOOD))
    with pytest.raises(InputError, match=r"got one group \(a\), expected at least two"):
        toy(tiny_models, one_group).identify()
    long = tmp_path / "long.jsonl"
    clip = prompts.parent / "tone0.wav"
    spoilt = tmp_path / "spoilt.wav"
    spoilt.write_bytes(b"RIFF")
    lines = [{"prompt": {"audio": str(path), "text": "x"}} for path in (clip, spoilt)]
    long.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=r"preparing prompts: long.jsonl line 2: prompt.audio: "):
        runner.run(toy(tiny_models, long), tmp_path / "run")
    assert not (tmp_path / "run/units").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "seed"}, "variant must be corrected"),
        ({"prompts": "x.jsonl", "audio": "folder"}, "give prompts or audio, not both"),
        ({"scored": "text"}, "scored"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"held_out_share": 1.0}, "held_out_share"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TunedLensConfig(**settings)


# --- A lens on disk


@pytest.fixture
def saved(finished: RunFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.path / "lens", tmp_path / "lens"))


def edit_card(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    card = json.loads(path.read_text("utf-8"))
    card = {key: value for key, value in {**card, **fields}.items() if value is not ...}
    path.write_text(json.dumps(card), "utf-8")


def test_saved_and_loaded_is_the_same(saved: Path, gqa: HookedALM, tmp_path: Path) -> None:
    lens = load_lens(saved, gqa)
    card = LensCard.model_validate_json((saved / "config.json").read_text("utf-8"))
    save_lens(lens, card, tmp_path / "again")
    assert results(tmp_path / "again") == results(saved)


def test_bad_lens_folders(
    saved: Path, finished: RunFolder, gqa: HookedALM, tiny_models: TinyModels
) -> None:
    def refused(match: str, model: HookedALM = gqa, folder: Path = saved) -> None:
        with pytest.raises(InputError, match=match):
            load_lens(folder, model)

    refused("was trained on another model", tiny_models.hooked("mha"))
    refused(r"got no config.json.*run tuned_lens", folder=saved / "none")
    refused(f"Give its lens folder: {finished.path / 'lens'}", folder=finished.path)
    good = (saved / "config.json").read_text("utf-8")
    for fields, match in (
        ({"more": 1}, "more: Extra inputs are not permitted"),
        ({"unembed_sha256": ...}, "unembed_sha256: Field required"),
        ({"unembed_sha256": "abc"}, "unembed_sha256: String should match"),
        ({"format_version": 2}, "format_version: "),
        ({"scored": "some"}, "scored: "),
        ({"n_layers": N_LAYERS + 1}, r"got 2 tensors that do not fit config.json \(translators.4"),
        ({"d_model": 53}, r"translators.0.bias: \(54,\), expected \(53,\)"),
    ):
        edit_card(saved, **fields)
        refused(match)
        (saved / "config.json").write_text(good, "utf-8")
    (saved / "config.json").write_text(good[:40], "utf-8")
    refused(r"config.json: got a damaged file")
    (saved / "config.json").write_text(good, "utf-8")

    params = saved / "params.safetensors"
    tensors = load_file(params)
    save_file({**tensors, "translators.1.bias": torch.full((54,), torch.nan)}, params)
    refused(r"NaN or infinite values in translators.1.bias")
    params.write_bytes(params.read_bytes()[:1000])
    refused(r"params.safetensors: got a damaged file")
    params.unlink()
    refused(r"params.safetensors: got no such file")


# --- In emotion_conflict


BUNDLED = {"modes": ("audio_only", "conflict"), "donors": (), "n_resamples": 1000}


def test_emotion_conflict_reads_through_a_lens(tmp_path: Path) -> None:
    def opened(**settings: Any) -> tuple[EmotionConflict, dict[str, Any]]:
        one = EmotionConflict(EmotionConflictConfig(**BUNDLED, **settings))
        inputs = one.identify()
        one.load()
        return one, inputs

    plain, without = opened()
    model = plain.model
    assert "tuned_lens" not in without
    lens = TunedLens.untrained(model)
    card = LensCard(
        model="bundled:follows_text", dtype="float32", n_layers=10, d_model=96,
        unembed_sha256=lens.unembed_sha256, scored="all",
    )  # fmt: skip
    save_lens(lens, card, tmp_path / "untrained")
    for translator in lens.translators:
        translator.bias.normal_()
    save_lens(lens, card, tmp_path / "moved")

    units = [unit for unit in plain.units() if "conflict" in unit.id][:1]
    expected = plain.measure(units[0]).tables
    untrained, found = opened(tuned_lens=str(tmp_path / "untrained"))
    assert len(found["tuned_lens"]["params_sha256"]) == 64
    # As text, because the sink's mass without the sink is NaN.
    assert to_json(untrained.measure(units[0]).tables) == to_json(expected)
    moved, other = opened(tuned_lens=str(tmp_path / "moved"))
    assert found["tuned_lens"] != other["tuned_lens"]
    tables = moved.measure(units[0]).tables
    assert tables["runs"] == expected["runs"]
    assert to_json(tables["attention"]) == to_json(expected["attention"])
    for ours, theirs in zip(tables["depths"], expected["depths"], strict=True):
        at_output = ours["depth"] == 10
        assert (ours == theirs) == at_output
        assert (ours["kl"] == theirs["kl"]) == at_output
        assert ours["residual_norm"] == theirs["residual_norm"]
    with pytest.raises(ValueError, match="lens_norm must be final"):
        EmotionConflictConfig(tuned_lens="x", lens_norm="none")
    with pytest.raises(InputError, match="got no config.json"):
        opened(tuned_lens=str(tmp_path))


def test_default_prompts_are_every_clip_under_every_instruction() -> None:
    prompts = ob1_prompts(load_recordings(CLIPS))
    assert len(prompts) == 18 * 13
    assert len({one.id for one in prompts}) == len(prompts)
    assert len({one.prompt for one in prompts}) == len(prompts)
    assert {one.group for one in prompts} == {clip.stem for clip in ob1_clip_names()}
