"""``head_statistics`` as a run: questions, prompts, files; against plain Hugging Face; killed."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2AudioForConditionalGeneration,
)

from head_statistics_toy import (
    BOS,
    N_HEADS,
    N_LAYERS,
    experiment,
    hf_batches,
    hf_contributions,
    hf_head_outputs,
    item,
    llama_folder,
    per_item,
    prompt,
    some_items,
    tables,
    tokenizer,
    write_items,
)
from hooked_alm.bundled import CLIPS, model_folder
from hooked_alm.errors import InputError
from hooked_alm.experiments.cli import main
from hooked_alm.experiments.head_statistics import prompts as prompts_module
from hooked_alm.experiments.head_statistics.claims import rank_correlations
from hooked_alm.experiments.head_statistics.experiment import HeadStatistics
from hooked_alm.experiments.head_statistics.items import Question, find_file, read_questions
from hooked_alm.experiments.head_statistics.prompts import (
    IGNORED,
    continuation,
    find_template,
    register_template,
    sft_labels,
)
from hooked_alm.experiments.head_statistics.settings import HeadStatisticsConfig
from hooked_alm.experiments.head_statistics.tables import merged
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.settings import load_settings
from hooked_alm.methods.reading.head_norms import OUTPUT
from stopped_runs import interrupted, results
from tiny import edit_tensors
from tolerances import HEAD_NORMS, MERGED_MOMENTS, PADDED_ROW

SEED_FILES = (
    "config.json", "meta.json",
    "head_output_norm_mean.npy", "head_output_norm_std.npy", "head_output_norm_heatmap.png",
    "head_resid_contrib_norm_mean.npy", "head_resid_contrib_norm_std.npy",
    "head_resid_contrib_norm_heatmap.png",
)  # fmt: skip
BUNDLED = "bundled:multiple_choice"
VOICES = "bundled:multiple_choice_voices"


pytestmark = pytest.mark.usefixtures("small_figures")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("items") / "items.jsonl", some_items())


@pytest.fixture(scope="module")
def finished(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("run") / "run"
    return runner.run(experiment(llama, data, unit_batches=1), out)


def arrays(folder: RunFolder) -> dict[str, np.ndarray]:
    return {name: np.load(folder.path / name) for name in SEED_FILES if name.endswith(".npy")}


def meta(folder: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder.path / "meta.json").read_text("utf-8"))
    return found


def question(n_options: int = 4, **changes: Any) -> Question:
    made = dict(
        id="q", question="Why?", option_labels=tuple("ABCDE"[:n_options]),
        option_texts=tuple("vwxyz"[:n_options]), answer="B",
    )  # fmt: skip
    return Question(**{**made, **changes})


# --- Questions


def test_numbers_become_letters(tmp_path: Path) -> None:
    """M-004-5: "2" is B; a number need not be text."""
    one = item(0, 5, answerKey="2")
    one["choices"]["label"] = ["1", "2", "3", "4", "5"]
    two = item(1, 4, answerKey=4)
    two["choices"]["label"] = [1, 2, 3, 4]
    found = read_questions(write_items(tmp_path / "q.jsonl", [one, two]))
    assert [one.answer for one in found] == ["B", "D"]
    assert found[0].option_labels == ("A", "B", "C", "D", "E")


def test_three_and_six_options_are_left_out(llama: Path, tmp_path: Path) -> None:
    """They are no solved examples either."""
    made = [item(0, 3), item(1), item(2, 6), item(3, 5)]
    whole = experiment(llama, write_items(tmp_path / "q.jsonl", made), few_shot=1)
    data = whole.identify()["data"]
    whole.load()
    assert data["examples"] == ["item1"]
    assert [one.question.id for one in whole.items] == ["item3"]
    assert (data["n_questions"], data["n_measured"]) == (4, 1)
    assert data["skipped"] == [
        {"id": "item0", "where": "q.jsonl line 1", "reason": "3 options"},
        {"id": "item2", "where": "q.jsonl line 3", "reason": "6 options"},
    ]


@pytest.mark.parametrize("name", ["test.jsonl", "ARC-Challenge-test.jsonl"])
def test_a_folder_holds_arc(tmp_path: Path, name: str) -> None:
    write_items(tmp_path / name, some_items(2))
    assert find_file(str(tmp_path)).name == name


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_hugging_face_cache(tmp_path: Path, kind: str) -> None:
    """As ``datasets`` keeps it, and as the hub stores it: the same questions."""
    cache = tmp_path / "cache" / "ai2_arc" / "ARC-Challenge" / "0.0.0" / "210d026f"
    cache.mkdir(parents=True)
    table = pa.Table.from_pylist(some_items(3))
    for split in ("train", "test"):
        file = cache / f"ai2_arc-{split}.{kind}"
        if kind == "parquet":
            pq.write_table(table, file)
        else:
            with pa.ipc.new_stream(pa.OSFile(str(file), "wb"), table.schema) as writer:
                writer.write_table(table)
    file = find_file(str(tmp_path / "cache"))
    found = read_questions(file)
    plain = read_questions(write_items(tmp_path / "q.jsonl", some_items(3)))
    assert file.name == f"ai2_arc-test.{kind}"
    assert [vars(q) | {"where": ""} for q in found] == [vars(q) | {"where": ""} for q in plain]
    assert found[1].where == f"ai2_arc-test.{kind} row 2"
    table = pa.Table.from_pylist([item(0), item(1, question=None)])
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=r"bad.parquet: row 2: question: got null, expected text"):
        read_questions(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answerKey": "E"}, "line 2: the line: .* an answerKey of A, B, C, D, not 'E'"),
        ({"answerKey": None}, "line 2: the line: .* an answerKey of A, B, C, D, not None"),
        ({"question": " "}, "line 2: question: got ' ', expected text"),
        ({"choices": ["a", "b"]}, "line 2: choices: got .* expected an object"),
        (
            {"choices": {"label": ["A"], "text": []}},
            "line 2: choices: got .* as many labels as texts",
        ),
        (
            {"choices": {"label": ["A", "A", "B", "C"], "text": ["a", "b", "c", "d"]}},
            "line 2: choices: got .* the labels A, B, C",
        ),
        (
            {"choices": {"label": ["A", "B", "C", "D"], "text": ["a", "b", 3, "d"]}},
            "line 2: choices.text.2: got 3, expected text",
        ),
        ({"id": 7}, "line 2: id: got 7, expected text"),
        ({"audio": "none.wav"}, "line 2: audio: got 'none.wav', expected files that exist"),
        ({"audio": []}, r"line 2: audio: got \[\], expected a file name"),
        ({"Audio": "a.wav"}, r"line 2: the line: .*no field Audio \(is it audio\?\)"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write_items(tmp_path / "q.jsonl", [item(0), item(1, **changes)])
    with pytest.raises(InputError, match=f"q.jsonl: {message}"):
        read_questions(file)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{broken"], "q.jsonl: line 1: got no usable JSON"),
        (["[1, 2]"], "q.jsonl: line 1: the line: got \\[1, 2\\], expected an object"),
        ([{"id": "x", "question": "Why?"}], "line 1: choices: missing; answerKey: missing"),
        (
            [{**{k: v for k, v in item(0).items() if k != "answerKey"}, "answer_key": "A"}],
            "line 1: answerKey: missing",
        ),
        (['{"id": "x", "id": "y"}'], "line 1: .*'id' twice"),
        ([item(0), item(0)], "q.jsonl line 2: id: got 'item0', which q.jsonl line 1 has"),
        (["", ""], "got an empty file"),
        ([item(0, 3)], "none of its 1 questions has 4 or 5 options"),
        ([item(0, question=3), item(1, answerKey="9")], "2 problems\n.*line 1.*\n.*line 2"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, lines: Sequence[Any], message: str) -> None:
    file = write_items(tmp_path / "q.jsonl", lines)
    with pytest.raises(InputError, match=message):
        read_questions(file)


def test_as_windows_writes_it(tmp_path: Path) -> None:
    """A byte order mark, CRLF, no end of line at the end: the same questions, on the same lines."""
    plain = write_items(tmp_path / "q.jsonl", [item(0), item(1)])
    expected = read_questions(plain)
    plain.write_bytes(
        b"\xef\xbb\xbf" + plain.read_text("utf-8").rstrip().replace("\n", "\r\n").encode()
    )
    assert read_questions(plain) == expected
    plain.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(InputError, match="got an empty file"):
        read_questions(plain)


def test_a_field_of_ones_own_is_kept(tmp_path: Path) -> None:
    """Its name may resemble one that is there as well."""
    one = item(0, question_id="x", answer_keys=["A"], subject="physics")
    found = read_questions(write_items(tmp_path / "q.jsonl", [one]))[0]
    assert found.meta == {"question_id": "x", "answer_keys": ["A"], "subject": "physics"}


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such path.*expected one of test.jsonl"):
        find_file(str(tmp_path / "none"))
    with pytest.raises(InputError, match="got none of them, expected one of test.jsonl"):
        find_file(str(tmp_path))
    (tmp_path / "a-test.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="a-test.parquet: got a damaged file"):
        read_questions(find_file(str(tmp_path)))
    (tmp_path / "b-test.arrow").write_bytes(b"")
    with pytest.raises(InputError, match="got .*a-test.parquet, .*b-test.arrow, expected"):
        find_file(str(tmp_path))
    with pytest.raises(InputError, match="b-test.arrow: got a damaged file"):
        read_questions(tmp_path / "b-test.arrow")
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="c.jsonl: line 1: got text that is not UTF-8"):
        read_questions(tmp_path / "c.jsonl")
    with pytest.raises(InputError, match=f"the package carries .*{BUNDLED}"):
        find_file("bundled:none")


def test_the_bundled_questions() -> None:
    found = read_questions(find_file(BUNDLED))
    assert len(found) >= 40
    assert {len(one.option_labels) for one in found} == {4, 5}
    answers = [one.answer for one in found]
    assert max(answers.count(letter) for letter in "ABCD") < len(answers) / 3
    voices = read_questions(find_file(VOICES))
    for one in voices:
        right = one.option_texts[one.option_labels.index(one.answer)]
        assert right == one.audio[0].stem.split("_")[1]
    assert len(voices) == 18


# --- Prompts


def test_the_corrected_prompt_ends_before_the_space(data: Path) -> None:
    """C35, C36: no space at the end, the letters of the question, a target that begins with one."""
    for one, given in zip(read_questions(data), some_items(), strict=True):
        made, target = find_template("arc_mcq_v1", "corrected")(one, [])
        assert made == prompt(given, is_seed=False)
        assert made.endswith("\n\nAnswer:")
        assert target == f" {one.answer}"
        seeds, seeds_target = find_template("arc_mcq_v1", "seed")(one, [])
        assert seeds == prompt(given, is_seed=True)
        assert seeds_target == one.answer
    five, _ = find_template("arc_mcq_v1", "corrected")(question(5), [])
    assert "(A, B, C, D, or E)" in five
    five, _ = find_template("arc_mcq_v1", "seed")(question(5), [])
    assert "(A, B, C, or D)" in five
    assert "E. z" in five


def test_solved_examples() -> None:
    made, _ = find_template("arc_mcq_v1", "corrected")(question(), [question(5, answer="E")])
    assert made.count("Question:") == 2
    assert "E. z\n\nAnswer: E\n\nQuestion: Why?" in made
    assert "(A, B, C, D, or E)" in made


def test_labels_cover_the_answer_alone() -> None:
    """M-004-7, C35: what is not masked decodes to the target; the seed's count of tokens shifts."""
    bpe = tokenizer()
    made, target = find_template("arc_mcq_v1", "corrected")(question(), [])
    ids, labels = sft_labels(bpe, made, target)
    learned = [label for label in labels if label != IGNORED]
    assert bpe.decode(learned) == target == " B"
    assert len(learned) == 1  # " B" is one token
    assert bpe.decode(ids, skip_special_tokens=True) == made + target
    assert [i for i, label in zip(ids, labels, strict=True) if label != IGNORED] == learned

    seeds, letter = find_template("arc_mcq_v1", "seed")(question(), [])
    # By count of tokens, as the seed masked them, nothing would be left to learn.
    assert len(bpe(seeds)["input_ids"]) == len(bpe(seeds + letter)["input_ids"])
    with pytest.raises(InputError, match="labels read ' B', expected 'B'. A token reaches across"):
        sft_labels(bpe, seeds, letter)
    merged, is_merged = continuation(bpe, seeds, letter)
    assert (bpe.decode(merged), is_merged) == (" B", True)
    assert continuation(bpe, made, target) == (learned, False)


