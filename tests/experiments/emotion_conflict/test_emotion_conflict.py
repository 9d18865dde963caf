"""OB1 against a plain Hugging Face implementation, cell by cell, and the checks of its cards.

Scores of whole runs, patched ones under ``engine="hooks"`` included, must be *equal*: both sides do
full forwards of one prompt with the same kernels. The fast engine recomputes the rows that a patch
reaches, the lens multiplies fewer rows of the head, and attention is summed from another kernel's
pattern; these have their rounding in ``tolerances.py``. Answers are equal throughout.
"""

import functools
import math
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pytest
import soundfile
import torch
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.bundled import CLIPS, MODELS
from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.measure import SEGMENTS
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.materials.conflict_corpus import Corpus
from hooked_alm.experiments.materials.conflict_runs import PatchRun, PromptRun
from hooked_alm.experiments.materials.ob1 import CONFLICT_MAP, EMOTIONS, LABELS
from hooked_alm.experiments.workbench.experiment import Unit, UnitResult
from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.reading.lens import LogitLens
from ob1_reference import PATCHED, PlainOB1, Prompt
from tolerances import ATTENTION_MASS, BATCHED_ROWS, FAST_ENGINE, LENS_ROWS, RESAMPLED_DONOR

W = TypeVar("W")
TWINS = ("follows_text", "follows_voice")
N_BLOCKS = 10
LAST = N_BLOCKS - 1
Z = [f"z_{emotion}" for emotion in EMOTIONS]
CROSSED = ("text_swap", "audio_swap", "both", "random_other")
SOME_BLOCKS = (0, 4, LAST)
"""A cell is a whole forward in the reference and with hooks, so most sweeps are checked on first,
middle and last block only."""
ENGINES: tuple[Engine, ...] = ("hooks", "fast")
ROUNDING = {"hooks": 0.0, "fast": FAST_ENGINE[torch.float32]}
"""Of a score; a shift is a difference of four scores."""
by_engine = pytest.mark.parametrize("engine", ENGINES)


@functools.cache
def _opened(model: str) -> EmotionConflict:
    experiment = EmotionConflict(EmotionConflictConfig(model=f"bundled:{model}"))
    experiment.identify()
    experiment.load()
    return experiment


@functools.cache
def opened(model: str = "follows_text", **settings: Any) -> EmotionConflict:
    """The experiment on the 18 clips; what ``open`` loads is shared between settings."""
    first = _opened(model)
    experiment = EmotionConflict(EmotionConflictConfig(model=f"bundled:{model}", **settings))
    for loaded in ("model", "recordings", "clips", "labels", "_lengths"):
        setattr(experiment, loaded, getattr(first, loaded))
    experiment.corpus = Corpus(experiment.config, first.recordings)
    experiment.lens = LogitLens(experiment.config.lens_norm)
    return experiment


@functools.cache
def plain(model: str) -> PlainOB1:
    return PlainOB1(MODELS / model)


@functools.cache
def plain_sweep(
    model: str, unit_id: str, layers: tuple[int, ...] | None
) -> dict[tuple[int, str], Tensor]:
    """The reference's cells of a sweep."""
    (sweep,) = unit_of(opened(model), unit_id).payload
    base, donor = prompt_of(model, sweep.base), prompt_of(model, sweep.donor)
    return plain(model).sweep(base, donor, range(N_BLOCKS) if layers is None else layers)


@functools.cache
def _result(unit_id: str, model: str, settings: tuple[tuple[str, Any], ...]) -> UnitResult:
    experiment = opened(model, **dict(settings))
    return experiment.measure(unit_of(experiment, unit_id))


def result(unit_id: str, model: str = "follows_text", **settings: Any) -> UnitResult:
    return _result(unit_id, model, tuple(sorted(settings.items())))


def unit_of(experiment: EmotionConflict, unit_id: str) -> Unit:
    return next(unit for unit in experiment.units() if unit.id == unit_id)


def works_of(experiment: EmotionConflict, kind: type[W]) -> list[W]:
    """Every run, or every sweep."""
    works = [unit.payload for unit in experiment.units() if isinstance(unit.payload, tuple)]
    return [work for some in works for work in some if isinstance(work, kind)]


def table(name: str, unit_id: str, model: str = "follows_text", **settings: Any) -> pd.DataFrame:
    return pd.DataFrame(result(unit_id, model, **settings).tables[name])


def prompt_of(model: str, run: PromptRun) -> Prompt:
    """The prompt of a run, made by the processor; a list is rotated by the clip's place."""
    names = [recording.name for recording in opened(model).recordings]
    first = names.index(run.recording.name) % 5
    order = (*EMOTIONS[first:], *EMOTIONS[:first])
    clip = CLIPS / f"{run.recording.name}.wav"
    return plain(model).prompt(clip, run.condition, run.named, order)


