"""Attribute lens against plain Hugging Face, cell by cell, and as a whole on tiny models."""

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from attribute_lens_verdicts import CURVES, ROADS, made
from cases import ultravox
from hf_reference import decoder_of
from hooked_alm.bundled import CLIPS, MODELS
from hooked_alm.errors import InputError
from hooked_alm.experiments.attribute_lens.experiment import AttributeLens
from hooked_alm.experiments.attribute_lens.settings import AttributeLensConfig
from hooked_alm.experiments.materials.ob1 import EMOTIONS
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.executors import Executor, Processes
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.runner import default_out
from stopped_runs import interrupted, units
from tiny import TinyModels
from tolerances import BATCHED_ROWS, FAST_ENGINE, LENS_ROWS
from whisper_llama_parts import noise, save_tokenizer

CLIP, PLACE = "en_sad_normal", 12
"""A clip of OB1, and its place among the 18, by which the list of labels is rotated."""
OWN = EMOTIONS.index("sad")
FULL = (0, 9)


@cache
def opened() -> AttributeLens:
    experiment = AttributeLens(AttributeLensConfig(enrich_sources=(0, 3, 8), enrich_layers=(2, 9)))
    experiment.identify()
    experiment.load()
    return experiment


@cache
def rows(unit: str) -> dict[str, pd.DataFrame]:
    experiment = opened()
    found = next(one for one in experiment.units() if one.id == unit)
    tables = experiment.measure(found).tables
    return {name: pd.DataFrame(some) for name, some in tables.items()}


class Plain:
    """The question about a clip, asked of Hugging Face's model through its processor."""

    def __init__(self, text: str, *, is_silent: bool = False) -> None:
        folder = MODELS / "follows_voice"
        self.hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        samples, rate = soundfile.read(CLIPS / f"{CLIP}.wav", dtype="float32")
        content = [{"type": "audio", "audio": "x"}, {"type": "text", "text": text}]
        rendered = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        samples = np.zeros_like(samples) if is_silent else samples
        self.inputs = dict(
            processor(text=rendered, audio=[samples], sampling_rate=rate, return_tensors="pt")
        )
        ids = self.inputs["input_ids"][0]
        self.audio = (ids == processor.audio_token_id).nonzero().flatten()
        words = [processor.tokenizer.decode([one]) for one in ids.tolist()]
        ends = np.cumsum([len(word) for word in words])
        at = "".join(words).index("emotion") + len("emotion")
        self.mention = int((ends >= at).argmax())
        self.labels = processor.tokenizer.convert_tokens_to_ids([*EMOTIONS])

    @torch.no_grad()
    def run(self, **options: Any) -> Any:
        return self.hf(**self.inputs, **options)

    @torch.no_grad()
    def depths(self, position: int) -> Tensor:
        """Logits over the vocabulary at every depth."""
        states = self.run(output_hidden_states=True).hidden_states
        rows = torch.stack([one[0, position] for one in states])
        rows[:-1] = decoder_of(self.hf).norm(rows[:-1])  # the last is normed already
        return self.hf.lm_head(rows)

    def margin(self, logits: Tensor) -> float:
        scores = logits[self.labels]
        others = torch.cat([scores[:OWN], scores[OWN + 1 :]])
        return float(scores[OWN] - others.max())

    def hidden(self, query: int, keys: Tensor, blocks: range) -> float:
        """The margin where attention masks hide keys from a query."""
        n = self.inputs["input_ids"].shape[1]

        def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = torch.full((n, n), float("-inf")).triu(1)
            mask[query, keys] = float("-inf")
            return args, {**kwargs, "attention_mask": mask[None, None]}

        layers = decoder_of(self.hf).layers
        handles = [layers[b].register_forward_pre_hook(hide, with_kwargs=True) for b in blocks]
        try:
            return self.margin(self.run().logits[0, -1])
        finally:
            for handle in handles:
                handle.remove()


QUESTION = "Judge the emotion of this audio. Output the label only."
ROTATED = EMOTIONS[PLACE % 5 :] + EMOTIONS[: PLACE % 5]
OPTIONS = (
    "Judge the emotion of this audio. Choose from these labels: "
    + " ".join(f'"{one}"' for one in ROTATED)
    + ". Output the label only."
)