def test_templates_are_registered_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """M-004-9: another data set brings its own, and a run finds it by name."""
    known = dict(prompts_module._TEMPLATES)
    monkeypatch.setattr(prompts_module, "_TEMPLATES", known)

    @register_template("commonsenseqa_v1")
    def commonsenseqa(asked: Question, examples: Sequence[Question]) -> str:
        return f"{asked.meta['question_concept']}: {asked.question} ({len(examples)})"

    asked = question(meta={"question_concept": "bank"})
    made = find_template("commonsenseqa_v1", "corrected")(asked, [])
    assert made == ("bank: Why? (0)", " B")
    with pytest.raises(InputError, match="there is one already"):
        register_template("commonsenseqa_v1")(commonsenseqa)
    with pytest.raises(InputError, match=r"'commonsenseqa_v1' .*'seed'.*arc_mcq_v1 \(seed\)"):
        find_template("commonsenseqa_v1", "seed")
    register_template("bad")(lambda asked, examples: "Answer: ")
    with pytest.raises(InputError, match="the prompt ends with ' ', expected no white space"):
        find_template("bad", "corrected")(asked, [])


def test_a_data_set_of_its_own(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M-004-9: CommonsenseQA, five options and a field of its own, on an unchanged experiment."""
    known = dict(prompts_module._TEMPLATES)
    monkeypatch.setattr(prompts_module, "_TEMPLATES", known)
    register_template("csqa")(lambda q, _: f"{q.meta['question_concept']}? {q.question} Answer:")
    made = [item(i, 5, question_concept=f"thing {i}") for i in range(3)]
    file = write_items(tmp_path / "csqa.jsonl", made)
    one = experiment(llama, file, template_name="csqa")
    one.identify()
    one.load()
    assert [i.prompt[:8] for i in one.items] == ["thing 0?", "thing 1?", "thing 2?"]
    assert one.items[2].described()["meta"] == {"question_concept": "thing 2"}


# --- Too long


def n_tokens(tok: Any, text: str) -> int:
    return len(tok(text)["input_ids"])


def test_too_long_prompts(llama: Path, tmp_path: Path) -> None:
    """C37: left out and counted; cut on the left, Answer: stays; cut as the seed did, it goes."""
    made = [item(0), item(1, question="why " * 40 + "?"), item(2), item(3, 3)]
    file = write_items(tmp_path / "q.jsonl", made)
    tok = AutoTokenizer.from_pretrained(llama)
    lengths = [n_tokens(tok, prompt(one, is_seed=False)) for one in made]
    limit = max(lengths[0], lengths[2])
    assert lengths[1] > limit

    skips = experiment(llama, file, max_length=limit)
    inputs = skips.identify()
    skips.load()
    assert [one.question.id for one in skips.items] == ["item0", "item2"]
    assert inputs["data"]["n_measured"] == 2
    assert inputs["data"]["n_questions"] == 4
    assert inputs["data"]["skipped"] == [
        {"id": "item3", "where": "q.jsonl line 4", "reason": "3 options"},
        {
            "id": "item1",
            "where": "q.jsonl line 2",
            "reason": f"{lengths[1]} positions, over max_length {limit}",
        },
    ]
    run = runner.run(skips, tmp_path / "run")
    assert (meta(run)["num_processed"], meta(run)["num_skipped"]) == (2, 2)
    assert "Left out" in (run.path / "report.html").read_text("utf-8")
    for side, is_kept in (("left", True), ("right", False)):
        cuts = experiment(llama, file, max_length=limit, overflow=side)
        cuts.identify()
        cuts.load()
        ids = cuts.items[1].ids
        assert len(ids) == limit == cuts.items[1].n_tokens
        assert tok.decode(ids).startswith(BOS)
        assert tok.decode(ids).endswith("Answer:") == is_kept
        assert [one.is_cut for one in cuts.items] == [False, True, False]
    with pytest.raises(
        InputError, match=r"all 3 are too long: .*, over max_length 5\. Set max_len"
    ):
        experiment(llama, file, max_length=5).identify()


def test_longer_than_the_models_context(llama: Path, tmp_path: Path) -> None:
    """Whatever max_length says: rotary positions would go on where no training was."""
    file = write_items(tmp_path / "q.jsonl", [item(0), item(1, question="why " * 700 + "?")])
    skips = experiment(llama, file, max_length=5000)
    skipped = skips.identify()["data"]["skipped"]
    skips.load()
    assert [one.question.id for one in skips.items] == ["item0"]
    assert "positions, over the 2048 that the model was made for" in skipped[0]["reason"]
    cuts = experiment(llama, file, max_length=5000, overflow="left")
    cuts.identify()
    cuts.load()
    assert [one.is_cut for one in cuts.items] == [False, True]
    assert len(cuts.items[1].ids) == 2048


# --- Settings


def test_the_seeds_yaml_loads(tmp_path: Path) -> None:
    """M-004-8: every key but output_dir, and the command line beats the file."""
    file = tmp_path / "default.yaml"
    text = (
        'model_path: "/m"\ndata_dir: "/d"\nmax_samples: 5000\nbatch_size: 4\nmax_length: 384\n'
        'dtype: "bf16"\ndevice_map: "auto"\ntoken_agg: "last"\ntemplate_name: "arc_mcq_v1"\n'
        "seed: 42\nattn_implementation: null\n"
    )
    file.write_text(text, "utf-8")
    found = load_settings(HeadStatisticsConfig, file=file, words=["batch_size=8", "token_agg=all"])
    expected = {
        "model": "/m", "data_dir": "/d", "max_samples": 5000, "batch_size": 8, "max_length": 384,
        "dtype": "bfloat16", "device_map": "auto", "token_agg": "all", "seed": 42,
        "template_name": "arc_mcq_v1", "attn_implementation": "sdpa", "variant": "corrected",
    }  # fmt: skip
    assert {key: getattr(found, key) for key in expected} == expected
    file.write_text(text + "output_dir: ./outputs\n", "utf-8")
    with pytest.raises(InputError, match="output_dir is no setting here: give the folder as --out"):
        load_settings(HeadStatisticsConfig, file=file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_samples=0"], "max_samples must be -1"),
        (["weighting=tokens"], "needs token_agg all"),
        (["model=a", "model_path=b"], "model_path is model: give one of them"),
        (["device=cuda", "device_map=auto"], "device or device_map"),
        (["attn_implementation=flash_attention_2", "variant=seed"], "flash has not"),
        (["token_ag=last"], "Did you mean token_agg"),
        (["dtype=int8"], "dtype: got 'int8'"),
    ],
)
def test_settings_that_make_no_sense(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(HeadStatisticsConfig, words=words)


def test_defects_follow_from_the_switches() -> None:
    def defects(**settings: Any) -> list[str]:
        return sorted(HeadStatistics(HeadStatisticsConfig(**settings)).known_defects())

    assert defects() == []
    assert defects(variant="seed") == ["C34", "C35", "C36", "C37"]
    assert defects(variant="seed", overflow="skip", head_output="hook_z") == ["C35", "C36"]


# --- Runs


def test_the_seeds_files(finished: RunFolder) -> None:
    """M-004-8: by name, [layer, head]; every item is measured, and meta.json says how."""
    for name in SEED_FILES:
        assert (finished.path / name).stat().st_size > 0, name
    assert {a.shape for a in arrays(finished).values()} == {(N_LAYERS, N_HEADS)}
    found = meta(finished)
    # Fewer items than max_samples = 5000: all of them.
    assert found["num_processed"] == 9
    assert (found["num_layers"], found["num_heads"]) == (N_LAYERS, N_HEADS)
    assert (found["ddof"], found["weighting"], found["token_agg"]) == (1, "samples", "last")
    assert found["known_defects"] == []
    bpe = tokenizer()
    assert {key: bpe.decode(ids) for key, ids in found["letter_token_ids"].items()} == {
        letter: f" {letter}" for letter in "ABCDE"
    }
    config = json.loads((finished.path / "config.json").read_text("utf-8"))
    assert config["template_name"] == "arc_mcq_v1"
    page = (finished.path / "report.html").read_text("utf-8")
    assert "Head residual contribution norm" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for png in (finished.path / "figures").glob("*.png"):
        assert png.with_suffix(".csv").stat().st_size > 0
    assert finished.read_table("controls").verdict.tolist() == ["pass"] * 2


@pytest.mark.parametrize("token_agg", ["last", "all"])
@pytest.mark.parametrize("variant", ["corrected", "seed"])
def test_a_run_against_plain_hugging_face(
    llama: Path, data: Path, tmp_path: Path, variant: str, token_agg: str
) -> None:
    """Every cell of the four arrays, from prompts written out in the test."""
    is_seed = variant == "seed"
    attention = "eager" if is_seed else "sdpa"
    hf = LlamaForCausalLM.from_pretrained(
        llama, dtype=torch.float32, attn_implementation=attention
    ).eval()
    tok = AutoTokenizer.from_pretrained(llama)
    prompts = [prompt(one, is_seed=is_seed) for one in some_items()]
    # The seed cuts the end off: here for about half of the prompts.
    cut = int(np.median([n_tokens(tok, text) for text in prompts])) if is_seed else 2000
    outputs, contributions = [], []
    for inputs in hf_batches(tok, prompts, 4, cut):
        z = hf_head_outputs(hf, inputs, is_seed=is_seed)
        mask = inputs["attention_mask"]
        outputs.append(per_item(z.norm(dim=-1), mask, token_agg))
        contributions.append(per_item(hf_contributions(hf, z), mask, token_agg))
    run = runner.run(
        experiment(
            llama, data, variant=variant, token_agg=token_agg, max_length=cut,
            attn_implementation=attention, unit_batches=2, batch_order="file",
        ),
        tmp_path / "run",
    )  # fmt: skip
    found = arrays(run)
    exact = token_agg == "last"
    for name, values in (
        ("head_output_norm", np.concatenate(outputs).astype(np.float64)),
        ("head_resid_contrib_norm", np.concatenate(contributions).astype(np.float64)),
    ):
        assert len(values) == meta(run)["num_processed"] == 9
        # Of equal norms, moments differ by the order of fp64 sums alone.
        rounding = 1e-13 if exact and name == "head_output_norm" else HEAD_NORMS
        mean, std = (found[f"{name}_{what}.npy"] for what in ("mean", "std"))
        np.testing.assert_allclose(mean, values.mean(0), rtol=rounding)
        # A difference of norms of the order of 1.
        np.testing.assert_allclose(std, values.std(0, ddof=1), rtol=1e-10, atol=10 * rounding)
    items = run.read_table("items")
    assert items.is_cut.any() == is_seed
    # Cut at the end, the last token is no longer the merged one's neighbour, but tokens merge all
    # the same: the whole prompt is what is looked at.
    assert items.is_merged.all() == is_seed
    page = (run.path / "report.html").read_text("utf-8")
    assert ("Known defects" in page) == is_seed
    assert ("after which the answer follows" in page) == (token_agg == "last" and not is_seed)
    assert ("the tokenizer merges the end of the prompt" in page) == is_seed
    assert ("were cut to max_length" in page) == is_seed
    assert meta(run)["known_defects"] == (["C34", "C35", "C36", "C37"] if is_seed else [])


@pytest.mark.parametrize("model", ["bundled:follows_text", "bundled:follows_voice"])
def test_voices_against_plain_hugging_face(model: str, tmp_path: Path) -> None:
    """Questions about clips, under the model's own chat template, one at a time."""
    folder = model_folder(model)
    config = HeadStatisticsConfig(
        model=model, data_dir=VOICES, max_samples=5, batch_size=1, unit_batches=2, n_threads=1
    )
    run = runner.run(HeadStatistics(config), tmp_path / "run")
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    outputs = []
    for line in Path(CLIPS.parent / "multiple_choice_voices.jsonl").read_text().splitlines()[:5]:
        one = json.loads(line)
        content = [
            {"type": "audio", "audio": "clip"},
            {"type": "text", "text": prompt(one, is_seed=False)},
        ]
        rendered = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        samples, rate = soundfile.read(CLIPS.parent / one["audio"], dtype="float32")
        inputs = dict(
            processor(text=rendered, audio=[samples], sampling_rate=rate, return_tensors="pt")
        )
        mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs.append(per_item(hf_head_outputs(hf, inputs).norm(dim=-1), mask, "last"))
    values = np.concatenate(outputs).astype(np.float64)
    np.testing.assert_allclose(arrays(run)["head_output_norm_mean.npy"], values.mean(0), rtol=1e-13)
    np.testing.assert_allclose(
        arrays(run)["head_output_norm_std.npy"], values.std(0, ddof=1), rtol=1e-10
    )
    assert meta(run)["prompt_format"] == "chat"
    assert meta(run)["letter_token_ids"]["B"] == processor.tokenizer.encode("B")
    assert len(list((run.path / "clips").glob("*.wav"))) == 5
    record = run.read_unit("items00000")["record"]
    assert record["spans"][0]["audio"][0], "the clip is in the prompt"


@pytest.mark.parametrize(
    "how", [{}, {"token_agg": "all"}, {"token_agg": "all", "weighting": "tokens"}],
    ids=["last", "all", "tokens"],
)  # fmt: skip
def test_nothing_depends_on_batches(llama: Path, data: Path, how: dict[str, str]) -> None:
    """M-004-4: units of any size give the same moments; batches, up to the rounding of padding."""

    def found(
        batch_size: int, unit_batches: int, batch_order: str = "file"
    ) -> dict[str, pd.DataFrame]:
        sizes = {"batch_size": batch_size, "unit_batches": unit_batches}
        return tables(experiment(llama, data, **how, **sizes, batch_order=batch_order))

    def halves(one: dict[str, pd.DataFrame]) -> list[np.ndarray]:
        return [merged(one["heads"], OUTPUT, half).mean for half in (0, 1)]

    def compare(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame], atol: float) -> None:
        np.testing.assert_allclose(halves(one), halves(other), rtol=0, atol=atol)
        for name in ("head_statistics", "layer_statistics"):
            pd.testing.assert_frame_equal(one[name], other[name], rtol=0, atol=atol)

    alone, padded = found(1, 2), found(4, 1)
    assert alone["items"].n_tokens[:4].nunique() == 4  # in a batch, all but the longest have pads
    for unit_batches in (2, 16):
        other = found(4, unit_batches)
        # Batch by batch, in the same order; the summaries merge both halves of a unit first.
        np.testing.assert_array_equal(halves(other), halves(padded))
        compare(other, padded, MERGED_MOMENTS)
    by_length = found(3, 2, "length")
    for other in (padded, found(3, 2), found(9, 1), by_length):
        compare(other, alone, PADDED_ROW[torch.float32])
    assert by_length["items"].drop(columns="unit").equals(alone["items"].drop(columns="unit"))