def positions(spans: dict[str, list[list[int]]]) -> dict[str, list[int]]:
    return {name: [i for a, b in ranges for i in range(a, b)] for name, ranges in spans.items()}


def contrast(scores: Tensor, target: str, against: str) -> Tensor:
    return scores[..., EMOTIONS.index(target)] - scores[..., EMOTIONS.index(against)]


def assert_close(got: Any, expected: Tensor | float, tolerance: float) -> None:
    """Of numbers in any nesting, without a relative part."""
    numbers = got.tolist() if hasattr(got, "tolist") else got
    pair = (torch.as_tensor(side, dtype=torch.float64) for side in (numbers, expected))
    torch.testing.assert_close(*pair, rtol=0, atol=tolerance)


RUNS = [
    *(
        ("follows_text", f"zh_sad_strong__{mode}")
        for mode in (
            *("audio_only", "conflict", "consistent", "mention_only", "list_all"),
            "irrelevant_adjective",
        )
    ),
    ("follows_text", "en_terrified_normal__mention_only"),
    ("follows_voice", "en_cheerful_strong__conflict"),
    ("follows_voice", "zh_neutral_normal__list_all"),
]


@pytest.mark.parametrize(("model", "unit_id"), RUNS)
def test_a_run_agrees_with_plain_hf(model: str, unit_id: str) -> None:
    (run,) = unit_of(opened(model), unit_id).payload
    hf, prompt = plain(model), prompt_of(model, run)
    ids = hf.label_ids(run.recording.language)
    done = result(unit_id, model)
    (record,) = done.record["works"]

    assert record["token_ids"] == prompt.inputs["input_ids"][0].tolist()
    assert record["position_ids"] == prompt.inputs["position_ids"][0].tolist()
    spans = positions(record["spans"])
    assert spans == {name: where for name, where in prompt.spans.items() if name in spans}
    assert spans.keys() - {"label"} == prompt.spans.keys() - {"label"}
    assert ("label" in spans) == bool(prompt.spans["label"])

    # Behaviour: bit by bit.
    final = hf.logits(prompt)
    scores = final[ids]
    voice, target = run.recording.label, CONFLICT_MAP[run.recording.label]
    [row] = done.tables["runs"]
    assert [row[z] for z in Z] == scores.tolist()
    assert row["prediction"] == EMOTIONS[int(scores.argmax())]
    assert row["delta_final"] == float(contrast(scores, target, voice))
    assert row["label_mass"] == float(final.log_softmax(-1)[ids].exp().sum())
    assert row["best_label_rank"] == 1 + int((final > scores.max()).sum())
    assert row["top_token"] == hf.processor.tokenizer.decode([int(final.argmax())])
    assert (row["n_tokens"], row["n_audio_tokens"]) == (prompt.n, len(prompt.spans["audio"]))

    # Lens.
    lens = hf.lens(prompt)
    depths = pd.DataFrame(done.tables["depths"])
    assert list(depths["depth"]) == list(range(N_BLOCKS + 1))
    assert_close(depths[Z].to_numpy(), lens[:, ids], LENS_ROWS)
    restricted = lens[:, ids].softmax(-1)
    assert_close(depths[[f"p_{e}" for e in EMOTIONS]].to_numpy(), restricted, LENS_ROWS)
    log_p = lens.log_softmax(-1)
    kl = (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1)
    assert_close(depths["kl"].to_numpy(), kl, LENS_ROWS)
    assert_close(depths["entropy"].to_numpy(), -(log_p.exp() * log_p).sum(-1), LENS_ROWS)
    assert list(depths["agrees"]) == (lens.argmax(-1) == final.argmax()).float().tolist()
    norms = [r[0, -1].norm() for r in hf.residuals(prompt)]
    assert_close(depths["residual_norm"].to_numpy(), torch.stack(norms), LENS_ROWS)
    delta = pd.DataFrame(done.tables["delta"])
    assert list(delta["target"].unique()) == [target]
    assert_close(delta["delta"].to_numpy(), contrast(lens[:, ids], target, voice), LENS_ROWS)
    assert record["delta_logit_by_depth"] == delta["delta"].tolist()
    assert record["delta_logit_by_text_layer"] == delta["delta"].tolist()[:N_BLOCKS]
    # M-000-5: the last depth is the model's own answer.
    assert_close(delta["delta"].iloc[-1], row["delta_final"], LENS_ROWS)

    # Attention of the readout.
    mass = torch.stack(
        [
            torch.stack([pattern[:, prompt.spans[name]].sum(-1) for name in SEGMENTS], dim=-1)
            for pattern in hf.attention(prompt)
        ]
    )
    by_head = record["attention_mass_by_head"]
    assert_close(by_head["layer_head_segment"], mass, ATTENTION_MASS)
    assert_close(mass.sum(-1), torch.ones(mass.shape[:2]), ATTENTION_MASS)  # I9
    attention = pd.DataFrame(done.tables["attention"]).set_index(["span", "layer"])
    for index, name in enumerate(SEGMENTS):
        rows, mean = attention.loc[name], mass[..., index].mean(1)
        assert_close(rows["mass"].to_numpy(), mean, ATTENTION_MASS)
        n = len(prompt.spans[name])
        assert set(rows["n_tokens"]) == {n}
        density = mean * prompt.n / n
        assert_close(rows["density"].to_numpy(), density, ATTENTION_MASS * prompt.n)
    probe = record["attn_probe_last_token"]
    assert probe["mass_text"] == attention.loc["text", "mass"].tolist()
    assert probe["mass_audio"] == attention.loc["audio", "mass"].tolist()


