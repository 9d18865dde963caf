"""The examples of README and docs run as they stand, from the root of a checkout."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from cases import kimi_audio
from hooked_alm.converters import model_table
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import patch

ROOT = Path(__file__).parents[2]


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


def test_the_kimi_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a narrow model with the published ids and depths; the publisher's tokenizers are stubs."""
    sizes = {"D": 12, "D_IN": 32, "VOCAB": 168448, "FORK": 21, "TRUNK": 28, "BRANCH": 6}
    ids = {"BEGIN": 151661, "END": 151663, "BLANK": 151666, "OFFSET": 152064}
    for name, value in (sizes | ids).items():
        monkeypatch.setattr(kimi_audio, name, value)
    for name, value in (("vocab_size", sizes["VOCAB"]), ("hidden_size", sizes["D"])):
        monkeypatch.setitem(kimi_audio.SIZES, name, value)
    folder = tmp_path / "checkpoint" / "model"
    folder.mkdir(parents=True)
    kimi_audio.save(folder, torch.float32)
    config = WhisperConfig(
        d_model=sizes["D_IN"] // 4, num_mel_bins=128, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8,
    )  # fmt: skip
    for part in (WhisperModel(config), WhisperFeatureExtractor(feature_size=128)):
        part.save_pretrained(folder / "whisper-large-v3")
    names: dict[str, Any] = {
        "folder": folder, "samples": torch.randn(4 * 16000), "patch": patch,
        "voice_tokens": lambda samples: list(range(50)), "tokenizer_ids": lambda text: [5, 6, 7],
    }  # fmt: skip
    page = (ROOT / "docs" / "kimi_audio.md").read_text()
    prompt, answers, heads = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(prompt, "kimi_audio.md", "exec"), names)
    x = names["x"]
    found = {name: x.spans[name][0] for name in ("text", "audio", "audio_struct", "readout")}
    assert found == {
        "text": [(1, 4)], "audio": [(5, 55)], "audio_struct": [(4, 5), (55, 56)],
        "readout": [(58, 59)],
    }  # fmt: skip
    exec(compile(answers, "kimi_audio.md", "exec"), names)
    assert 1 <= names["tokens"].shape[1] <= 64
    names |= {"base": x, "donor": x, "metric": LogitDiff(5, 11)}
    exec(compile(heads, "kimi_audio.md", "exec"), names)
    assert names["text_logits"].shape == names["audio_logits"].shape == (1, 59, sizes["VOCAB"])
    assert names["audio"].path[-7:] == ("blocks.21", *(f"mimo_blocks.{i}" for i in range(6)))


def test_its_table_of_models_is_the_generated_one() -> None:
    """``hooked-alm models --markdown`` makes it anew."""
    assert model_table.as_markdown() in (ROOT / "README.md").read_text()


def test_its_tree_is_the_tree() -> None:
    """Every folder with code has its line, under its parent; no line is about another."""
    block = re.search(r"```\n(hooked_alm/ .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    listed, parents = set(), []
    for line in block[1].splitlines():
        match = re.fullmatch(r"( *)(\w+)/ +\S.*", line)
        assert match, line
        parents = [*parents[: len(match[1]) // 2], match[2]]
        listed.add("/".join(parents))
    code = ("hooked_alm", "converters", "experiments")
    folders = {
        path.parent.relative_to(ROOT) for name in code for path in (ROOT / name).rglob("*.py")
    }
    assert listed == {folder.as_posix() for folder in folders} | {"docs", "scripts", "tests"}


def test_its_paths_exist() -> None:
    """Links and pictures point at files of the checkout."""
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / "README.md").read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