def test_batches_of_about_one_length(llama: Path, data: Path) -> None:
    one = experiment(llama, data, batch_size=2, unit_batches=3)
    one.identify()
    lengths = [item.n_tokens for item in one.items]
    for unit in one.units():
        batches = one._batches(unit.payload)
        assert sorted(i for batch in batches for i in batch) == [*unit.payload]
        in_order = [lengths[i] for batch in batches for i in batch]
        assert in_order == sorted(in_order)
    seeds = experiment(llama, data, batch_size=2, unit_batches=3, variant="seed")
    seeds.identify()
    assert seeds._batches(range(5)) == [[0, 1], [2, 3], [4]]


def test_half_of_the_blocks_on_the_disk_give_the_same_tables(
    llama: Path, data: Path, finished: RunFolder, tmp_path: Path
) -> None:
    """The same bytes; and where copies of weights lie is no part of what identifies a run."""
    devices = {"": "cpu", **{f"blocks.{i}": "disk" for i in range(0, N_LAYERS, 2)}}
    options = {"unit_batches": 1, "device_map": devices}
    placed = experiment(llama, data, **options, offload_folder=str(tmp_path))
    run = runner.run(placed, tmp_path / "run")
    blocks = placed.model.blocks
    assert [block.ln1._parameters["weight"].is_meta for block in blocks] == [
        i % 2 == 0 for i in range(N_LAYERS)
    ]
    files = sorted(path.name for path in (finished.path / "tables").iterdir())
    assert files
    for file in files:
        assert (run.path / "tables" / file).read_bytes() == (
            finished.path / "tables" / file
        ).read_bytes(), file
    elsewhere = experiment(llama, data, **options).config.model_dump(mode="json")
    assert run.provenance["config"] == elsewhere
    assert "device_map={" in run.provenance["command"]