@pytest.mark.parametrize(
    ("model", "unit_id"),
    [
        ("follows_text", "zh_sad_strong__conflict"),
        ("follows_voice", "en_angry_normal__consistent"),
    ],
)
def test_the_seeds_run_agrees_with_plain_hf(model: str, unit_id: str) -> None:
    (run,) = unit_of(opened(model), unit_id).payload
    hf, prompt = plain(model), prompt_of(model, run)
    ids = hf.label_ids(run.recording.language)
    done = result(unit_id, model, variant="seed")
    [row] = done.tables["runs"]
    assert [row[z] for z in Z] == hf.logits(prompt)[ids].tolist()
    lens = hf.seed_lens(prompt)[:, ids]
    depths = pd.DataFrame(done.tables["depths"])
    assert list(depths["depth"]) == list(range(N_BLOCKS))  # C11: no output
    assert_close(depths[Z].to_numpy(), lens, LENS_ROWS)
    voice = run.recording.label
    # C8: what the run was labelled with, minus the voice.
    target = voice if run.condition == "consistent" else CONFLICT_MAP[voice]
    delta = [row["delta"] for row in done.tables["delta"]]
    assert_close(delta, contrast(lens, target, voice), LENS_ROWS)
    (record,) = done.record["works"]
    assert record["delta_logit_by_depth"] == record["delta_logit_by_text_layer"] == delta


SWEEPS = [
    ("follows_text", "zh_sad_strong", "text_swap", None),
    *(("follows_text", "zh_sad_strong", donor, SOME_BLOCKS) for donor in CROSSED[1:]),
    ("follows_voice", "en_terrified_normal", "text_swap", SOME_BLOCKS),
    ("follows_voice", "en_terrified_normal", "audio_swap", SOME_BLOCKS),
]


@by_engine
@pytest.mark.parametrize(("model", "clip", "donor", "layers"), SWEEPS)
def test_a_sweep_agrees_with_plain_hf(
    model: str, clip: str, donor: str, layers: tuple[int, ...] | None, engine: Engine
) -> None:
    target = "cheerful"
    unit_id = f"patch__{clip}__{target}__{donor}"
    (sweep,) = unit_of(opened(model), unit_id).payload
    hf = plain(model)
    base, other = prompt_of(model, sweep.base), prompt_of(model, sweep.donor)
    ids = hf.label_ids(sweep.base.recording.language)
    done = result(unit_id, model, patch_layers=layers, engine=engine)
    rounding = ROUNDING[engine]
    base_scores, donor_scores = hf.logits(base)[ids], hf.logits(other)[ids]
    assert_close(done.record["works"][0]["base_scores"], base_scores, rounding)
    assert_close(done.record["works"][0]["donor_scores"], donor_scores, rounding)
    assert done.record["works"][0]["base_prediction"] == EMOTIONS[int(base_scores.argmax())]
    assert done.record["works"][0]["donor_prediction"] == EMOTIONS[int(donor_scores.argmax())]

    expected = plain_sweep(model, unit_id, layers)
    rows = pd.DataFrame(done.tables["patching"])
    assert len(rows) == len(expected)
    assert set(zip(rows["block"], rows["span"], strict=True)) == expected.keys()
    voice = sweep.base.recording.label
    # What the donor should bring: under audio_swap the new voice's emotion, else the instruction's.
    toward = (target, voice) if donor == "audio_swap" else (voice, target)
    base_metric, donor_metric = (
        float(contrast(scores, *toward)) for scores in (base_scores, donor_scores)
    )
    total = donor_metric - base_metric
    for row in rows.to_dict("records"):
        scores = expected[row["block"], row["span"]][ids]
        shift = float(contrast(scores, *toward)) - base_metric
        assert_close([row[z] for z in Z], scores, rounding)
        assert row["prediction"] == EMOTIONS[int(scores.argmax())]
        assert row["flip"] == float(scores.argmax() != base_scores.argmax())
        assert_close(row["shift"], shift, 4 * rounding)
        assert_close([row["base"], row["donor_metric"]], [base_metric, donor_metric], 2 * rounding)
        assert_close(row["total_effect"], total, 4 * rounding)
        if abs(total) < 0.5:
            assert math.isnan(row["recovery"])
        else:
            # Of sums of two roundings each; at most 2 of the donor's effect are recovered.
            assert abs(shift / total) < 2
            assert_close(row["recovery"], shift / total, 12 * rounding / abs(total))


