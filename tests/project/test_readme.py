"""The examples of README and docs run as they stand, from any folder."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from cases import kimi_audio, mimo_audio
from hooked_alm import HookedALM
from hooked_alm.converters import model_table

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def run_page(page: str) -> dict[str, Any]:
    """Run all python blocks of a page one after the other, as they stand, and give their names."""
    names: dict[str, Any] = {}
    for code in blocks(page):
        exec(compile(code, page, "exec"), names)
    return names


# Page -> the test that runs its blocks.
RUN = {
    "README.md": "test_the_example_runs",
    "docs/activations.md": "test_the_activations_page_runs",
    "docs/dictionaries.md": "test_the_dictionaries_page_runs",
    "docs/encoders.md": "test_the_encoder_page_runs",
    "docs/kimi_audio.md": "test_the_kimi_page_runs",
    "docs/neurons.md": "test_the_neurons_page_runs",
    "docs/own_experiment.md": "test_own_experiment.py",
    "docs/parity.md": "test_the_parity_page_runs",
    "docs/patching.md": "test_the_patching_example_runs",
    "docs/robustness.md": "test_the_robustness_page_runs",
    "docs/scale.md": "test_the_scale_page_runs",
    "docs/templates.md": "test_the_templates_page_runs",
    "docs/whisper.md": "../converters/test_real_models.py",  # on trained weights alone
}


def test_every_page_with_code_is_run() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    with_code = {page for page in {*pages, "README.md"} if blocks(page)}
    assert with_code == RUN.keys()
    for test in RUN.values():
        assert test in globals() or (Path(__file__).parent / test).exists()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the checkout: names and paths must do without it."""
    monkeypatch.chdir(tmp_path)


def test_the_neurons_page_runs() -> None:
    names = run_page("docs/neurons.md")
    assert names["log"].items.tolist() == [1, 1]
    # Without the neurons of a class, its clip's answer leads by less.
    sad, angry = names["result"].effect[:, 0]
    assert names["stronger"].values.shape == (3, 2, 2, 2)
    assert sad[0] < 0 < angry[1]


def test_the_robustness_page_runs() -> None:
    names = run_page("docs/robustness.md")
    assert names["answers"][:2] == ["sad", "cheerful"]
    losses = names["found"].losses[0]
    assert losses[-1] < 0.05 < losses[0]


def test_the_templates_page_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What must hold is asserted by the page; codes are heard by a random model of its name."""
    made = tmp_path / "made"
    made.mkdir()
    mimo_audio.save(made, torch.float32)
    mimo_audio.with_tokenizer(made, tmp_path / "MiMo-Audio-7B-Base")
    names = run_page("docs/templates.md")
    assert "1.0 ['angry']" in capsys.readouterr().out  # one difference of means, added once
    assert names["found"].recovery.argmax() == 2  # the window that the page's hypothesis names
    assert names["moved"] > 0


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Without its muted head, the model answers with the voice, as the page says."""
    run_page("README.md")
    spans, shape, answers = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"\[\(\d+, \d+\)\] \[\(\d+, \d+\)\]", spans)
    assert re.fullmatch(r"torch\.Size\(\[1, 6, (\d+), \1\]\)", shape)
    assert answers == "['cheerful'] ['sad']"
    assert answers in (ROOT / "README.md").read_text("utf-8")


def test_the_scale_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """A model half on the disk answers as the whole one does."""
    names = run_page("docs/scale.md")
    whole = HookedALM.from_pretrained("bundled:follows_text")
    assert capsys.readouterr().out.strip() == str(whole.generate(names["x"]))


def test_the_patching_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The voice's part of the run leaves the audio span and arrives at the readout."""
    names = run_page("docs/patching.md")
    recovery = names["streams"].recovery[..., 0]
    assert recovery[0, 0] > 0.8 > 0.2 > recovery[0, 2]
    assert recovery[-1, 2] > 0.8 > 0.2 > recovery[-1, 0]
    assert torch.equal(*(torch.from_numpy(names[n].values) for n in ("streams", "again")))
    edges = names["edges"]
    assert np.nanmax(edges.effect) > 2, "an example that shows an effect"
    assert round(edges.total_effect.item()) == 22
    assert "blocks.8.hook_mlp_out  logits" in capsys.readouterr().out


