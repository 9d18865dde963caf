"""The pairs file: what it means, and every way of getting it wrong, by file, line and field."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits_toy import write_tones
from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.experiments.materials.pairs import prepare_pairs, read_pairs
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import patch

GOOD: dict[str, Any] = {
    "base": {"audio": "tone0.wav", "text": "What is it?"},
    "donor": {"audio": "tone1.wav", "segments": [["text", "What "], ["word", "is it?"]]},
    "answers": {"base": "a", "donor": "bell"},
    "group": "first",
    "contrast": "pitch",
    "id": "p-1",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tones(tmp_path, 2)
    return tmp_path


def write(folder: Path, *lines: dict[str, Any] | str) -> Path:
    file = folder / "mine.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(text) + "\n", "utf-8")
    return file


def test_a_pair_is_what_its_line_says(folder: Path) -> None:
    small = {"base": {"text": "One?"}, "donor": {"text": "Two?"}, "answers": GOOD["answers"]}
    first, second = read_pairs(write(folder, "\ufeff" + json.dumps(GOOD), "", small))
    assert (first.id, first.group, first.contrast) == ("p-1", "first", "pitch")
    assert first.answers == ("a", "bell")
    assert first.base.audio == (folder / "tone0.wav",)
    assert first.base.parts == (("text", "What is it?"),)
    assert first.donor.parts == (("text", "What "), ("word", "is it?"))
    # Empty lines count as lines; a pair without a group stands alone.
    assert (second.id, second.group, second.contrast) == ("line0003", "line0003", "pair")
    assert second.base.audio == ()
    assert second.where == "mine.jsonl line 3"
    described = json.loads(json.dumps(first.described()))
    assert described["base"]["audio"][0][0] == "tone0.wav"
    assert len(described["base"]["audio"][0][1]) == 64


def test_a_pair_as_a_model_reads_it(folder: Path, gqa: HookedALM) -> None:
    (one,) = prepare_pairs(gqa, read_pairs(write(folder, GOOD)))
    expected = gqa.prepare(str(folder / "tone0.wav"), "What is it?")
    assert torch.equal(one.base.tokens, expected.tokens)
    assert torch.equal(gqa(one.base), gqa(expected))
    assert one.donor.spans.positions("word", 0)
    tokens = [gqa.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", "bell")]
    assert len(tokens[1]) > 1
    assert one.answers == (tokens[0][0], tokens[1][0])
    # The reader serves any sweep.
    found = patch(gqa, one.base, one.donor, LogitDiff(*one.answers), layers=[0], places=["audio"])
    assert found.values.shape == (1, 1, 1)


def test_a_clip_is_read_once_and_several_make_one_prompt(folder: Path, gqa: HookedALM) -> None:
    line = copy.deepcopy(GOOD)
    line["base"]["audio"] = ["tone0.wav", "tone1.wav"]
    line["donor"] = {"audio": ["tone1.wav", "tone0.wav"], "text": "What is it?"}
    (one,) = prepare_pairs(gqa, read_pairs(write(folder, line)))
    assert len(one.base.clips) == 2
    assert one.base.clips[0] is one.donor.clips[1]


def changed(key: str, value: Any) -> dict[str, Any]:
    line = copy.deepcopy(GOOD)
    *parents, last = key.split(".")
    place = line
    for parent in parents:
        place = place[parent]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: got no usable JSON"),
        ("[1, 2]", r"line 2: the line: got \[1, 2\], expected an object"),
        ('{"group": "a", "group": "b"}', "line 2: .*'group' twice"),
        (changed("base", KeyError), "line 2: base: missing"),
        (changed("donor", KeyError), "line 2: donor: missing"),
        (changed("answers", KeyError), "line 2: answers: missing"),
        (changed("bsae", {}), "line 2: bsae: got an unknown field"),
        (changed("base", None), "line 2: base: got null"),
        (changed("base", {}), "line 2: base: got {}, expected audio, an instruction, or both"),
        (changed("base.audoi", "x"), "line 2: base.audoi: got an unknown field"),
        (changed("base.audio", 3), "line 2: base.audio: got 3, expected a file name"),
        (changed("base.audio", []), r"line 2: base.audio: got \[\]"),
        (
            changed("base.audio", "gone.wav"),
            "line 2: base.audio: got 'gone.wav', expected files that exist",
        ),
        (changed("base.text", ""), "line 2: base.text: got '', expected text"),
        (changed("base.text", 5), "line 2: base.text: got 5"),
        (changed("donor.text", "x"), "line 2: donor: got .*text or segments, not both"),
        (changed("donor.segments", []), "line 2: donor.segments: got"),
        (changed("donor.segments", [["word"]]), "line 2: donor.segments.0.1: missing"),
        (changed("donor.segments", "x"), "line 2: donor.segments: got 'x'"),
        (
            changed("answers", "sad"),
            "line 2: answers: got 'sad', expected an object with",
        ),
        (
            changed("answers.base", KeyError),
            "line 2: answers: got {'donor': .* with base and donor",
        ),
        (changed("answers.donor", " "), "line 2: answers: got .*two different texts"),
        (changed("answers.donor", "a"), "line 2: answers: got .*two different texts"),
        (changed("answers.third", "x"), "line 2: answers: got .*two different texts"),
        (changed("group", None), "line 2: group: got null, expected a name"),
        (changed("group", " "), "line 2: group: got ' '"),
        (
            changed("contrast", "a/b"),
            "line 2: contrast: got 'a/b', expected up to 100 bytes",
        ),
        (changed("id", "../x"), "line 2: id: got '../x', expected up to 100 bytes of letters"),
        (
            changed("donor", GOOD["base"]),
            "line 2: the line: got .* donor that differs from the base",
        ),
        (GOOD, "mine.jsonl line 2: id: got 'p-1', which mine.jsonl line 1 has"),
    ],
)
def test_a_bad_line_is_named(folder: Path, line: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_pairs(write(folder, GOOD, line))
    assert "mine.jsonl" in str(error.value)


def test_all_faults_come_at_once(folder: Path) -> None:
    both = changed("group", 1.5)
    both["answers"] = {"base": "x"}
    with pytest.raises(InputError) as error:
        read_pairs(write(folder, both, "[]"))
    for part in (
        "2 problems",
        "line 1: group: got 1.5",
        "; answers: got {'base': 'x'}",
        "line 2: the line: got",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"reading pairs from .*mine.jsonl: (line 1: )?got"):
        read_pairs(file)
    with pytest.raises(InputError, match="No such file"):
        read_pairs(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (changed("answers", {"base": "a", "donor": "a bell"}), "answers: .* begin with the same"),
        (changed("base.audio", "broken.wav"), "base.audio: "),
        (changed("donor.segments", [["audio", "What is it?"]]), "donor: naming segments: audio"),
    ],
)
def test_what_a_model_cannot_take(
    folder: Path, gqa: HookedALM, line: dict[str, Any], message: str
) -> None:
    (folder / "broken.wav").write_bytes(b"RIFF")
    line["id"] = "other"
    pairs = read_pairs(write(folder, GOOD, line))
    with pytest.raises(InputError, match=f"preparing pairs: mine.jsonl line 2: {message}"):
        prepare_pairs(gqa, pairs)


def test_a_model_without_a_processor(folder: Path, mha: HookedALM) -> None:
    with pytest.raises(InputError, match="its folder no processor files"):
        prepare_pairs(mha, read_pairs(write(folder, GOOD)))