@by_engine
@pytest.mark.parametrize(
    ("model", "clip", "target"),
    [("follows_text", "zh_sad_strong", "cheerful"), ("follows_voice", "en_cheerful_strong", "sad")],
)
def test_the_seeds_sweep_agrees_with_plain_hf(
    model: str, clip: str, target: str, engine: Engine
) -> None:
    unit_id = f"patch__{clip}__{target}__text_swap"
    (sweep,) = unit_of(opened(model), unit_id).payload
    hf = plain(model)
    ids = hf.label_ids(sweep.base.recording.language)
    expected = hf.seed_sweep(
        prompt_of(model, sweep.base), prompt_of(model, sweep.donor), (0, 5, LAST)
    )
    rows = table("patching", unit_id, model, variant="seed", engine=engine)
    assert set(zip(rows["block"], rows["span"], strict=True)) == expected.keys()
    for row in rows.to_dict("records"):
        scores = expected[row["block"], row["span"]][ids]
        assert_close([row[z] for z in Z], scores, ROUNDING[engine])


@pytest.mark.parametrize(
    ("model", "donor"), [("follows_text", "text_swap"), ("follows_voice", "audio_swap")]
)
def test_engines_answer_alike(model: str, donor: str) -> None:
    """Scores to rounding, answers to the word; at each block, and however little memory it is."""
    unit_id = f"patch__en_angry_normal__neutral__{donor}"
    hooks, fast = (table("patching", unit_id, model, engine=engine) for engine in ENGINES)
    assert list(fast) == list(hooks)
    numbers = [*Z, "shift", "base", "donor_metric", "total_effect"]
    assert_close(
        fast[numbers].to_numpy(), torch.tensor(hooks[numbers].to_numpy()), ROUNDING["fast"]
    )
    rest = [name for name in fast if name not in {*numbers, "recovery"}]
    pd.testing.assert_frame_equal(fast[rest], hooks[rest])
    assert {"block", "span", "prediction", "flip"} <= {*rest}
    assert hooks["flip"].nunique() == 2
    little = table("patching", unit_id, model, max_bytes=1)
    assert_close(little[Z].to_numpy(), torch.tensor(fast[Z].to_numpy()), ROUNDING["fast"])


def test_hf_norms_the_last_of_its_hidden_states() -> None:
    """C2: why the reference, as ours, takes states from hooks."""
    hf = plain("follows_text")
    prompt = hf.prompt(CLIPS / "zh_sad_strong.wav", "audio_only", None)
    with torch.no_grad():
        states = hf.hf(**prompt.inputs, output_hidden_states=True).hidden_states
    hooked = hf.residuals(prompt)
    assert all(torch.equal(a, b) for a, b in zip(states[:-1], hooked[:-1], strict=True))
    assert torch.equal(states[-1], hf.decoder.norm(hooked[-1]))


@pytest.mark.parametrize("model", TWINS)
@pytest.mark.parametrize("clip", ["zh_neutral_normal", "en_sad_strong"])
def test_donors_are_what_their_names_say(model: str, clip: str) -> None:
    experiment = opened(model)
    language, voice, intensity = clip.split("_")
    target = CONFLICT_MAP[voice]
    sweeps: dict[str, PatchRun] = {
        sweep.kind: sweep
        for sweep in works_of(experiment, PatchRun)
        if sweep.base.recording.name == clip
    }
    assert sweeps.keys() == {"self", *CROSSED}
    for sweep in sweeps.values():
        assert (sweep.base.condition, sweep.base.named) == ("conflict", target)
        assert sweep.donor.recording.language == language
    assert sweeps["self"].donor == sweeps["self"].base
    pairs = {
        kind: (sweep.donor.recording.label, sweep.donor.named) for kind, sweep in sweeps.items()
    }
    assert pairs["text_swap"] == (voice, voice)
    assert sweeps["text_swap"].donor.recording.name == clip
    assert pairs["audio_swap"] == (target, target)
    assert pairs["both"] == (target, voice)
    assert len({*pairs["random_other"], voice, target}) == 4
    alike = sweeps["audio_swap"].donor.recording.intensity
    assert alike == ("normal" if target == "neutral" else intensity)