@pytest.mark.parametrize(("prompt", "text"), [("question", QUESTION), ("options", OPTIONS)])
def test_answers_and_lens_are_hugging_faces(prompt: str, text: str) -> None:
    plain, found = Plain(text), rows(f"reading__{CLIP}__emotion__{prompt}__audio")
    answer = found["answers"].iloc[0]
    final = plain.run().logits[0, -1]
    assert answer.margin == pytest.approx(plain.margin(final), abs=LENS_ROWS)
    assert answer.label_mass == pytest.approx(
        float(final.softmax(-1)[plain.labels].sum()), abs=LENS_ROWS
    )
    assert answer.prediction == EMOTIONS[int(final[plain.labels].argmax())]
    for position, at in (("readout", -1), ("mention", plain.mention)):
        theirs = plain.depths(at)
        ours = found["information"]
        ours = ours[ours.position == position].set_index("depth")
        p, scores = theirs.softmax(-1)[:, plain.labels], theirs[:, plain.labels]
        np.testing.assert_allclose(ours.label_mass, p.sum(-1), atol=LENS_ROWS)
        np.testing.assert_allclose(ours.p_correct_soft, scores.softmax(-1)[:, OWN], atol=LENS_ROWS)
        assert ours.hit.tolist() == (scores.argmax(-1) == OWN).float().tolist()
        assert ours.prediction.tolist() == [EMOTIONS[i] for i in scores.argmax(-1).tolist()]
        last = theirs[-1].log_softmax(-1)
        kl = (last.exp() * (last - theirs.log_softmax(-1))).sum(-1)
        np.testing.assert_allclose(ours.kl, kl, atol=1e-4)


def test_the_information_at_the_last_depth_is_the_answers() -> None:
    found = rows(f"reading__{CLIP}__emotion__question__audio")
    last = found["information"].query("position == 'readout' and depth == 10")
    assert last.hit.tolist() == found["answers"].hit.tolist()
    assert (found["information"].label_mass <= 1 + 1e-6).all()


def test_without_the_audio_is_silence_to_hugging_face() -> None:
    plain = Plain(QUESTION, is_silent=True)
    found = rows(f"reading__{CLIP}__emotion__question__silence")["absences"].iloc[0]
    assert found.margin == pytest.approx(plain.margin(plain.run().logits[0, -1]), abs=LENS_ROWS)
    assert found.heard == "silence"


@pytest.mark.parametrize(("first", "last"), [FULL, (0, 2), (7, 9)])
def test_knockouts_are_hugging_faces_masks(first: int, last: int) -> None:
    plain, table = Plain(QUESTION), rows(f"knockouts__{CLIP}__emotion__question__audio")["knockout"]
    cells = table[(table["first"] == first) & (table["last"] == last)]
    cells = cells.set_index(["query", "keys"])
    n = plain.inputs["input_ids"].shape[1]
    for query, at in (("readout", n - 1), ("mention", plain.mention)):
        theirs = plain.hidden(at, plain.audio, range(first, last + 1))
        row = cells.loc[(query, "audio")]
        assert row.margin == pytest.approx(theirs, abs=FAST_ENGINE[torch.float32])
        assert row.gain == pytest.approx(row.margin - row.base, abs=1e-5)
    theirs = plain.hidden(n - 1, torch.tensor([plain.mention]), range(first, last + 1))
    assert cells.loc[("readout", "mention")].margin == pytest.approx(
        theirs, abs=FAST_ENGINE[torch.float32]
    )
    if (first, last) == FULL:
        assert abs(cells.loc[("readout", "random")].gain) < abs(
            cells.loc[("readout", "audio")].gain
        )


def test_enrichment_is_a_hook_of_hugging_faces() -> None:
    experiment, plain = opened(), Plain(QUESTION)
    experiment.searched.add(CLIP)
    table = rows(f"enrichmentsearch__{CLIP}__emotion__question__audio")["enrichment_search"]
    states = plain.run(output_hidden_states=True).hidden_states
    assert {*zip(table.source, table.layer, strict=True)} == {(0, 2), (0, 9), (3, 9), (8, 9)}
    for cell in table.itertuples():
        donor = states[cell.source][0, -1]

        def write(module: Any, args: Any, out: Tensor, donor: Tensor = donor) -> Tensor:
            out = out.clone()
            own = out[0, -1]
            out[0, -1] = own + donor if cell.mode == "add" else (own + donor) / 2  # noqa: B023
            return out

        handle = decoder_of(plain.hf).layers[cell.layer].register_forward_hook(write)
        theirs = plain.margin(plain.run().logits[0, -1])
        handle.remove()
        assert cell.margin == pytest.approx(theirs, abs=FAST_ENGINE[torch.float32])


