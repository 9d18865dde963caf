"""The examples of README and docs run as they stand, from the root of a checkout."""

import re
from pathlib import Path
from typing import Any

import pytest

from hooked_alm.converters import model_table

ROOT = Path(__file__).parents[1]


def test_the_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its muted head changes nothing it should not: both answers are labels."""
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    spans, shape, answers = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"\[\(\d+, \d+\)\] \[\(\d+, \d+\)\]", spans)
    assert re.fullmatch(r"torch\.Size\(\[1, 6, (\d+), \1\]\)", shape)
    assert answers.startswith("['sad']")


def test_the_patching_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The voice's part of the run leaves the audio span and arrives at the readout."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "patching.md").read_text()
    names: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "patching.md", "exec"), names)
    recovery = names["streams"].recovery[..., 0]
    assert recovery[0, 0] > 0.8 > 0.2 > recovery[0, 2]
    assert recovery[-1, 2] > 0.8 > 0.2 > recovery[-1, 0]
    assert "blocks.9.attn.hook_q_input" in capsys.readouterr().out


def test_its_table_of_models_is_the_generated_one() -> None:
    """``hooked-alm models --markdown`` makes it anew."""
    assert model_table.as_markdown() in (ROOT / "README.md").read_text()


def test_its_paths_exist() -> None:
    """Links and pictures point at files of the checkout."""
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / "README.md").read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