# --- Invariants of patching, on a run of the experiment


@by_engine
@pytest.mark.parametrize("model", TWINS)
def test_a_self_patch_changes_nothing(model: str, engine: Engine) -> None:
    """I3."""
    unit_id = "patch__en_sad_strong__cheerful__self"
    settings = {"patch_layers": SOME_BLOCKS, "engine": engine}
    rows = table("patching", unit_id, model, **settings)
    base = result(unit_id, model, **settings).record["works"][0]["base_scores"]
    assert len(rows) == len(SOME_BLOCKS) * len(PATCHED)
    assert_close(rows["shift"].abs().max(), 0.0, 2 * ROUNDING[engine])
    assert_close(rows["total_effect"].abs().max(), 0.0, 4 * ROUNDING[engine])
    assert set(rows["flip"]) == {0.0}
    assert rows["recovery"].isna().all()
    assert_close(rows[Z].to_numpy(), torch.tensor([base] * len(rows)), ROUNDING[engine])


@by_engine
@pytest.mark.parametrize(("model", "clip", "donor", "layers"), SWEEPS)
def test_patching_everything_is_the_donor_and_the_last_block_reaches_no_further(
    model: str, clip: str, donor: str, layers: tuple[int, ...] | None, engine: Engine
) -> None:
    """I4, I5, I6."""
    unit_id, rounding = f"patch__{clip}__cheerful__{donor}", ROUNDING[engine]
    done = result(unit_id, model, patch_layers=layers, engine=engine)
    rows = pd.DataFrame(done.tables["patching"])
    (record,) = done.record["works"]
    base_scores, donor_scores = record["base_scores"], record["donor_scores"]
    assert base_scores != donor_scores
    every = rows[rows["span"] == "all"]
    assert len(every) == len(layers or range(N_BLOCKS))
    assert_close(every[Z].to_numpy(), torch.tensor([donor_scores] * len(every)), rounding)
    total = every["total_effect"].abs().max()
    if total >= 0.5:
        assert_close((every["recovery"] - 1).abs().max(), 0.0, 4 * rounding / total)
    last = rows[rows["block"] == LAST].set_index("span")[Z]
    for span in PATCHED:
        reaches = span in ("readout", "text+readout", "all")
        expected = torch.tensor(donor_scores if reaches else base_scores)
        assert_close(last.loc[span].to_numpy(), expected, rounding)


@by_engine
def test_what_stands_before_the_first_difference_is_the_same_run(engine: Engine) -> None:
    """I7: the audio precedes the instruction, so a text-swapped donor has the same audio states."""
    unit_id = "patch__zh_sad_strong__cheerful__text_swap"
    rows = table("patching", unit_id, patch_layers=None, engine=engine).set_index("span")
    for span in ("audio", "audio_struct"):
        assert_close(rows.loc[span, "shift"].abs().max(), 0.0, 2 * ROUNDING[engine])
    assert rows.loc["text", "shift"].abs().max() > 1
    # With another voice they differ, and matter.
    unit_id = "patch__zh_sad_strong__cheerful__audio_swap"
    rows = table("patching", unit_id, patch_layers=SOME_BLOCKS, engine=engine).set_index("span")
    assert rows.loc["audio", "shift"].abs().max() > 1


def test_the_runs_before_the_first_difference_are_bit_equal() -> None:
    """I7, on the states themselves."""
    experiment = opened()
    runs = [
        unit_of(experiment, f"zh_sad_strong__{mode}").payload for mode in ("conflict", "consistent")
    ]
    a, b = (experiment.input(*run) for run in runs)
    label = a.spans.positions("label", 0)
    assert a.tokens.shape == b.tokens.shape
    assert (a.tokens != b.tokens).nonzero()[:, 1].tolist() == label
    names = [f"blocks.{block}.hook_resid_post" for block in range(N_BLOCKS)]
    with torch.no_grad():
        _, first = experiment.model.run_with_cache(a, names_filter=names)
        _, second = experiment.model.run_with_cache(b, names_filter=names)
    for name in names:
        assert torch.equal(first[name][:, : label[0]], second[name][:, : label[0]])
        assert not torch.equal(first[name][:, label[0] :], second[name][:, label[0] :])


