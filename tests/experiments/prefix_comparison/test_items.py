"""Items: what is read, and that whatever is wrong is named by file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from hooked_alm.errors import InputError
from hooked_alm.experiments.prefix_comparison.items import read_items
from hooked_alm.experiments.tuned_lens.items import read_prompts
from prefix_comparison_toy import item, write_items


def test_items_are_read_in_order_and_stand_alone_without_a_group(tmp_path: Path) -> None:
    file = write_items(tmp_path / "a.jsonl", [item(1), item(0, group="pair", labels=["x"])])
    items = read_items(file)
    assert [one.id for one in items] == ["he-1", "he-0"]
    assert [one.group for one in items] == ["he-1", "pair"]
    assert items[1].where == "a.jsonl line 2"
    assert items[0].conditions["agentic"].names() == [
        "instruction",
        "spec",
        "tool_response",
        "text",
    ]
    assert items[0].conditions["assisted"].outcome is True


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    """U+2028 may stand inside a JSON string; empty lines and a byte order mark are skipped."""
    file = tmp_path / "a.jsonl"
    line = json.dumps(item(0, continuation="a\u2028b"), ensure_ascii=False)
    file.write_text("\ufeff" + line + "\n\n" + json.dumps(item(1)) + "\n", "utf-8")
    assert [one.continuation[:3] for one in read_items(file)] == ["a\u2028b", "   "]


def changed(path: str, value: Any) -> dict[str, Any]:
    """An item with one field set; None removes it."""
    one: Any = item(0)
    *parents, last = path.split("/")
    at = one
    for parent in parents:
        at = at[int(parent) if parent.isdigit() else parent]
    if value is None:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value
    return one


BAD: dict[str, tuple[str, Any, str]] = {
    "an id that is no file name": ("id", "a/b", "id: got 'a/b', expected up to 100 bytes"),
    "an id too long for a file name": ("id", "a" * 101, "id: got 'aaa.*, expected up to 100 bytes"),
    "no continuation": ("continuation", None, "continuation: missing"),
    "an empty continuation": ("continuation", "", "continuation: got ''"),
    "an unknown field": ("answers", {}, "answers: got an unknown field"),
    "one condition": ("conditions/assisted", None, "conditions: got .*at least 2 items"),
    "an unknown field of a condition": (
        "conditions/agentic/prompt", "x", "conditions.agentic.prompt: got an unknown field",
    ),
    "two forms": ("conditions/agentic/text", "x", "conditions.agentic: .*one of: prefix; messages"),
    "a segment without text": (
        "conditions/agentic/prefix/1", ["spec"], r"conditions.agentic.prefix.1.1: missing",
    ),
    "a segment without a name": (
        "conditions/agentic/prefix/1", "x", r"conditions.agentic.prefix.1: got 'x', expected a li",
    ),
    "text that is a number": (
        "conditions/agentic/prefix/1", ["spec", 3], r"conditions.agentic.prefix.1.1: got 3",
    ),
    "a name that is taken": (
        "conditions/agentic/prefix/1", ["prior_output", "x"], "other names than prior_output",
    ),
    "an outcome that is no yes or no": (
        "conditions/agentic/outcome", 1, "conditions.agentic.outcome: got 1",
    ),
    "saved ids that are text": (
        "conditions/agentic/saved", {"token_ids": ["a"]}, "agentic.saved.token_ids.0: got 'a'",
    ),
    "silence without audio": (
        "conditions/agentic", {"text": "x", "silent": True}, "conditions.agentic: .*silent takes",
    ),
    "audio that is not there": (
        "conditions/agentic", {"audio": "no.wav", "text": "x"}, "agentic.audio: got .*no.wav",
    ),
    "tools without messages": (
        "conditions/agentic", {"text": "x", "tools": []}, "conditions.agentic: .*messages beside",
    ),
    "a message without a role": (
        "conditions/agentic", {"messages": [{"content": "x"}]}, r"a role in messages.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), BAD.values(), ids=BAD)
def test_bad_items(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = write_items(tmp_path / "a.jsonl", [item(1), changed(path, value)])
    with pytest.raises(InputError, match=rf"a.jsonl: line 2: .*{message}"):
        read_items(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: got no usable JSON"),
        ("[]", r"line 1: the line: got \[\], expected an object"),
        ('{"id": "a", "id": "b"}', "line 1: .*'id' twice"),
        ("[" * 100_000, "line 1: got no usable JSON"),
        ("", "got an empty file"),
    ],
)
def test_bad_lines(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=f"reading items from .*a.jsonl: {message}"):
        read_items(tmp_path / "a.jsonl")


@pytest.mark.parametrize("read", [read_items, read_prompts])
def test_text_in_another_encoding_is_found_at_its_line(tmp_path: Path, read: Any) -> None:
    file = tmp_path / "a.jsonl"
    good = {read_items: item(0), read_prompts: {"prompt": {"text": "x"}}}[read]
    file.write_bytes(json.dumps(good).encode() + b'\n\n{"id": "Gr\xfc\xdfe"}\n')
    with pytest.raises(
        InputError, match=r"a.jsonl: line 3: got text that is not UTF-8 \(byte 0xfc"
    ):
        read(file)


def test_prompts_of_a_lens_end_where_json_says(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    line = json.dumps({"prompt": {"text": "a\u2028b"}}, ensure_ascii=False)
    file.write_text("\ufeff" + line + "\r\n", "utf-8")
    assert [one.prompt.parts[0][1] for one in read_prompts(file)] == ["a\u2028b"]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a.jsonl: got No such file"):
        read_items(tmp_path / "a.jsonl")


def test_items_that_do_not_go_together(tmp_path: Path) -> None:
    other = item(1)
    other["conditions"]["third"] = other["conditions"]["assisted"]
    file = write_items(tmp_path / "a.jsonl", [item(0), item(0, id="HE-0"), other])
    with pytest.raises(InputError) as found:
        read_items(file)
    assert "a.jsonl line 2: id: got 'HE-0', which a.jsonl line 1 has" in str(found.value)
    assert "a.jsonl line 3: conditions: got agentic, assisted, third" in str(found.value)