# --- As a whole, on a user's table

WORDS = {
    "animal": {
        "labels": {"dog": "dog", "cat": "cat", "cow": "moo"},
        "prefix": "The [animal] of it:\n",
        "question": "What animal makes the sound?",
        "options": "What animal is it: {labels}?",
    },
    "room": {"question": "Which room is it in?"},
}
SETTINGS: dict[str, Any] = {
    "attributes": WORDS, "window": 2, "n_resamples": 1000, "enrich_layers": (1, 2),
    "enrich_sources": (0, 1), }  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips of three animals, of all but one of which the room is known."""
    folder = tmp_path_factory.mktemp("animals")
    lines = ["path,animal,room,speaker"]
    for n in range(7):
        soundfile.write(folder / f"c{n}.wav", noise(0.2 + 0.1 * (n % 3), seed=n), 16_000)
        room = "" if n == 6 else ("hall", "attic")[n % 2]
        lines.append(f"c{n}.wav,{('dog', 'cat', 'cow')[n % 3]},{room},s{n % 2}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "table.csv"


def asked(model: Path, table: Path, **how: Any) -> AttributeLens:
    config = AttributeLensConfig(model=str(model), audio=str(table), **{**SETTINGS, **how})
    return AttributeLens(config)


def finished(
    model: Path, table: Path, out: Path, executor: Executor | None = None, **how: Any
) -> RunFolder:
    return runner.run(asked(model, table, **how), out, executor=executor)


@pytest.fixture(scope="module")
def run(
    small_figures: None,
    tiny_models: TinyModels,
    table: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    return finished(tiny_models.folder(), table, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def unpaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the rest."""
    monkeypatch.setattr(AttributeLens, "page", lambda self, page, run: None)


TABLES = ("answers", "information", "absences", "knockout", "enrichment_search", "enrichment")


def test_a_table_of_ones_own_gives_every_table(run: RunFolder) -> None:
    inputs = run.provenance["inputs"]
    assert inputs["labels"] == {"animal": ["dog", "cat", "cow"], "room": ["hall", "attic"]}
    assert inputs["absences"] == ["silence", "no_clip"]
    assert inputs["prompts"]["animal"]["prefix"].endswith("The animal of it:\n")
    assert [*inputs["prompts"]["room"]] == ["question"]
    answers = run.read_table("answers")
    assert answers.groupby(["attribute", "prompt"]).size().to_dict() == {
        ("animal", "prefix"): 7, ("animal", "question"): 7, ("animal", "options"): 7,
        ("room", "question"): 6,
    }  # fmt: skip
    information = run.read_table("information")
    assert {*information[information.attribute == "room"].position} == {"readout"}
    assert {*information[information.attribute == "animal"].position} == {"readout", "mention"}
    tested = run.read_table("enrichment")
    assert {*tested.donor} == {"self", "other_depth", "other_clip", "noise"}
    assert not {*tested["clip"]} & {*inputs["validation"]}
    assert {*run.read_table("enrichment_search")["clip"]} == {*inputs["validation"]}