# --- Clips of unequal duration


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of one language, the sad one cut."""
    folder = tmp_path_factory.mktemp("unequal")
    for name, n_samples in (("zh_sad_strong", 40_000), ("zh_cheerful_strong", None)):
        samples, rate = soundfile.read(CLIPS / f"{name}.wav", dtype="int16")
        soundfile.write(folder / f"{name}.wav", samples[:n_samples], rate)
    return folder


def swept(unequal: Path, **settings: Any) -> tuple[EmotionConflict, UnitResult, Prompt, Prompt]:
    """A short clip patched with a longer one: ours, and the reference's two prompts."""
    config = EmotionConflictConfig(audio=str(unequal), patch_layers=SOME_BLOCKS, **settings)
    experiment = EmotionConflict(config)
    experiment.identify()
    experiment.load()
    done = experiment.measure(unit_of(experiment, "patch__zh_sad_strong__cheerful__audio_swap"))
    hf = plain("follows_text")
    return (
        experiment,
        done,
        hf.prompt(unequal / "zh_sad_strong.wav", "conflict", "cheerful"),
        hf.prompt(unequal / "zh_cheerful_strong.wav", "consistent", "cheerful"),
    )


@by_engine
def test_a_longer_donor_is_resampled_in_time(unequal: Path, engine: Engine) -> None:
    _, done, base, donor = swept(unequal, engine=engine)
    hf = plain("follows_text")
    ids = hf.label_ids("zh")
    n_base, n_donor = (len(prompt.spans["audio"]) for prompt in (base, donor))
    assert n_base < n_donor
    ratios = done.record["works"][0]["span_length_ratio"]
    assert ratios["audio"] == n_donor / n_base
    assert {ratio for name, ratio in ratios.items() if name != "audio"} == {1.0}
    expected = hf.sweep(base, donor, SOME_BLOCKS)
    for row in done.tables["patching"]:
        scores = expected[row["block"], row["span"]][ids]
        if row["span"] in ("audio", "all"):
            assert_close([row[z] for z in Z], scores, RESAMPLED_DONOR + ROUNDING[engine])
        else:
            assert_close([row[z] for z in Z], scores, ROUNDING[engine])


@by_engine
def test_c10_the_seed_counts_from_the_start_and_misses_the_readout(
    unequal: Path, engine: Engine
) -> None:
    # The other way round no position of the words is in both, so that the cheerful clip is no base.
    targets = {"sad": "cheerful", "cheerful": "neutral"}
    settings = {"donors": ("audio_swap",), "conflict_map": targets, "engine": engine}
    _, done, base, donor = swept(unequal, variant="seed", **settings)
    hf = plain("follows_text")
    ids = hf.label_ids("zh")
    expected = hf.seed_sweep(base, donor, SOME_BLOCKS)
    assert len(done.tables["patching"]) == len(expected)
    for row in done.tables["patching"]:
        scores = expected[row["block"], row["span"]][ids]
        assert_close([row[z] for z in Z], scores, ROUNDING[engine])


# --- Conditions


def runs_of(experiment: EmotionConflict) -> list[Unit]:
    """Units of one run each, which is their payload."""
    runs = works_of(experiment, PromptRun)
    return [Unit(experiment.plan.run_id(run), run) for run in runs]


def test_54_runs_and_108() -> None:
    """M-000-4."""
    three = ("audio_only", "conflict", "consistent")
    ids = [unit.id for unit in runs_of(opened(modes=three))]
    assert len(ids) == 54 == len(set(ids))
    assert ids[:3] == [f"zh_neutral_normal__{mode}" for mode in three]
    every = opened(modes=three, pairs="all_pairs")
    ids = [unit.id for unit in runs_of(every)]
    assert len(ids) == 108 == len(set(ids))
    for recording in every.recordings:
        named = {
            unit.payload.named
            for unit in runs_of(every)
            if unit.payload.recording == recording and unit.payload.condition == "conflict"
        }
        assert named == set(EMOTIONS) - {recording.label}
    assert len([unit.id for unit in runs_of(opened(variant="seed"))]) == 54


def test_prompts_of_a_mode_have_one_length() -> None:
    """M-000-2: positions align whatever emotion is named, and whichever comes first in a list."""
    experiment = opened(pairs="all_pairs")
    lengths: dict[tuple[str, str], set[int]] = {}
    for unit in runs_of(experiment):
        x = experiment.input(unit.payload)
        n_text = x.shape[1] - len(x.spans.positions("audio", 0))
        lengths.setdefault((unit.payload.condition, unit.payload.recording.language), set()).add(
            n_text
        )
    assert len(lengths) == 12
    assert all(len(found) == 1 for found in lengths.values()), lengths
    for language in ("zh", "en"):
        obeying = {
            min(lengths[mode, language])
            for mode in ("conflict", "consistent", "irrelevant_adjective")
        }
        assert len(obeying) == 1