def test_ddof_and_weighting(llama: Path, data: Path, tmp_path: Path) -> None:
    """C36: recorded, and they act."""
    runs = {
        name: runner.run(experiment(llama, data, token_agg="all", **settings), tmp_path / name)
        for name, settings in {
            "items": {}, "ddof": {"ddof": 0}, "tokens": {"weighting": "tokens"}
        }.items()
    }  # fmt: skip
    found = {name: arrays(run)["head_output_norm_std.npy"] for name, run in runs.items()}
    np.testing.assert_allclose(found["ddof"], found["items"] * (8 / 9) ** 0.5, rtol=1e-12)
    n_tokens = int(runs["tokens"].read_table("items").n_tokens.sum())
    assert meta(runs["tokens"])["num_samples"] == n_tokens
    assert meta(runs["items"])["num_samples"] == 9
    assert (found["tokens"] > found["items"]).mean() > 0.9  # tokens differ more than their means
    page = (runs["tokens"].path / "report.html").read_text("utf-8")
    assert "were taken at every token" in page
    assert "(ddof 1) are over tokens" in page


def test_some_of_the_items(llama: Path, data: Path, tmp_path: Path) -> None:
    run = runner.run(experiment(llama, data, max_samples=3, few_shot=2), tmp_path / "run")
    assert run.read_table("items").id.tolist() == ["item2", "item3", "item4"]
    assert run.provenance["inputs"]["data"]["examples"] == ["item0", "item1"]
    prompts = [one["prompt_text"] for one in run.read_unit("items00000")["record"]["items"]]
    assert [text.count("Question:") for text in prompts] == [3, 3, 3]
    assert all("(A, B, C, D, or E)" in text for text in prompts[1:2])  # item3 has five
    few = experiment(llama, data, max_samples=-1)
    few.identify()
    few.load()
    assert len(few.items) == 9
    with pytest.raises(InputError, match="taking 9 of 9 questions as solved examples"):
        experiment(llama, data, few_shot=9).identify()