@pytest.mark.usefixtures("unpaged")
def test_batches_are_single_prompts_to_rounding(
    run: RunFolder, tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    together = finished(tiny_models.folder(), table, tmp_path / "run", batch_size=4)
    for name in TABLES:
        ours, theirs = run.read_table(name), together.read_table(name)
        if name == "enrichment":  # nearly equal cells could be chosen otherwise
            assert len(ours) == len(theirs)
            continue
        keys = [c for c in ours.columns if ours[c].dtype.kind not in "fc"]
        keys = [c for c in keys if c not in ("prediction", "top_token", "best_label_rank")]
        both = ours.merge(theirs, on=keys, suffixes=("", "_together"), validate="1:1")
        assert len(both) == len(ours) == len(theirs)
        for column in ("margin", "p_correct_soft", "label_mass", "gain"):
            if column in ours:
                np.testing.assert_allclose(
                    both[column], both[f"{column}_together"], atol=BATCHED_ROWS
                )


@pytest.mark.usefixtures("unpaged")
def test_stopped_and_ended_by_two_processes_it_has_the_same_bytes(
    run: RunFolder, tiny_models: TinyModels, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        runner.run(interrupted(asked(tiny_models.folder(), table), {4}), out)
    assert len(units(out)) == 3
    again = finished(tiny_models.folder(), table, out, executor=Processes(2))
    for folder in ("tables", "units"):
        for path in sorted((run.path / folder).iterdir()):
            assert (again.path / folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_flags_of_a_run_are_in_its_name() -> None:
    """AudioLens' runs with other flags overwrite each other (C47)."""
    flags = ("reversed", "use_is", "absences", "rotate_options")
    names = {
        default_out("attribute_lens", AttributeLensConfig(**dict(zip(flags, given, strict=True))))
        for given in itertools.product((True, False), repeat=len(flags))
    }
    assert len(names) == 16


@pytest.mark.usefixtures("unpaged")
def test_a_frozen_language_model_is_asked_too(table: Path, tmp_path: Path) -> None:
    case = ultravox.CASES[0]
    folder = tmp_path / "model"
    folder.mkdir()
    case.save(folder, torch.float32)
    save_tokenizer(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Ultravox"}))
    found = finished(folder, table, tmp_path / "run", components=case.components(folder))
    controls = found.read_table("controls").set_index("control").verdict
    ours = [name for name in controls.index if not name.startswith(("a label", "probability"))]
    assert {*controls[ours]} <= {"pass", "not applicable"}
    knockout = found.read_table("knockout")
    assert (
        knockout[(knockout["query"] == "readout") & (knockout["keys"] == "audio")].gain.abs().max()
        > 0
    )


def test_what_is_undefined_is_said_in_words() -> None:
    """No label leads at any depth, and none is likely."""
    run = made(dict.fromkeys(CURVES, (0.0, 0.0, 0.0)), ROADS)
    said = AttributeLens.judge(run).findings["readable_animal"].statement
    assert "is not above 0.40 at the last depth" in said
    assert "leads, is undefined, as that share is above 0.40 at no depth" in said
    assert "nan" not in said.lower()


# --- What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attributes": None}, "got the columns beast, room, speaker, expected one of emotion"),
        ({"enrich_layers": (4,), "attributes": WORDS}, r"got \[4\] in enrich_layers, expected 0"),
        ({"attributes": {"size": {"question": "How big?"}}}, r"changed\.csv line 2: size: missing"),
        (
            {"attributes": {"animal": {"question": "?", "labels": {"dog": "a", "cat": "b"}}}},
            r"table\.csv line 7: animal: got 'cow', expected one of dog, cat",
        ),
        ({"attributes": {"room": {"prefix": "The room is"}}}, "no words for the format 'question'"),
        (
            {"attributes": {"animal": {"question": "?", "labels": dict.fromkeys(
                ("dog", "cat", "cow"), "it")}}},
            "both begin with token",
        ),
        (
            {"cluster": "speaker", "attributes": {"room": {"question": "?"}}},
            r"changed\.csv line 2: speaker: missing",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    tiny_models: TinyModels, table: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """The table may have other columns than those that are asked for, or lack the speakers."""
    text = table.read_text("utf-8").replace("animal", "beast")
    if "cluster" in settings:
        text = "\n".join(line.rsplit(",", 1)[0] for line in text.splitlines())
    if "attributes" not in settings or "animal" not in (settings["attributes"] or {}):
        table = table.with_name("changed.csv")
        table.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message):
        finished(tiny_models.folder(), table, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attributes": {"animal": {"question": "The [a] or [b]?"}}},
            "one pair of square brackets",
        ),
        ({"attributes": {"animal": {"options": "Which?"}}}, r"\{labels\} once"),
        ({"causal_prompt": "options", "prompts": ("question",)}, "must be one of prompts"),
        ({"enrich_modes": ("add", "add")}, "each only once"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributeLensConfig(**settings)