def test_the_order_of_a_list_is_counterbalanced() -> None:
    """C9: over the clips, every label stands in every place about equally often."""
    experiment = opened()
    tokenizer = experiment.model.tokenizer
    places: dict[tuple[str, int], int] = {}
    voices = [0] * 5
    for unit in runs_of(experiment):
        if unit.payload.condition != "list_all":
            continue
        x, recording = experiment.input(unit.payload), unit.payload.recording
        text = tokenizer.decode(x.tokens[0, x.spans.positions("text", 0)])
        # From the end: the English template's own words might hold a label.
        at = {e: text.rfind(LABELS[recording.language][e]) for e in EMOTIONS}
        assert min(at.values()) > 0
        order = sorted(EMOTIONS, key=lambda e, at=at: at[e])
        for place, emotion in enumerate(order):
            places[emotion, place] = places.get((emotion, place), 0) + 1
        voices[order.index(recording.label)] += 1
    assert len(places) == 25
    assert set(places.values()) == {3, 4}
    assert set(voices) == {3, 4}


def test_the_control_prompt_that_only_mentions_has_a_label_to_patch() -> None:
    experiment = opened()
    for mode in ("conflict", "consistent", "mention_only"):
        x = experiment.input(*unit_of(experiment, f"en_sad_normal__{mode}").payload)
        label, text = (x.spans.positions(name, 0) for name in ("label", "text"))
        assert set(label) < set(text)
        word = "sad" if mode == "consistent" else "cheerful"
        assert experiment.model.tokenizer.decode(x.tokens[0, label]) == word


# --- The seed's defects, one by one


@pytest.mark.parametrize(
    ("settings", "defects"),
    [
        ({}, set()),
        ({"donor_index": "seed_hs"}, {"C1"}),
        ({"audio_positions": "not_text"}, {"C3"}),
        ({"donors": ("text_swap",)}, {"C4"}),
        ({"donors": ("self", "audio_swap")}, {"C4"}),
        ({"lens_norm": "none"}, {"C6"}),
        ({"contrast": "seed"}, {"C8"}),
        ({"modes": ("audio_only", "conflict", "consistent")}, {"C9"}),
        ({"align": "min_len"}, {"C10"}),
        ({"lens_depths": "without_output"}, {"C11"}),
        ({"critical_method": "second_diff_abs"}, {"C27"}),
        (
            {"variant": "seed"},
            {"C1", "C3", "C4", "C6", "C8", "C9", "C10", "C11", "C27"},
        ),
        # A switch set by hand wins over the variant's own.
        (
            {"variant": "seed", "donor_index": "same_site", "contrast": "matched_pair"},
            {"C3", "C4", "C6", "C9", "C10", "C11", "C27"},
        ),
    ],
)
def test_each_switch_names_its_defect(settings: dict[str, Any], defects: set[str]) -> None:
    experiment = EmotionConflict(EmotionConflictConfig(**settings))
    assert experiment.known_defects().keys() == defects


def test_known_defects_are_in_every_result() -> None:
    experiment = EmotionConflict(EmotionConflictConfig(variant="seed"))
    defects = experiment.known_defects()
    assert defects.keys() >= {"C1", "C3", "C8"}
    (record,) = result("zh_sad_strong__conflict", variant="seed").record["works"]
    assert record["variant"] == "seed"
    assert record["known_defects"] == sorted(defects)
    (record,) = result("zh_sad_strong__conflict").record["works"]
    assert record["known_defects"] == []


@by_engine
def test_c1_a_donor_one_block_early_moves_even_a_self_patch(engine: Engine) -> None:
    settings = {
        "donors": ("self",), "donor_index": "seed_hs", "patch_layers": (0, 5, LAST),
        "engine": engine,
    }  # fmt: skip
    unit_id = "patch__zh_sad_strong__cheerful__self"
    rows = table("patching", unit_id, **settings).set_index("span")
    moved = rows.loc["all", "shift"].abs()
    assert len(moved) == 3
    assert moved.min() > 2 * FAST_ENGINE[torch.float32]
    assert moved.max() > 0.5
    # And back in place, nothing moves: the switch alone did it.
    settings["donor_index"] = "same_site"
    moved = table("patching", unit_id, **settings)["shift"].abs()
    assert_close(moved.max(), 0.0, 2 * ROUNDING[engine])