def test_stopped_and_resumed(llama: Path, data: Path, finished: RunFolder, tmp_path: Path) -> None:
    """The same bytes in every file; the same command twice, too."""
    out = tmp_path / "run"
    whole = experiment(llama, data, unit_batches=1)
    for before in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            runner.run(interrupted(experiment(llama, data, unit_batches=1), {before}), out)
    assert len(list(out.glob("units/*.json"))) == 1
    runner.run(whole, out)
    expected, got = results(finished.path), results(out)
    assert [name for name in expected if got.get(name) != expected[name]] == []
    assert got.keys() == expected.keys()
    assert set(SEED_FILES) <= expected.keys()


def test_killed_and_resumed(llama: Path, data: Path, finished: RunFolder, tmp_path: Path) -> None:
    """``kill -9`` of the command in its second unit; then the same command goes on."""
    out = tmp_path / "run"
    words = ["unit_batches=1", "n_threads=1", "max_length=2000", f"data_dir={data}"]
    command = ["hooked-alm", "run", "head_statistics", "--model", str(llama), "--out", str(out)]
    command += [part for word in words for part in ("-s", word)]
    program = (
        "import os, signal, sys\n"
        "from hooked_alm.experiments.head_statistics.experiment import HeadStatistics\n"
        "from hooked_alm.experiments import cli\n"
        "measure = HeadStatistics.measure\n"
        "def dies(self, unit):\n"
        "    if unit.id != 'items00000': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return measure(self, unit)\n"
        "HeadStatistics.measure = dies\n"
        f"sys.argv = {command!r}\n"
        "cli.main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert [path.name for path in out.glob("units/*.json")] == ["items00000.json"]
    assert not (out / "meta.json").exists()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code
    for name, values in arrays(finished).items():
        np.testing.assert_array_equal(np.load(out / name), values)


def test_the_default_run_is_offline_and_whole(tmp_path: Path) -> None:
    """``hooked-alm run head_statistics``, without a setting."""
    run = runner.run(HeadStatistics(HeadStatisticsConfig()), tmp_path / "run")
    assert meta(run)["num_processed"] == len(read_questions(find_file(BUNDLED)))
    assert meta(run)["num_skipped"] == 0
    findings = run.read_table("findings").set_index("claim")
    assert bool(findings.established["stable"])
    assert findings.estimate["stable"] > 0.95
    # Two quantities, not one: W_O makes a difference.
    assert not bool(findings.established["stands in"])
    assert run.read_table("controls").verdict.tolist() == ["pass"] * 2


# --- What cannot work


def test_prompts_that_the_model_cannot_read(llama: Path, tmp_path: Path) -> None:
    clip = str(CLIPS / "en_sad_strong.wav")
    heard = write_items(tmp_path / "heard.jsonl", [item(0), item(1, audio=clip)])
    with pytest.raises(InputError, match="heard.jsonl line 2 has audio, which needs a chat"):
        experiment(llama, heard, prompt_format="raw").identify()
    with pytest.raises(InputError, match="prompt_format chat: the model has no audio front-end"):
        experiment(llama, heard).identify()
    bundled = model_folder("bundled:follows_text")
    with pytest.raises(InputError, match="seed's template ends a raw text with a space"):
        experiment(bundled, heard, variant="seed").identify()
    three = write_items(tmp_path / "heard.jsonl", [item(0), item(1, audio=clip), item(2)])
    with pytest.raises(InputError, match="few_shot: heard.jsonl line 2 has audio"):
        experiment(bundled, three, few_shot=2).identify()
    with pytest.raises(
        InputError, match="line 2: .* positions, over max_length 240: a chat prompt"
    ):
        experiment(bundled, three, overflow="left", max_length=240).identify()
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF no wave")
    bad = write_items(tmp_path / "bad.jsonl", [item(0), item(1, audio="broken.wav")])
    with pytest.raises(InputError, match="bad.jsonl line 2: audio: .*broken.wav"):
        experiment(bundled, bad).identify()
    marked = write_items(tmp_path / "marked.jsonl", [item(0, question="What is <|AUDIO|>?")])
    with pytest.raises(InputError, match="marked.jsonl line 1: question: .*placeholder"):
        experiment(bundled, marked).identify()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without the device")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "on device 'cuda': .*hooked-alm doctor"),
        ({"device": "cudaa"}, "on device 'cudaa': Expected one of cpu, cuda"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn is missing"),
    ],
)
def test_what_this_machine_has_not(
    llama: Path, data: Path, settings: dict[str, str], message: str
) -> None:
    one = experiment(llama, data, **settings)
    one.identify()
    with pytest.raises(InputError, match=message):
        one.load()


def test_no_tokenizer(llama: Path, data: Path, tmp_path: Path) -> None:
    bare = edit_tensors(llama, tmp_path / "bare", lambda tensors: None)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="its folder has no tokenizer"):
        experiment(bare, data).identify()


def test_infinite_norms_name_item_and_head(llama: Path, data: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][:6] *= 1e38

    broken = edit_tensors(llama, tmp_path / "broken", change)
    with pytest.raises(InputError, match="measuring items.jsonl line 1: .* layer 1, head 0 is"):
        runner.run(experiment(broken, data, batch_order="file"), tmp_path / "run")


# --- Findings


def test_rank_correlations_by_hand() -> None:
    one = np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3], [5, 5, 5]])
    other = np.array([[10.0, 20, 30], [3, 2, 1], [2, 1, 3], [1, 2, 3]])
    found = rank_correlations(one, other)
    np.testing.assert_allclose(found[:3], [1, -1, 0.5])
    assert np.isnan(found[3])


def test_few_items_establish_nothing(finished: RunFolder) -> None:
    findings = finished.read_table("findings")
    assert not findings.established.any()
    assert findings.statement.str.contains("only 9 items").all()