def test_the_activations_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The emotion of clips that no mean has seen is read, more often than by chance."""
    names = run_page("docs/activations.md")
    share, chance = re.findall(r"\d\.\d\d", capsys.readouterr().out)
    assert float(share) > 2 * float(chance)
    assert names["rows"].index["position"].tolist() == [*range(49), *range(29)]
    assert len(names["ActivationReader"]("hubert")) == 49 + 29


def test_the_encoder_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("docs/encoders.md")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "torch.Size([1, 300, 72])"
    assert shown[2] == "torch.Size([3, 4, 18, 72])"
    assert float(shown[1]) > 0.01
    assert names["samples"].grad.abs().max() > 0


def test_the_dictionaries_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """A dictionary of a few runs: what it loads as, and whose features carry the voice."""
    names = run_page("docs/dictionaries.md")
    said = capsys.readouterr().out
    assert re.match(r"unexplained 0\.\d\d, 8\.0 active, \d+ dead\n", said)
    assert names["exact"].effect.max() > 0.1
    assert names["scores"].pearson > 0.9
    assert not torch.equal(names["whole"], names["logits"])
    assert not names["before"].strip()  # nothing is said, and nothing is written
    assert len(names["chosen"]) == 20


def test_the_parity_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its test passes on the model as it is, and finds the fault that the page plants."""
    test, fault = blocks("docs/parity.md")
    names: dict[str, Any] = {}
    exec(compile(test, "parity.md", "exec"), names)
    names["test_parity"]()
    exec(compile(fault, "parity.md", "exec"), names)
    said = capsys.readouterr().out
    assert said.startswith("blocks.3.mlp.hook_pre_linear 7\nbit-identical to HF: no")
    assert "# blocks.3.mlp.hook_pre_linear 7" in fault
    with pytest.raises(AssertionError, match="no .first at blocks.3.mlp.hook_pre_linear"):
        names["test_parity"]()


def test_the_kimi_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a narrow model with the published ids and depths, in the folder that the page names."""
    sizes = {"D": 12, "D_IN": 32, "VOCAB": 168448, "FORK": 21, "TRUNK": 28, "BRANCH": 6}
    ids = {"BEGIN": 151661, "END": 151663, "BLANK": 151666, "OFFSET": 152064}
    for name, value in (sizes | ids).items():
        monkeypatch.setattr(kimi_audio, name, value)
    for name, value in (("vocab_size", sizes["VOCAB"]), ("hidden_size", sizes["D"])):
        monkeypatch.setitem(kimi_audio.SIZES, name, value)
    folder = tmp_path / "Kimi-Audio-7B-Instruct"
    folder.mkdir()
    kimi_audio.save(folder, torch.float32, sizes["D_IN"])
    config = WhisperConfig(
        d_model=sizes["D_IN"] // 4, num_mel_bins=128, encoder_layers=1, encoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8,
    )  # fmt: skip
    for part in (WhisperModel(config), WhisperFeatureExtractor(feature_size=128)):
        part.save_pretrained(folder / "whisper-large-v3")
    names = run_page("docs/kimi_audio.md")
    x, n_text, n_codes = names["x"], len("What emotion does the speaker convey?"), 38
    heard = 2 + n_text, 2 + n_text + n_codes
    found = {name: x.spans[name][0] for name in ("text", "audio", "audio_struct", "readout")}
    assert found == {
        "text": [(1, 1 + n_text)], "audio": [heard], "readout": [(heard[1] + 3, heard[1] + 4)],
        "audio_struct": [(heard[0] - 1, heard[0]), (heard[1], heard[1] + 1)],
    }  # fmt: skip
    assert 1 <= names["tokens"].shape[1] <= 64
    shape = (1, heard[1] + 4, sizes["VOCAB"])
    assert names["text_logits"].shape == names["audio_logits"].shape == shape
    assert names["audio"].path[-7:] == ("blocks.21", *(f"mimo_blocks.{i}" for i in range(6)))
    assert names["swapped"].values.shape[0] == len(names["audio"].path)


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
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", (ROOT / "README.md").read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