def test_c3_patching_all_that_is_no_text_at_the_last_block_is_answering_for_the_donor() -> None:
    settings = {
        "donors": ("text_swap",), "audio_positions": "not_text", "patch_layers": (4, LAST),
        "engine": "hooks",
    }  # fmt: skip
    experiment = opened(**settings)
    sweeps = [unit.id for unit in experiment.units() if unit.id.startswith("patch__en_")]
    assert len(sweeps) == 9
    flips, differs = [], []
    for unit_id in sweeps[::2]:
        rows = table("patching", unit_id, **settings)
        (record,) = result(unit_id, **settings).record["works"]
        last = rows[rows["block"] == LAST].set_index("span")
        assert last.loc["audio", Z].tolist() == record["donor_scores"]
        assert last.loc["text", Z].tolist() == record["base_scores"]
        assert last.loc["text", "shift"] == 0.0
        flips.append(last.loc["audio", "flip"])
        differs.append(float(record["donor_prediction"] != record["base_prediction"]))
    assert flips == differs
    assert sum(flips) > 0


def test_c8_a_label_minus_itself_is_zero() -> None:
    """M-000-5: exactly, everywhere; the matched pair's contrast is not."""
    for clip in ("zh_sad_strong", "en_neutral_normal"):
        done = result(f"{clip}__consistent", contrast="seed")
        assert {row["delta"] for row in done.tables["delta"]} == {0.0}
        assert len(done.tables["delta"]) == N_BLOCKS + 1
        assert done.tables["runs"][0]["delta_final"] == 0.0
        (record,) = done.record["works"]
        assert set(record["delta_logit_by_depth"]) == {0.0}
        assert record["delta_logit_by_text_layer"] == [0.0] * N_BLOCKS
        matched = result(f"{clip}__consistent")
        assert abs(matched.tables["runs"][0]["delta_final"]) > 1


def test_c11_depths_with_and_without_the_output() -> None:
    unit = "zh_sad_strong__conflict"
    corrected, seed = (
        table("delta", unit, **settings) for settings in ({}, {"lens_depths": "without_output"})
    )
    assert (len(corrected), len(seed)) == (N_BLOCKS + 1, N_BLOCKS)
    assert corrected["delta"][:N_BLOCKS].tolist() == seed["delta"].tolist()


def test_the_seed_patches_its_own_layers() -> None:
    config = EmotionConflictConfig(variant="seed")
    assert config.patched_layers(28) == (0, 5, 10, 15, 20, 25, 27)
    assert config.patched_layers(10) == (0, 5, 9)
    assert EmotionConflictConfig().patched_layers(10) == tuple(range(10))


def test_loudness_can_be_taken_from_the_clips() -> None:
    """A level of one's choice for every clip: recorded, and the spectrograms do change."""
    plain, matched = (
        EmotionConflict(EmotionConflictConfig(loudness_dbfs=level)) for level in (None, -30.0)
    )
    plain.identify()
    plain.load()
    described = matched.identify()["clips"]
    matched.load()
    assert all(clip["notes"][-1] == "scaled to -30 dBFS" for clip in described)
    for name, clip in matched.clips.items():
        assert clip.n_tokens == plain.clips[name].n_tokens
        assert not torch.equal(clip.features, plain.clips[name].features)


# --- Batches


def test_batches_are_the_single_runs_to_rounding() -> None:
    """Of unequal lengths and both languages; rows come in the order of the runs, by their names."""
    settings: dict[str, Any] = {"modes": ("audio_only", "conflict", "list_all"), "donors": ()}
    single = opened(**settings)
    batched = opened(**settings, batch_size=4, unit_batches=3, batch_positions=420)
    units = batched.units()
    names = [unit.id for unit in single.units()][:-1]
    assert len(names) == 54
    assert [unit.id for unit in units][:2] == [f"{names[0]}+11", f"{names[12]}+11"]
    assert units[-2].id == f"{names[48]}+5"
    unit = next(one for one in units if len({run.language for run in one.payload}) == 2)
    sizes = []
    with pytest.MonkeyPatch.context() as patched:
        run = HookedALM.forward

        def counted(self: HookedALM, x: Any, **options: Any) -> Any:
            sizes.append(tuple(x.shape))
            return run(self, x, **options)

        patched.setattr(HookedALM, "forward", counted)
        found = batched.measure(unit)
    assert sum(n for n, _ in sizes) == 12
    assert max(n for n, _ in sizes) > 1
    assert all(n <= 4 and (n == 1 or n * longest <= 420) for n, longest in sizes)

    first = names.index(unit.id.partition("+")[0])
    alone = [single.measure(one) for one in single.units()[first : first + 12]]
    for name, rows in found.tables.items():
        expected = pd.DataFrame([row for one in alone for row in one.tables[name]])
        pd.testing.assert_frame_equal(pd.DataFrame(rows), expected, rtol=1e-4, atol=BATCHED_ROWS)
    assert [one["unit"] for one in found.record["works"]] == names[first : first + 12]
    for ours, theirs in zip(found.record["works"], alone, strict=True):
        (record,) = theirs.record["works"]
        assert ours["token_ids"] == record["token_ids"]
        assert ours["spans"] == record["spans"]
